"""Files on this machine and objects in a bucket (gs://...), written so that a kill loses nothing that existed.

On a disk a file is written under another name, synced and renamed, or grows by appending. An object is written whole or
not at all, and cannot be appended to or renamed: to grow, it is written again.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qsharp_jax.system.errors import UserError, first_line

LATEST = 120.0  # seconds after which a file must be seen that another machine has written

# --- Paths ----------------------------------------------------------------------------------------------------------


def make_path(text: str | Path) -> Path:
    """Return a `Path`, in which ~ is the user's folder, or for gs://BUCKET/FOLDER an `etils.epath.Path`, which has the
    same methods.

    Raises:
      UserError: for another URL, or for a bucket if gcsfs is not installed.
    """
    if not is_remote(text):
        return Path(os.path.expanduser(text))
    if not str(text).startswith("gs://"):
        raise UserError(f"{text} is neither a folder nor of the form gs://BUCKET/FOLDER; give one of these")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f'{text} needs the package gcsfs; install it by `pip install "qsharp_jax[gcs]"`')

    import fsspec
    from etils import epath

    # TensorStore writes checkpoints without gcsfs, whose cached listings would be out of date.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(str(text))


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def absolute(path: Path) -> Path:
    return path if is_remote(path) else path.absolute()


def is_file(path: Path) -> bool:
    """Return true if a file or an object exists; raises a UserError if a bucket cannot be reached."""
    if not is_remote(path):
        return path.is_file()
    try:
        store(path).info(str(path))
        return True
    except FileNotFoundError:
        return False
    except Exception as error:  # from Google's libraries, aiohttp, or an OSError
        raise UserError(
            f"{path} cannot be reached ({first_line(error)}); check the bucket's name, and log in by `gcloud auth"
            " application-default login`"
        ) from error


def wait_for(path: Path) -> None:
    """Return once a file that another process has written is seen here.

    A network file system may show it late: NFS trusts for up to a minute that a file is not there.

    Raises:
      UserError: if it is not there after `LATEST` seconds.
    """
    began = time.monotonic()
    while not is_file(path):
        if time.monotonic() - began > LATEST:
            raise UserError(
                f"{path}, which another process has written, is not seen on this machine after {LATEST:g} seconds; give"
                " a folder that all machines share"
            )
        time.sleep(0.2)


def store(path: Path) -> Any:
    """Return the fsspec file system of a path in a bucket, for operations that `epath` lacks."""
    import fsspec

    return fsspec.core.url_to_fs(str(path))[0]


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Add this name to an OSError inside that names no file, such as one from a write to an open file."""
    try:
        yield
    except OSError as e:
        if e.filename is None:
            e.filename = str(path)
        raise


# --- Whole files ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file to write, whose whole content is at `path` after the block, and none of it before.

    A reader sees the old or the new content, also after a kill. An OSError names the file, and leaves nothing behind.
    """
    if is_remote(path):
        content = io.BytesIO()
        yield content
        store(path).pipe_file(str(path), content.getvalue())
        return
    if path.exists() and not path.is_file():  # a device or a pipe, such as /dev/stdout, must not be replaced
        with named(path), open(path, "wb") as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, OSError):
            e.filename = str(path)
        raise


def write_atomic(path: str | Path, text: str) -> None:
    """Write a text, whole or not at all; see `writing`."""
    with writing(make_path(path)) as file:
        file.write(text.encode())


def read_text(path: Path) -> str:
    return path.read_bytes().decode()


@contextlib.contextmanager
def folder_of_this_machine(path: Path) -> Iterator[Path]:
    """Yield `path`, or for a bucket a temporary folder that is uploaded at the end, for libraries that write files."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                target = path / file.relative_to(folder).as_posix()
                store(path).pipe_file(str(target), file.read_bytes())


def rename_folder(path: Path, target: Path) -> None:
    """Move a folder to a sibling; in a bucket object by object, without downloading them."""
    if is_remote(path):
        store(path).mv(str(path), str(target), recursive=True)
    else:
        path.rename(target)


def remove_folder(path: Path) -> None:
    """Remove a folder and its content, if it exists."""
    if not path.exists():
        return
    if is_remote(path):
        store(path).rm(str(path), recursive=True)
    else:
        shutil.rmtree(path)


# --- Files that grow ------------------------------------------------------------------------------------------------


class Growing:
    """A file that one writer appends to.

    An object is written whole each time, which suits data of a few MB that comes every few seconds.
    """

    def __init__(self, path: Path):
        self._path = path
        self._content: bytes | None = None  # of an object

    def append(self, data: bytes) -> None:
        """Append to the file, creating it and its folder if needed; an OSError names the file."""
        if is_remote(self._path):
            if self._content is None:
                self._content = self._path.read_bytes() if is_file(self._path) else b""
            self._content += data
            store(self._path).pipe_file(str(self._path), self._content)
            return
        with named(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab") as file:
                file.write(data)

    def append_line(self, line: str) -> None:
        """Append a line, after removing a half line that a kill left at the end of the file."""
        if not is_remote(self._path) and self._path.exists():
            with named(self._path), open(self._path, "a+b") as file:
                _cut_half_line(file)
        self.append(line.encode() + b"\n")


def whole_lines(data: bytes) -> bytes:
    """Return the data without the half line that a kill may have left at the end."""
    return data[: data.rfind(b"\n") + 1]


def _cut_half_line(file: BinaryIO) -> None:
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":  # only then is the whole file read
        file.seek(0)
        file.truncate(len(whole_lines(file.read())))
