"""Checkpoints with quantized weights, dequantized slice by slice while they are read.

A weight W [out, in] is stored in one of these ways, with P numbers of 32 / P bits in an int32, the first in its lowest
bits, and G groups of inputs:

  gptq                qweight [in / P, out], qzeros [G, out / P], scales [G, out], g_idx [in], the group of each input:
                      W = scales (qweight - qzeros), where all but "gptq_v2" store qzeros - 1
  awq                 qweight [in, out / 8], qzeros [G, out / 8], scales [G, out]: W = scales (qweight - qzeros); the
                      outputs in an int32 are in the order 0, 2, 4, 6, 1, 3, 5, 7
  fp8                 weight [out, in], weight_scale_inv with an entry for each block: W = weight weight_scale_inv
  compressed-tensors  weight [out, in] in fp8 or int8 and weight_scale, for all, for each output, or for each block: W =
                      weight weight_scale; or weight_packed [out, in / P] and weight_scale [out, G]: W = (weight_packed
                      - 2^(bits - 1)) weight_scale

What a checkpoint says about quantizing activations and caches is left out: they stay in floating point.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import qsharp_jax.models.hf.files as files
from qsharp_jax.system.errors import UserError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs in an int32, from its lowest bits
_ALL = slice(None)
# Suffixes of tensors that belong to quantized activations and caches.
_OF_ACTIVATIONS = (".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale")
# (rows, columns), with start and stop -> that part of W, float32
Read = Callable[[slice, slice], np.ndarray]


def check(entries: Mapping[str, Any], path: Path) -> None:
    """Raise a UserError for a `quantization_config` of a config.json whose weights are not read."""
    method = entries.get("quant_method")
    reasons = {"gptq": _not_gptq, "awq": _not_awq, "fp8": _not_fp8, "compressed-tensors": _not_compressed}
    reason = reasons[method](entries) if method in reasons else f"quant_method {method!r}"
    if reason is not None:
        raise UserError(
            f"{path}: the weights are quantized with {reason}, which is not read, but only gptq (2, 4 or 8 bits), awq"
            " (gemm), fp8 and compressed-tensors (fp8, int8, packed) are; give the folder of the model before"
            " quantization"
        )


def _not_gptq(entries: Mapping[str, Any]) -> str | None:
    if entries.get("bits") not in (2, 4, 8):
        return f"gptq in {entries.get('bits')} bits"
    form = entries.get("checkpoint_format") or "gptq"
    return None if form in ("gptq", "gptq_v2") else f"gptq in the format {form!r}"


def _not_awq(entries: Mapping[str, Any]) -> str | None:
    if entries.get("bits", 4) != 4:
        return f"awq in {entries['bits']} bits"
    version = str(entries.get("version", "gemm")).lower()
    return None if version == "gemm" else f"awq in the version {version!r}"


def _not_fp8(entries: Mapping[str, Any]) -> str | None:
    form = entries.get("fmt") or "e4m3"
    return None if form == "e4m3" else f"fp8 in the format {form!r}"


def _not_compressed(entries: Mapping[str, Any]) -> str | None:
    form = entries.get("format")
    if form not in ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized"):
        return f"compressed-tensors in the format {form!r}"
    if (entries.get("sparsity_config") or {}).get("format", "dense") != "dense" or entries.get("transform_config"):
        return "compressed-tensors with sparse or transformed weights"
    for group in (entries.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("num_bits") not in (4, 8) or not weights.get("symmetric", True):
            return f"compressed-tensors in {weights.get('num_bits')} bits, or not symmetric"
    return None


class Tensors:
    """The tensors of a checkpoint with its quantized weights as float32 ones.

    Attributes:
      shapes, stored, readable: as in `files.Tensors`.

    Raises:
      UserError: for quantized weights without their scales.
    """

    readable = files.Tensors.readable

    def __init__(self, base: files.Tensors, entries: Mapping[str, Any], folder: Path):
        """Read no tensors yet; `entries` passed `check`."""
        self._base, method = base, entries["quant_method"]
        self._read: dict[str, Read] = {}
        self.shapes, self.stored = dict(base.shapes), dict(base.stored)
        for marker in (name for name in base.shapes if name.endswith(_MARKERS[method])):
            module = marker.rpartition(".")[0]
            try:
                shape, read = _WAYS[method](base, module, entries)
            except KeyError as error:
                raise UserError(f"{folder} lacks the tensor {error} of a quantized weight; download it again") from None
            for name in [name for name in self.shapes if name.rpartition(".")[0] == module and name[-5:] != ".bias"]:
                del self.shapes[name], self.stored[name]
            weight = f"{module}.weight"
            self._read[weight], self.shapes[weight], self.stored[weight] = read, shape, "F32"
        for name in [name for name in self.shapes if name.endswith(_OF_ACTIVATIONS)]:
            del self.shapes[name], self.stored[name]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read a slice of a tensor, of a quantized weight in float32."""
        if name not in self._read:
            return self._base.read(name, index)
        rows, columns = (
            slice(*part.indices(size)[:2]) for part, size in zip(index, self.shapes[name], strict=True)
        )
        return self._read[name](rows, columns)

    def is_zero_bias(self, name: str) -> bool:
        """Return true for a bias of zeros beside a quantized weight: AutoGPTQ writes one for every module."""
        module, _, suffix = name.rpartition(".")
        is_bias = suffix == "bias" and f"{module}.weight" in self._read and len(self.shapes[name]) == 1
        return is_bias and self.stored[name] in self.readable and not self._base.read(name, (_ALL,)).any()


# --- The ways -------------------------------------------------------------------------------------------------------


