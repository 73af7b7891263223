"""GGUF files as folders of `transformers` would have them: the entries of config.json, and the tensors by their names.

Quantized tensors are dequantized by the package `gguf` as they are read, slice by slice. To add an architecture, add
its entries to the tables below.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from qsharp_jax.system import gguf
from qsharp_jax.system.errors import UserError

# --- Tables: fields and tensors by architecture, which is the family of `config.py` ---------------------------------

# The fields of config.json, by their keys in the metadata without the architecture's name.
_LLAMA_FIELDS = {
    "embedding_length": "hidden_size", "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.sliding_window": "sliding_window",
}  # fmt: skip
_GPT2_FIELDS = {
    "embedding_length": "n_embd", "block_count": "n_layer", "attention.head_count": "n_head",
    "feed_forward_length": "n_inner", "context_length": "n_positions",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}  # fmt: skip
_FIELDS = {"gpt2": _GPT2_FIELDS} | dict.fromkeys(("llama", "qwen2", "qwen3"), _LLAMA_FIELDS)
_OPTIONAL = ("attention.head_count_kv", "attention.key_length", "attention.sliding_window")
# The modules' names in a checkpoint of `transformers`, by their names here; {} is the layer.
_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm", "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj", "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm", "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm", "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj", "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}  # fmt: skip
_GPT2_NAMES = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "blk.{}.attn_norm": "transformer.h.{}.ln_1", "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
    "blk.{}.attn_output": "transformer.h.{}.attn.c_proj", "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
    "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc", "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
}  # fmt: skip
_NAMES = {"gpt2": _GPT2_NAMES} | dict.fromkeys(("llama", "qwen2", "qwen3"), _LLAMA_NAMES)
# GPT-2's matrices in a block are [in, out] in a checkpoint and [out, in] here.
_TRANSPOSED = {"gpt2": re.compile(r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight")}
# A rotary pair is two neighbors here, and one of each half of the head in a checkpoint.
_PAIRED = {"llama": re.compile(r"blk\.\d+\.(attn_q|attn_k)\.weight")}

READABLE = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip


def _package(path: Path) -> ModuleType:
    """The package `gguf`, imported when the first file is opened: all other models are read without it."""
    try:
        import gguf as package
    except ModuleNotFoundError:
        raise UserError(
            f"{path} needs the package gguf, which is not installed; install it by `pip install gguf`"
        ) from None
    return package


# --- Config ---------------------------------------------------------------------------------------------------------

_ROPE_FREQS = "rope_freqs.weight"  # what each rotary frequency is divided by
_LLAMA3_ROPE = dict(low_freq_factor=1.0, high_freq_factor=4.0)  # of every published model
_LLAMA3_POSITIONS = 8192


def entries(path: Path) -> dict[str, Any]:
    """Return the entries that the config.json of a GGUF file's model would have.

    Raises:
      UserError: for an architecture that is not computed here, metadata that are missing, a file that is damaged, and
        where the package `gguf` is not installed.
    """
    header = gguf.read(path)
    family = _family(path, header)
    metadata = _of(family, header)
    missing = [key for key in _FIELDS[family] if key not in metadata and key not in _OPTIONAL]
    if missing or "token_embd.weight" not in header.tensors:
        what = f"{family}.{missing[0]} in its metadata" if missing else "the tensor token_embd.weight"
        raise UserError(f"{path} lacks {what}; download a complete file")
    fields = {theirs: metadata[key] for key, theirs in _FIELDS[family].items() if key in metadata}
    stored = _package(path).GGMLQuantizationType
    bfloat16 = any(entry.type == stored.BF16 for entry in header.tensors.values())
    fields |= dict(
        model_type=family,
        vocab_size=header.tensors["token_embd.weight"].shape[0],
        tie_word_embeddings="output.weight" not in header.tensors,
        dtype="bfloat16" if bfloat16 else "float32",
    )
    if family == "gpt2":
        return fields
    return dict(num_key_value_heads=fields["num_attention_heads"]) | fields | _rotary(path, header, metadata)


def _family(path: Path, header: gguf.Header) -> str:
    family = header.metadata.get("general.architecture")
    if family not in _FIELDS:
        raise UserError(f"{path} is of the architecture {family!r}; {', '.join(_FIELDS)} can be read from GGUF files")
    return family


def _of(family: str, header: gguf.Header) -> dict[str, Any]:
    """The metadata, the architecture's own without its name."""
    return {key.removeprefix(f"{family}."): value for key, value in header.metadata.items()}


def _head_dim(metadata: Mapping[str, Any]) -> int:
    return metadata.get("attention.key_length") or metadata["embedding_length"] // metadata["attention.head_count"]


