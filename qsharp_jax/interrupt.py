"""SIGTERM, which clouds send some seconds before they take a machine away: the process ends with exit code 0.

At once, as a rule: a workdir's files are whole or absent at any moment. Whoever has something to save does its work
inside `deferred`, asks `requested` now and then, saves, and raises `Stopped`. A second SIGTERM ends the process in any
case. Signals are the process's, and so is the state here.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from qsharp_jax.errors import Stopped

_told, _deferred, _raising = threading.Event(), threading.Event(), threading.Event()


@contextlib.contextmanager
def sigterm_ends(end: Callable[[], None]) -> Iterator[None]:
    """From here on SIGTERM calls `end`, which has to end the process (see `leave`), but where it is `deferred`.

    A thread waits for it: Python's own handlers wait until the main thread comes back from the device, which may take
    longer than the cloud does. For the main thread alone.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handler = signal.signal(signal.SIGTERM, _raise_where_allowed)
    wakeup = signal.set_wakeup_fd(writer)
    threading.Thread(target=_wait, args=(reader, end), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        os.close(writer)  # which ends the thread
        _told.clear()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While this is entered, SIGTERM is only noted, for `requested`.

    Raises:
      Stopped: at the end, if there was one and nobody asked.
    """
    _deferred.set()
    try:
        yield
    finally:
        _deferred.clear()
    if _told.is_set():
        raise Stopped


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside `deferred`: SIGTERM raises `Stopped` here, as Ctrl-C does KeyboardInterrupt.

    Not in one of several processes: the others would wait for it.
    """
    import jax  # not above: the command line imports this file

    if jax.process_count() > 1:
        yield
        return
    _raising.set()
    try:
        if _told.is_set():
            raise Stopped
        yield
    finally:
        _raising.clear()


def requested() -> bool:
    """Whether there was a SIGTERM."""
    return _told.is_set()


def leave(code: int, sentence: str) -> None:
    """Ends this process at once, though its main thread may wait for another process, or a device, for ever."""
    sys.stdout.flush()
    print(f"qsharp: {sentence}", file=sys.stderr, flush=True)
    os._exit(code)


def _raise_where_allowed(number: int, frame: FrameType | None) -> None:
    if _raising.is_set():
        raise Stopped


def _wait(reader: int, end: Callable[[], None]) -> None:
    with open(reader, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] != signal.SIGTERM:
                continue
            if _told.is_set():
                os._exit(128 + signal.SIGTERM)
            _told.set()
            if not _deferred.is_set():
                end()
