"""How files are written so that a kill, or a full disk, loses nothing that was there. It knows nothing of runs."""

import os
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: str | Path, text: str) -> None:
    """Writes the whole file or nothing: a reader, or a kill at any moment, meets the old text or the new one.

    Raises OSError, with the file's name, if it cannot be written; nothing is left behind then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, OSError):
            e.filename = str(path)
        raise


def append(path: Path, data: bytes) -> None:
    """Adds to the end of a file, which is made with its folder if it is new.

    Raises OSError, with the file's name, if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(data)
    except OSError as e:
        e.filename = str(path)
        raise


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file of lines; half a line that a kill left at the end is cut off first.

    Raises OSError, with the file's name, if it cannot be written.
    """
    try:
        with open(path, "a+b") as file:
            _cut_half_line(file)
            file.write(line.encode() + b"\n")
    except OSError as e:
        e.filename = str(path)
        raise


def whole_lines(data: bytes) -> bytes:
    """Without the half line that a kill may have left at the end."""
    return data[: data.rfind(b"\n") + 1]


def _cut_half_line(file: BinaryIO) -> None:
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":  # only then is the file read whole
        file.seek(0)
        file.truncate(len(whole_lines(file.read())))
