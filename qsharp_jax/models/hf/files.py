"""Safetensors files of a folder: read slice by slice, written tensor by tensor. Knows nothing about models.

The format: 8 bytes with the header's length, the header in JSON (name -> dtype, shape, offsets), the tensors' bytes.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from qsharp_jax.system.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype("float32"), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("float16")}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


class Tensors(contextlib.AbstractContextManager):
    """The tensors of a checkpoint's folder, one file or several.

    Attributes:
      shapes: of every tensor, by name.
      stored: dtype of every tensor as the format names it, such as "BF16".
    """

    def __init__(self, folder: Path):
        """Reads the headers only.

        Raises:
          UserError: for a missing, damaged or truncated file, and for weights that are not safetensors.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.stored: dict[str, str] = {}
        self._places: dict[
            str, tuple[BinaryIO, int]
        ] = {}  # the open file that holds a tensor, and its first byte there
        with contextlib.ExitStack() as files:  # closed again if any of them cannot be read
            for path in _paths(folder):
                self._add(path, files)
            self._files = files.pop_all()

    def __exit__(self, *_) -> None:
        self._files.close()

    def _add(self, path: Path, files: contextlib.ExitStack) -> None:
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
        """A slice of a tensor of one or two axes, in the dtype of the file; only its bytes are read.

        The bytes are copied from the file: the pages of a file that is mapped would count as this process's memory, and
        the library's own reading without a map (0.8) reads the whole tensor for each slice.
        """
        file, place = self._places[name]
        shape, dtype = self.shapes[name], DTYPES[self.stored[name]]
        (row, stop), *others = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        first, last = others[0] if others else (0, 1)
        width = shape[1] if others else 1
        out = np.empty((stop - row, last - first), dtype)
        if last - first == width:
            pieces = [(out, row * width)]
        else:
            pieces = [(out[i], (row + i) * width + first) for i in range(len(out))]
        for piece, start in pieces:
            done = os.preadv(file.fileno(), [piece.view(np.uint8)], place + start * dtype.itemsize)
            if done != piece.nbytes:
                raise UserError(
                    f"{file.name} ended in the middle of {name}, though it was whole before; download it again"
                )
        return out if others else out[:, 0]


def _paths(folder: Path) -> list[Path]:
    """The folder's weight files, all there."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run any program when it is read;"
                " convert it on a machine where you trust it: load it with transformers and save it with"
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
            f"{folder} lacks {missing[0]}, one of {len(missing)} missing of {len(names)} files of weights; download"
            " what is missing"
        )
    return [folder / name for name in names]


# A tensor to be written: name, dtype, shape, and what makes its values, called once, when its turn comes.
Tensor = tuple[str, np.dtype, tuple[int, ...], Callable[[], np.ndarray]]


def write(folder: Path, tensors: Sequence[Tensor], largest_file: int) -> list[str]:
    """Writes tensors into one file, or into shards with an index, holding one tensor in memory at a time.

    Args:
      folder: where there are none of these files yet.
      tensors: in the order in which they are to be stored.
      largest_file: bytes of tensors that one file may hold (one tensor may be larger).

    Returns:
      The names of the files.
    """
    shards: list[list[Tensor]] = [[]]
    filled = total = 0
    for tensor in tensors:
        size = _size(tensor)
        if shards[-1] and filled + size > largest_file:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + size, total + size
    if len(shards) == 1:
        _write_file(folder / SINGLE, tensors)
        return [SINGLE]
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard)
    weight_map = {tensor[0]: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [*names, INDEX]


def _size(tensor: Tensor) -> int:
    _, dtype, shape, _ = tensor
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


def _write_file(path: Path, tensors: Sequence[Tensor]) -> None:
    tensors = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)  # so that each starts at a multiple of its width
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for tensor in tensors:
        start, end = end, end + _size(tensor)
        name, dtype, shape, _ = tensor
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with open(path, "wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for name, dtype, shape, make in tensors:
            values = np.ascontiguousarray(make())
            if (values.dtype, values.shape) != (dtype, shape):
                raise ValueError(f"{name} is {values.dtype}{values.shape}; {dtype}{shape} was announced")
            file.write(values.view(np.uint8).data if values.ndim else values.tobytes())
        file.flush()
        os.fsync(file.fileno())
