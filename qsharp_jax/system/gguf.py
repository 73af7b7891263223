"""The header of a GGUF file: its metadata, and where each tensor lies.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. (The reader of the package `gguf` makes an array
of each token of the vocabulary: some ten seconds for 150,000 of them.)
"""

import dataclasses
import functools
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsharp_jax.system.errors import UserError

SUFFIX = ".gguf"
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Attributes:
      shape: as NumPy has it, rows first.
      type: GGML's number of its type.
      start: its first byte in the file.
    """

    shape: tuple[int, ...]
    type: int
    start: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The metadata by their keys, and the tensors by their names."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]


def find(model: str | Path) -> Path | None:
    """The GGUF file of a model: the path itself, or the one in a folder without safetensors; None if there is none.

    Raises:
      UserError: for a folder with several.
    """
    model = Path(model)
    if model.suffix == SUFFIX and not model.is_dir():
        return model
    files = sorted(model.glob(f"*{SUFFIX}"))
    if not files or any((model / name).exists() for name in _SAFETENSORS):
        return None
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise UserError(f"{model} has {len(files)} GGUF files ({names}); give the path of one of them")
    return files[0]


def read(path: Path) -> Header:
    """Read a file's header; again only if the file has changed.

    Raises:
      UserError: if there is no such file, it is damaged or truncated, or it is one part of several.
    """
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give the path of a GGUF file, or the folder of a model") from None
    return _read(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(path: Path, size: int, mtime_ns: int) -> Header:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            header = _Cursor(content).header()
        parts = int(header.metadata.get("split.count", 1))
    except (ValueError, TypeError, ArithmeticError, MemoryError, struct.error) as error:
        raise UserError(f"{path} is damaged or truncated ({error}); download it again") from None
    if parts > 1:
        raise UserError(
            f"{path} is one of {parts} parts of a model; join them with llama.cpp's `llama-gguf-split --merge` first"
        )
    return header


class _Cursor:
    """A position in the file's bytes, which each value that is read moves on."""

    def __init__(self, content: mmap.mmap):
        self._content = content
        self._position = 0

    def header(self) -> Header:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin as a GGUF file")
        version, tensors, entries = self._numbers("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, and {' and '.join(map(str, _VERSIONS))} can be read")
        metadata = {self._string(): self._value(*self._numbers("I")) for _ in range(entries)}
        places = [(self._string(), self._place()) for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        first = -(-self._position // alignment) * alignment
        return Header(metadata, {name: dataclasses.replace(entry, start=first + entry.start) for name, entry in places})

    def _place(self) -> Entry:
        (axes,) = self._numbers("I")
        if not 1 <= axes <= 4:
            raise ValueError(f"a tensor has {axes} axes")
        shape = self._numbers(f"{axes}Q")[::-1]  # stored with the axis that changes fastest first
        kind, start = self._numbers("IQ")
        return Entry(shape, kind, start)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            of, length = self._numbers("IQ")
            if of == _STRING:
                return [self._string() for _ in range(length)]
            if of in _NUMBERS:
                return self._numbers(f"{length}{_NUMBERS[of]}")
            raise ValueError(f"an array has elements of the type {of}")
        if kind not in _NUMBERS:
            raise ValueError(f"a value has the unknown type {kind}")
        return self._numbers(_NUMBERS[kind])[0]

    def _string(self) -> str:
        return self._bytes(*self._numbers("Q")).decode("utf-8")

    def _numbers(self, form: str) -> tuple:
        numbers = struct.Struct(f"<{form}")
        self._position += numbers.size
        return numbers.unpack_from(self._content, self._position - numbers.size)

    def _bytes(self, length: int) -> bytes:
        start, self._position = self._position, self._position + length
        if self._position > len(self._content):
            raise ValueError(f"it ends at byte {len(self._content)}, within its header")
        return self._content[start : self._position]
