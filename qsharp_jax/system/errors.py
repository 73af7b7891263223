"""Errors that a user can fix, with messages that say how, and the end of a process that was told to stop."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


class UserError(Exception):
    """An error the user can fix: a bad config, a missing file, a damaged shard.

    The message is one sentence that says what is wrong, where, and what to do; the command line prints it without a
    traceback and exits with code 2.
    """


class Stopped(Exception):
    """The process was told to stop, and has saved its work; the same command resumes it."""


def warn(sentence: str) -> None:
    """Print one line to standard error about something that does not stop the command."""
    print(f"qsharp: {sentence}", file=sys.stderr)


def first_line(error: BaseException) -> str:
    """Return an error's first line, at most 200 characters, or the name of its type if it has no words."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: "did you mean 'eta'?", or a list of all known names."""
    known = sorted(known)
    # A dotted name may be right except for its section.
    stem = name.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == stem] or difflib.get_close_matches(name, known)
    if near:
        return f"did you mean {' or '.join(map(repr, near[:3]))}?"
    return f"known: {', '.join(known)}"


_OS_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "your disk quota is used up; free space and run the same command again",
    errno.EROFS: "the file system is read-only; give another {option}",
    errno.EACCES: "permission is denied; give another {option}, or change its permissions",
}


# "(os error 28)" and "[os_error_code='28']" in errors of `tokenizers` and TensorStore, which are not OSErrors.
_NUMBER_IN_TEXT = re.compile(r"os[ _]error(?:_code)?[ =]'?([0-9]+)")


def os_error_number(e: Exception) -> int | None:
    """Return the operating system's number for an error; None for other errors."""
    if isinstance(e, OSError):
        return e.errno
    match = _NUMBER_IN_TEXT.search(str(e))
    return int(match[1]) if match else None


def explain_os_error(e: Exception, paths: Sequence[tuple[str, str]] = ()) -> str | None:
    """Return the message for an error of the operating system that the user can fix; None for other errors.

    These are a full disk, a quota, a read-only or forbidden file, and any error on one of `paths`: pairs of an option
    and the path that the user gave it.
    """
    number, name, option = os_error_number(e), getattr(e, "filename", None), None
    if isinstance(name, str):
        option, name = _option(name, paths)
    words = _OS_ERRORS.get(number)
    if words is None and option is not None and number is not None:
        words = f"{os.strerror(number).lower()}; give another {{option}}"
    if words is None:
        return None
    words = words.format(option=option or "--workdir")
    return f"{name}: {words}" if name else words


def _option(name: str, paths: Sequence[tuple[str, str]]) -> tuple[str | None, str]:
    """Return the option whose path contains the file, and the file; or, if the file contains a path, that path."""
    file = Path(os.path.abspath(name))
    for option, path in paths:
        place = Path(os.path.abspath(path))
        if file.is_relative_to(place):
            return option, name
        if place.is_relative_to(file):
            return option, path
    return None, name
