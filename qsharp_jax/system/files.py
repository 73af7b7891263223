"""Files of this machine and objects of a bucket (gs://...), written so that a kill loses nothing that was there.

On a disk a file is made whole under another name, synced and renamed, and grows by appending. An object is there whole
or not at all, and cannot be appended to or renamed: it grows by being written anew. It knows nothing of runs.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qsharp_jax.system.errors import UserError

# ---------------------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------------------


def make_path(text: str | Path) -> Path:
    """A `Path` of this machine, or for gs://BUCKET/FOLDER an `etils.epath.Path`, which has the same methods.

    Raises UserError for another URL, or a bucket's where gcsfs is not installed.
    """
    if not is_remote(text):
        return Path(text)
    if not str(text).startswith("gs://"):
        raise UserError(f"{text} is neither a folder nor of the form gs://BUCKET/FOLDER; give one of these")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f'{text} needs the package gcsfs; install it by `pip install "qsharp_jax[gcs]"`')

    import fsspec
    from etils import epath

    # TensorStore writes checkpoints behind its back: what gcsfs remembers of a folder would be out of date.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(str(text))


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def absolute(path: Path) -> Path:
    return path if is_remote(path) else path.absolute()


def is_file(path: Path) -> bool:
    """Raises UserError if the path is a bucket's, and that cannot be reached."""
    if not is_remote(path):
        return path.is_file()
    try:
        store(path).info(str(path))
        return True
    except FileNotFoundError:
        return False
    except Exception as error:  # of Google's libraries, aiohttp, or an OSError
        words = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{path} cannot be reached ({words}); check the bucket's name, and log in by `gcloud auth"
            " application-default login`"
        ) from error


def store(path: Path) -> Any:
    """The fsspec file system of a bucket's path, for what `epath` has no name for."""
    import fsspec

    return fsspec.core.url_to_fs(str(path))[0]


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """An OSError inside that names no file, as that of a write to an open one, gets this name."""
    try:
        yield
    except OSError as e:
        if e.filename is None:
            e.filename = str(path)
        raise


# ---------------------------------------------------------------------------------------------------------------
# Whole files
# ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write to, whose content is at `path` at the end of the `with`: all of it, or nothing of it.

    A reader, or a kill at any moment, meets the old content or the new one. Raises OSError, with the file's name, if
    it cannot be written; nothing is left behind then.
    """
    if is_remote(path):
        content = io.BytesIO()
        yield content
        store(path).pipe_file(str(path), content.getvalue())
        return
    if path.exists() and not path.is_file():  # a device or a pipe, as /dev/stdout, which a file is not to replace
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
    """Writes a text as `writing` does."""
    with writing(make_path(path)) as file:
        file.write(text.encode())


def read_text(path: Path) -> str:
    return path.read_bytes().decode()


@contextlib.contextmanager
def folder_of_this_machine(path: Path) -> Iterator[Path]:
    """For libraries that write files by themselves: `path`, or a stand-in whose files are in the bucket at the end."""
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
    """Moves a folder beside itself; in a bucket object by object, without their coming here."""
    if is_remote(path):
        store(path).mv(str(path), str(target), recursive=True)
    else:
        path.rename(target)


def remove_folder(path: Path) -> None:
    """Removes a folder and everything in it, if it is there."""
    if not path.exists():
        return
    if is_remote(path):
        store(path).rm(str(path), recursive=True)
    else:
        shutil.rmtree(path)


# ---------------------------------------------------------------------------------------------------------------
# Files that grow
# ---------------------------------------------------------------------------------------------------------------


class Growing:
    """A file of one writer, that only grows.

    An object is written anew with everything in it each time: for what comes every few seconds and stays at some MB.
    """

    def __init__(self, path: Path):
        self._path = path
        self._held: bytes | None = None  # of an object

    def append(self, data: bytes) -> None:
        """Adds to the end; the file is made, with its folder, if it is new.

        Raises OSError, with the file's name, if it cannot be written.
        """
        if is_remote(self._path):
            if self._held is None:
                self._held = self._path.read_bytes() if is_file(self._path) else b""
            self._held += data
            store(self._path).pipe_file(str(self._path), self._held)
            return
        with named(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab") as file:
                file.write(data)

    def append_line(self, line: str) -> None:
        """Adds a line to lines; half a line that a kill left at the end of a file is cut off first."""
        if not is_remote(self._path) and self._path.exists():
            with named(self._path), open(self._path, "a+b") as file:
                _cut_half_line(file)
        self.append(line.encode() + b"\n")


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