def _rotary(path: Path, header: gguf.Header, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the heads' width and their rotary positions."""
    head_dim = _head_dim(metadata)
    if (rotated := metadata.get("rope.dimension_count", head_dim)) != head_dim:
        raise UserError(f"{path}: {rotated} of the {head_dim} dimensions of a head are rotated, which is not supported")
    if (kind := metadata.get("rope.scaling.type", "none")) != "none":
        raise UserError(f"{path}: the rotary positions are scaled by {kind!r}, which is not supported")
    theta = metadata.get("rope.freq_base", 10_000.0)
    if _ROPE_FREQS not in header.tensors:
        return dict(head_dim=head_dim, rope_parameters=dict(rope_type="default", rope_theta=theta))

    with Tensors(path) as tensors:
        divisors = tensors.read(_ROPE_FREQS, (slice(None),))
    factor = float(divisors.max())
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    positions = metadata.get("rope.scaling.original_context_length", _LLAMA3_POSITIONS)
    turns = positions * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / (kept + (1 - kept) / factor)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(f"{path}: {_ROPE_FREQS} scales the rotary positions in another way than Llama 3.1's")
    rope = dict(rope_type="llama3", rope_theta=theta, factor=factor, original_max_position_embeddings=positions)
    return dict(head_dim=head_dim, rope_parameters=rope | _LLAMA3_ROPE)


# --- Tensors --------------------------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """A tensor in the file, a vector as one row.

    Attributes:
      type: an element of the package's enumeration.
      shape: rows and columns in the file.
      row_bytes: of one row.
      transposed: the checkpoint's axes are the file's in reverse.
      head_dim: the rows of a head whose rotary pairs are neighbors; 0 where rows are as in the checkpoint.
    """

    name: str
    start: int
    type: int
    shape: tuple[int, int]
    row_bytes: int
    transposed: bool
    head_dim: int


class Tensors(contextlib.AbstractContextManager):
    """The tensors of a GGUF file, by the names, and with the axes and rows, of a checkpoint of `transformers`.

    Attributes:
      shapes: of every tensor, by name.
      stored: its type in the file, such as "Q4_K".
      readable: the types that can be read.
    """

    readable = READABLE

    def __init__(self, path: Path):
        """Read the header only.

        Raises:
          UserError: for a missing, damaged or truncated file, and where the package `gguf` is not installed.
        """
        header = gguf.read(path)
        family = _family(path, header)
        self._package = _package(path)
        size = path.stat().st_size
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.stored: dict[str, str] = {}
        self._tensors: dict[str, _Stored] = {}
        for ours, entry in header.tensors.items():
            name = _checkpoint_name(family, ours)
            transposed = family in _TRANSPOSED and bool(_TRANSPOSED[family].fullmatch(ours))
            self.shapes[name] = entry.shape[::-1] if transposed else entry.shape
            try:
                kind = self._package.GGMLQuantizationType(entry.type)
            except ValueError:  # of a later version of the format
                self.stored[name] = f"type {entry.type}"
                continue
            self.stored[name] = kind.name
            block, block_bytes = self._package.GGML_QUANT_SIZES[kind]
            rows, columns = int(np.prod(entry.shape[:-1], dtype=np.int64)), entry.shape[-1]
            end = entry.start + rows * columns // block * block_bytes
            if columns % block or end > size:
                why = f"rows of {columns} in blocks of {block}" if columns % block else f"it ends at byte {size}"
                raise UserError(f"{path} is damaged or truncated in {ours} ({why}); download it again")
            paired = family in _PAIRED and bool(_PAIRED[family].fullmatch(ours))
            head_dim = _head_dim(_of(family, header)) if paired else 0
            self._tensors[name] = _Stored(
                ours, entry.start, kind, (rows, columns), columns // block * block_bytes, transposed, head_dim
            )
        self._file: BinaryIO = open(path, "rb")

    def __exit__(self, *_) -> None:
        self._file.close()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor of one or two axes, in float32; blocks outside of it are not dequantized."""
        tensor = self._tensors[name]
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shapes[name], strict=True)]
        if len(bounds) == 1:
            return self._dequantized(tensor, (0, 1), bounds[0])[0]
        if tensor.transposed:
            return self._dequantized(tensor, bounds[1], bounds[0]).T
        if not tensor.head_dim:
            return self._dequantized(tensor, bounds[0], bounds[1])
        (first, last), columns = bounds
        begin, end = first // tensor.head_dim * tensor.head_dim, -(-last // tensor.head_dim) * tensor.head_dim
        pairs = self._dequantized(tensor, (begin, end), columns)
        halves = np.arange(end - begin).reshape(-1, tensor.head_dim // 2, 2).swapaxes(1, 2).ravel()
        return pairs[halves[first - begin : last - begin]]

    def _dequantized(self, tensor: _Stored, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """A slice of a tensor as the file has it."""
        block, block_bytes = self._package.GGML_QUANT_SIZES[tensor.type]
        stored = np.empty((rows[1] - rows[0], tensor.row_bytes), np.uint8)
        done = os.preadv(self._file.fileno(), [stored.data], tensor.start + rows[0] * tensor.row_bytes)
        if done != stored.nbytes:
            raise UserError(
                f"{self._file.name} ended in the middle of {tensor.name}, though it was whole before; download it again"
            )
        first, last = columns[0] // block, -(-columns[1] // block)
        blocks = np.ascontiguousarray(stored[:, first * block_bytes : last * block_bytes])
        values = self._package.quants.dequantize(blocks, tensor.type)
        return values[:, columns[0] - first * block : columns[1] - first * block]


def _checkpoint_name(family: str, name: str) -> str:
    """A tensor's name in a checkpoint; its own if that has no such tensor."""
    module, _, kind = name.rpartition(".")
    layer = re.match(r"blk\.(\d+)\.", module)
    pattern = re.sub(r"^blk\.\d+\.", "blk.{}.", module)
    if pattern not in _NAMES[family]:
        return name
    return f"{_NAMES[family][pattern].format(layer and layer[1])}.{kind}"