def _gptq(base: files.Tensors, module: str, entries: Mapping[str, Any]) -> tuple[tuple[int, int], Read]:
    bits = entries["bits"]
    packed, out = base.shapes[f"{module}.qweight"]
    width = packed * (32 // bits)
    added = 0 if entries.get("checkpoint_format") == "gptq_v2" else 1

    def read(rows: slice, columns: slice) -> np.ndarray:
        weight = _unpacked(base, f"{module}.qweight", (columns, rows), 0, bits)
        zeros, scales = _zeros_and_scales(base, module, rows, bits)
        groups = _groups(base, f"{module}.g_idx", columns, width // len(scales))
        return ((weight - (zeros + added)[groups]) * scales[groups]).T

    return (out, width), read


def _awq(base: files.Tensors, module: str, entries: Mapping[str, Any]) -> tuple[tuple[int, int], Read]:
    width, out = base.shapes[f"{module}.qweight"][0], base.shapes[f"{module}.scales"][1]

    def read(rows: slice, columns: slice) -> np.ndarray:
        weight = _unpacked(base, f"{module}.qweight", (columns, rows), 1, 4, AWQ_ORDER)
        zeros, scales = _zeros_and_scales(base, module, rows, 4, AWQ_ORDER)
        groups = np.arange(columns.start, columns.stop) // (width // len(scales))
        return ((weight - zeros[groups]) * scales[groups]).T

    return (out, width), read


def _fp8(base: files.Tensors, module: str, entries: Mapping[str, Any]) -> tuple[tuple[int, int], Read]:
    return _scaled(base, module, "weight_scale_inv", entries.get("weight_block_size"))


def _compressed(base: files.Tensors, module: str, entries: Mapping[str, Any]) -> tuple[tuple[int, int], Read]:
    if f"{module}.weight_packed" not in base.shapes:
        blocks = [group["weights"].get("block_structure") for group in entries["config_groups"].values()]
        return _scaled(base, module, "weight_scale", next(filter(None, blocks), None))
    bits = next(group["weights"]["num_bits"] for group in entries["config_groups"].values())
    out, packed = base.shapes[f"{module}.weight_packed"]
    width = packed * (32 // bits)

    def read(rows: slice, columns: slice) -> np.ndarray:
        weight = _unpacked(base, f"{module}.weight_packed", (rows, columns), 1, bits) - 2 ** (bits - 1)
        scales = base.read(f"{module}.weight_scale", (rows, _ALL)).astype(np.float32)
        groups = _groups(base, f"{module}.weight_g_idx", columns, width // scales.shape[1])
        return weight * scales[:, groups]

    return (out, width), read


_WAYS = {"gptq": _gptq, "awq": _awq, "fp8": _fp8, "compressed-tensors": _compressed}
# The suffix of the tensor that only quantized modules have.
_MARKERS = {"gptq": ".qweight", "awq": ".qweight", "fp8": ".weight_scale_inv", "compressed-tensors": ".weight_scale"}


def _scaled(
    base: files.Tensors, module: str, scale: str, block: Sequence[int] | None
) -> tuple[tuple[int, int], Read]:
    """A weight that is multiplied by one scale, by one for each output, or by one for each block [rows, columns]."""
    shape = base.shapes[f"{module}.weight"]

    @functools.cache
    def scales() -> np.ndarray:
        stored = base.shapes[f"{module}.{scale}"]
        whole = base.read(f"{module}.{scale}", (_ALL,) * len(stored)).astype(np.float32)
        return whole if whole.ndim == 2 else whole.reshape(-1, 1)

    def read(rows: slice, columns: slice) -> np.ndarray:
        places = []
        for part, size, count, number in zip((rows, columns), shape, scales().shape, block or shape, strict=True):
            length = 1 if count == size else size if count == 1 else number
            places.append(np.arange(part.start, part.stop) // length)
        weight = base.read(f"{module}.weight", (rows, columns)).astype(np.float32)
        return weight * scales()[np.ix_(*places)]

    return (shape[0], shape[1]), read


def _zeros_and_scales(
    base: files.Tensors, module: str, outputs: slice, bits: int, order: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers and float32 numbers [G, outputs]."""
    groups = slice(0, base.shapes[f"{module}.qzeros"][0])
    zeros = _unpacked(base, f"{module}.qzeros", (groups, outputs), 1, bits, order)
    return zeros, base.read(f"{module}.scales", (groups, outputs)).astype(np.float32)


def _groups(base: files.Tensors, name: str, inputs: slice, size: int) -> np.ndarray:
    """The group of each input: as listed in the tensor of this name, else groups of one size."""
    if name in base.shapes:
        return base.read(name, (inputs,))
    return np.arange(inputs.start, inputs.stop) // size


def _unpacked(
    base: files.Tensors,
    name: str,
    index: tuple[slice, slice],
    axis: int,
    bits: int,
    order: Sequence[int] | None = None,
) -> np.ndarray:
    """Read a slice of whole numbers, several of which are in an int32 along an axis, as float32.

    Args:
      order: of those in an int32, from its lowest bits; by default as along the axis.
    """
    each, part = 32 // bits, index[axis]
    around = slice(part.start // each, -(-part.stop // each))
    packed = base.read(name, (around, index[1]) if axis == 0 else (index[0], around))
    shifts = bits * np.argsort(range(each) if order is None else order)
    values = np.expand_dims(packed, axis + 1) >> (shifts[:, None] if axis == 0 else shifts)
    shape = (-1, packed.shape[1]) if axis == 0 else (packed.shape[0], -1)
    values = (values & (2**bits - 1)).reshape(shape).astype(np.float32)
    first = part.start - around.start * each
    return values.take(range(first, first + part.stop - part.start), axis)
