"""SIGTERM, which clouds send some seconds before they take a machine away, ends the process with exit code 0.

Normally at once, since a workdir's files are always whole or absent. Code that has something to save runs inside
`deferred`, checks `requested` regularly, saves, and raises `Stopped`. Ctrl-C (SIGINT) does the same there, with exit
code 130; elsewhere it raises KeyboardInterrupt as usual.

Senders repeat themselves: `timeout` signals its child and then the child's group, SLURM a preempted job and then one
whose grace time is over. Signals within `REPEATED` seconds of the first are the same request; a later one ends the
process without saving, and says what is lost. Signals belong to the process, and so does the state here.
"""

import contextlib
import dataclasses
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from qsharp_jax.system import children
from qsharp_jax.system.errors import Stopped

REPEATED = 5.0  # seconds
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclasses.dataclass
class _State:
    """The first signal, and how the main thread handles it."""

    number: int = 0  # the first signal; 0 before it
    since: float = 0.0  # when it came, in seconds of a monotonic clock
    deferred: bool = False  # the first signal is only noted
    raising: bool = False  # where deferred, the first signal nevertheless raises `Stopped` in the main thread
    raised: bool = False  # the main thread is exiting, and no other signal raises anything
    raised_by: int = 0  # the signal that made it exit, which the main thread may see before `number` is set
    unsaved: str = ""  # what is lost if the process ends now


_state = _State()


def leave(code: int, sentence: str) -> None:
    """End this process and its workers at once, even if its main thread waits forever for a process or a device."""
    try:
        sys.stdout.flush()
        print(f"qsharp: {sentence}", file=sys.stderr, flush=True)
    finally:  # the reader of the output may be gone
        children.exit_now(code)


@dataclasses.dataclass(frozen=True)
class Peers:
    """Functions that `end` all processes of a run, with an exit code and a message, or `stop` the others by SIGTERM.

    By default this process is the only one.
    """

    end: Callable[[int, str], None] = leave
    stop: Callable[[], None] = lambda: None


@contextlib.contextmanager
def sigterm_ends(end: Callable[[], None], peers: Peers = Peers()) -> Iterator[None]:
    """Call `end`, which must end the process (see `leave`), at a SIGTERM inside the block that is not `deferred`.

    A thread waits for the signal: Python's own handlers wait until the main thread returns from the device, which may
    take longer than the cloud waits. For the main thread only. After a signal the handlers stay when the block ends:
    the process is about to exit, and a repeated signal must not change its exit code.
    """
    reader, writer = socket.socketpair()  # not pipes, which cannot be a signal's wakeup on Windows
    writer.setblocking(False)
    _reset()
    # Shells start background jobs with SIGINT ignored; it stays ignored.
    taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, _raise_where_allowed) for number in taken}
    wakeup = signal.set_wakeup_fd(writer.fileno())
    threading.Thread(target=_wait, args=(reader, end, peers), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        if not requested():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        writer.close()  # ends the thread


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Let `deferred` code save at a Ctrl-C inside the block; the process goes on after it, as a notebook's does.

    A Ctrl-C more than `REPEATED` seconds after the first is raised at once. Outside the main thread, which alone gets
    signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _reset()
    handler = signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        _reset()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Only note SIGTERM and Ctrl-C inside the block, for `requested`; raises `Stopped` at its end if there was one."""
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred, _state.unsaved = False, ""
        _state.raised = _state.raised or requested()
    if requested():
        raise Stopped


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Stopped` at SIGTERM and Ctrl-C in this part of a `deferred` block.

    Several processes do not, since the others would wait for the one that stops.
    """
    import jax  # not above: the command line imports this file

    if jax.process_count() > 1:
        yield
        return
    _state.raising = True
    try:
        if requested():
            raise Stopped
        yield
    finally:
        _state.raising = False


def requested() -> bool:
    """Return true after a SIGTERM or a Ctrl-C."""
    return _state.number > 0


def by_ctrl_c() -> bool:
    """Return true if the first signal was a Ctrl-C."""
    return (_state.number or _state.raised_by) == signal.SIGINT


def unsaved(what: str) -> None:
    """Set what is lost if the process ends now; inside `deferred`."""
    _state.unsaved = what


def _reset() -> None:
    for field in dataclasses.fields(_State):
        setattr(_state, field.name, field.default)


def _raise_where_allowed(number: int, frame: FrameType | None) -> None:
    """Handle a signal in the main thread, once it returns from the device."""
    allowed = _state.raising if _state.deferred else number == signal.SIGINT
    if allowed and not _state.raised:
        _state.raised, _state.raised_by = True, number
        raise Stopped if _state.deferred else KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    """Handle a Ctrl-C of `interrupts`."""
    now = time.monotonic()
    if not _state.deferred or (requested() and now - _state.since > REPEATED):
        raise KeyboardInterrupt
    if not requested():
        _state.since, _state.number = now, number
        print("\nqsharp: interrupted; saving before the end", file=sys.stderr, flush=True)
    _raise_where_allowed(number, frame)


def _wait(reader: socket.socket, end: Callable[[], None], peers: Peers) -> None:
    with reader:
        while number := reader.recv(1):
            if number[0] in SIGNALS:
                _receive(number[0], time.monotonic(), end, peers)


def _receive(number: int, now: float, end: Callable[[], None], peers: Peers) -> None:
    """Act on a signal received at `now`, in seconds of a monotonic clock."""
    if not requested():
        _state.since, _state.number = now, number
        # The main thread may have raised `Stopped` in a `deferred` block, saved and left it before this thread runs.
        if _state.deferred or _state.raised_by == signal.SIGTERM:
            if number == signal.SIGINT:
                print("\nqsharp: interrupted; saving before the end", file=sys.stderr, flush=True)
            peers.stop()
        elif number == signal.SIGTERM:
            end()
    elif (seconds := now - _state.since) > REPEATED:
        lost = _state.unsaved or "what is not written yet"
        name = signal.Signals(number).name
        peers.end(128 + number, f"{name} again, {seconds:.0f} s after the first: ends at once and gives up {lost}")
