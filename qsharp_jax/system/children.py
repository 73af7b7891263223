"""Child processes that may hang, and the end of this process without them."""

import contextlib
import os
import signal
import subprocess
import threading
from typing import NoReturn

_running: set[subprocess.Popen] = set()
_lock = threading.Lock()


def register(process: subprocess.Popen) -> None:
    """Let `exit_now` kill a process, which must have been started with `start_new_session`, until `kill` does."""
    with _lock:
        _running.add(process)


def kill(process: subprocess.Popen) -> None:
    """End a registered process and those that it has started, and wait for it."""
    with _lock:
        _running.discard(process)
        _kill(process)
    process.wait()


def exit_now(code: int) -> NoReturn:
    """End this process at once, whatever its threads wait for, and before it the processes that are registered.

    The lock stays taken. Else a thread that has lost its worker could go on for a moment, take it for one that failed,
    and write that down.
    """
    try:
        _lock.acquire()
        for process in _running:
            _kill(process)
    finally:
        os._exit(code)


def _kill(process: subprocess.Popen) -> None:
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
