"""The error that is the user's to mend, the hint that goes with it, and the end that is asked for.

It knows nothing of any file, config or model.
"""

import difflib
import sys
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: a bad config, a missing file, a damaged shard.

    The message is one sentence that says what was wrong, where, and what to do; the command line prints it without
    a traceback and exits with code 2.
    """


class Stopped(Exception):
    """The process was told to end, and what was worth keeping is saved; the same command goes on from there."""


def warn(sentence: str) -> None:
    """Print one line to standard error about something that goes on, but that the user should know."""
    print(f"qsharp: {sentence}", file=sys.stderr)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "did you mean 'eta'?", or all that is known if nothing is near."""
    known = sorted(known)
    # A dotted name may be right but for its section.
    last = name.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == last] or difflib.get_close_matches(name, known)
    if near:
        return f"did you mean {' or '.join(map(repr, near[:3]))}?"
    return f"known: {', '.join(known)}"
