"""Who may write in a workdir: one process at a time, on a disk by the kernel's lock, in a bucket by an object.

It knows nothing of what is written.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from qsharp_jax.system import files
from qsharp_jax.system.errors import UserError

HEARTBEAT = 15.0  # seconds between two signs of life of the holder of a bucket's lock
STALE = 75.0  # seconds without one, after which it may be taken over


class Lock(Protocol):
    def check(self) -> None:
        """Raises UserError if another process has taken it over."""

    def release(self) -> None:
        """Gives it back; twice does no harm."""


def take(path: Path) -> Lock:
    """The lock of the workdir `path`.

    Raises UserError, naming who has it, if it is another process's.
    """
    return _ObjectLock(path) if files.is_remote(path) else _FileLock(path)


def _in_use(path: Path, holder: str) -> UserError:
    return UserError(f"{path} is in use by {holder}; wait for it to end, stop it, or give another --workdir")


class _FileLock:
    """The kernel frees it when the process ends, however it ends."""

    def __init__(self, path: Path):
        self._file = open(path / "lock", "a+")
        try:
            with files.named(path / "lock"):  # not every file system has locks
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise _in_use(path, f"process {holder or 'unknown'}") from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def check(self) -> None:
        pass

    def release(self) -> None:
        if not self._file.closed:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # closing alone leaves it with any child that was forked meanwhile
            self._file.close()


class _ObjectLock:
    """Objects `lock/000001`, `lock/000002`, ...: the last is the holder's, and each is made only if it was absent.

    So two that want the lock at once never both get it. Its holder writes a new number into it every `HEARTBEAT`
    seconds, and at its end that it is free. One that was killed leaves it as it is: whoever wants it watches it, and
    takes the next once it did not change for `STALE` seconds of its own clock: clocks are not compared. A holder that
    was taken for dead, as when its network was gone for that long, finds that there is a later one, and stops.
    """

    def __init__(self, path: Path):
        self._path, self._folder, self._store = path, path / "lock", files.store(path)
        self._holder = f"process {os.getpid()} on {socket.gethostname()}"
        self._beat, self._lost, self._ended = 0, False, threading.Event()
        last = self._last()
        if last:
            self._wait_for(last)
        self._number = last + 1
        try:
            self._store.pipe_file(self._name(self._number), self._content(), mode="create")
        except FileExistsError:
            raise _in_use(path, "a process that was quicker") from None
        for number in self._numbers():
            if number < self._number:
                self._store.rm_file(self._name(number))
        self._thread = threading.Thread(target=self._give_signs_of_life, daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._lost:
            raise UserError(
                f"{self._path} was taken over by another process, since this one gave no sign of life for {STALE:g}"
                " seconds; let that one go on"
            )

    def release(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            if not self._lost:
                self._store.pipe_file(self._name(self._number), self._content(free=True))

    def _name(self, number: int) -> str:
        return str(self._folder / f"{number:06d}")

    def _numbers(self) -> list[int]:
        try:
            return sorted(int(name.rpartition("/")[2]) for name in self._store.ls(str(self._folder), detail=False))
        except FileNotFoundError:
            return []

    def _last(self) -> int:
        return max(self._numbers(), default=0)

    def _content(self, free: bool = False) -> bytes:
        return json.dumps({"holder": self._holder, "beat": self._beat, "free": free}).encode()

    def _wait_for(self, number: int) -> None:
        """Returns if the lock is free or its holder dead; raises UserError if it lives."""
        seen, began = self._store.cat_file(self._name(number)), time.monotonic()
        held = json.loads(seen)
        if held["free"]:
            return
        print(f"{self._path} is held by {held['holder']}: waiting {STALE:g} s for a sign of life", file=sys.stderr)
        while time.monotonic() - began < STALE:
            time.sleep(HEARTBEAT / 5)
            now = self._store.cat_file(self._name(number))
            if json.loads(now)["free"]:
                return
            if now != seen:
                raise _in_use(self._path, held["holder"])

    def _give_signs_of_life(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            try:
                if self._last() != self._number:
                    self._lost = True
                    return
                self._beat += 1
                self._store.pipe_file(self._name(self._number), self._content())
            except Exception:  # the network: the next sign may get through
                continue
