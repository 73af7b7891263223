"""Safetensors files of a folder: read slice by slice, written tensor by tensor.

Format: 8 bytes with the header's length, the header in JSON (name -> dtype, shape, offsets), the tensors' bytes.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from qsharp_jax.system.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F32": np.dtype("float32"), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("float16")}
# Of quantized weights, see packed.py.
PACKED = {"I32": np.dtype("int32"), "I8": np.dtype("int8"), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
DTYPES = FLOATS | PACKED
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


class Tensors(contextlib.AbstractContextManager):
    """The tensors in one or several safetensors files of a folder; opening reads the headers only.

    Attributes:
      shapes: shape of every tensor, by name.
      stored: dtype of every tensor as the format names it, such as "BF16".
      readable: dtypes of weights.

    Raises:
      UserError: for a missing, damaged or truncated file, and for weights that are not safetensors.
    """

    readable = tuple(FLOATS)

    def __init__(self, folder: Path, name: str | None = None):
        """Read the headers of the folder's weights, or of the one file of this name."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.stored: dict[str, str] = {}
        self._places: dict[str, tuple[BinaryIO, int]] = {}  # the open file that holds a tensor, and its first byte
        with contextlib.ExitStack() as files:  # closes the open files if one of them cannot be read
            for path in _paths(folder) if name is None else [folder / name]:
                self._add(path, files)
            self._files = files.pop_all()

    def __exit__(self, *_) -> None:
        self._files.close()

    def _add(self, path: Path, files: contextlib.ExitStack) -> None:
        if not path.is_file():
            raise UserError(f"{path.parent} has no {path.name}; download it again")
        try:
            with safe_open(path, framework="numpy") as checked:  # it refuses a header that does not fit the file
                for name in checked.keys():  # noqa: SIM118 (not a dict)
                    tensor = checked.get_slice(name)
                    self.shapes[name], self.stored[name] = tuple(tensor.get_shape()), tensor.get_dtype()
            file = files.enter_context(open(path, "rb"))
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{path} is damaged or truncated ({error}); download it again") from None
        self._places |= {name: (file, 8 + length + entry["data_offsets"][0]) for name, entry in header.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read a slice of a tensor of one or two axes, in the dtype of the file; only its bytes are read.

        A tensor without axes is read like one of one number.

        The file is not memory-mapped, because mapped pages would count as this process's memory; and `safetensors`
        (0.8) without a map reads the whole tensor for each slice.
        """
        file, place = self._places[name]
        shape, dtype = self.shapes[name] or (1,), DTYPES[self.stored[name]]
        index = index or (slice(None),)
        (row, stop), *others = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        begin, end = others[0] if others else (0, 1)
        width = shape[1] if others else 1
        out = np.empty((stop - row, end - begin), dtype)
        if end - begin == width:
            pieces = [(out, row * width)]
        else:
            pieces = [(out[i], (row + i) * width + begin) for i in range(len(out))]
        for piece, start in pieces:
            rest, at = piece.reshape(-1).view(np.uint8).data, place + start * dtype.itemsize
            while len(rest):  # Linux reads 2 GiB at once, at most
                if not (done := os.preadv(file.fileno(), [rest], at)):
                    raise UserError(f"{file.name} was truncated while {name} was read; download it again")
                rest, at = rest[done:], at + done
        return out if others else out[:, 0]


def _paths(folder: Path) -> list[Path]:
    """The folder's weight files, all of which exist."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run arbitrary code when read; convert"
                " it on a machine where you trust it: load it with transformers and save it with"
                " model.save_pretrained(FOLDER, safe_serialization=True)"
            )
        raise UserError(f"{folder} has no weights; it needs {SINGLE}, or {INDEX} with its shards")
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / INDEX} is damaged; download it again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{folder / INDEX} names {name!r}, which is not a file beside it; download it again")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise UserError(
            f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} weight files are missing); download the"
            " missing files"
        )
    return [folder / name for name in names]


# --- Writing --------------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor to write; `make` returns its values, and is called once, when they are written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def split(tensors: Sequence[Tensor], largest_file: int) -> dict[str, list[Tensor]]:
    """Group tensors by the name of their file, in the order of writing.

    Args:
      largest_file: bytes of tensors per file; a larger tensor gets its own file.
    """
    # Wider dtypes first, so that each tensor is aligned to its dtype.
    by_name = {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)}
    files = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=largest_file,
    ).filename_to_tensors
    return {file: [by_name[name] for name in names] for file, names in files.items()}


def write(folder: Path, files: Mapping[str, Sequence[Tensor]]) -> None:
    """Write files of `split`, with an index if there are several, holding one tensor in memory at a time."""
    for name, tensors in files.items():
        _write_file(folder / name, tensors)
    if len(files) > 1:
        total = sum(tensor.bytes for tensors in files.values() for tensor in tensors)
        weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, tensors: Sequence[Tensor]) -> None:
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        header[tensor.name] = {
            "dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with open(path, "wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.make())
            file.write(values.view(np.uint8).data if values.ndim else values.tobytes())
        file.flush()
        os.fsync(file.fileno())
