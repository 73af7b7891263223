"""Locks: one process at a time writes in a workdir, by the kernel's file lock on a disk, by an object in a bucket."""

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, Protocol

from qsharp_jax.system import files
from qsharp_jax.system.errors import UserError, warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HEARTBEAT = 15.0  # seconds between heartbeats of the holder of a bucket's lock
STALE = 75.0  # seconds without a heartbeat, after which the lock may be taken over


class Lock(Protocol):
    def check(self) -> None:
        """Raise a UserError if another process has taken it over."""

    def release(self) -> None:
        """Release it; a second call does nothing."""


def take(path: Path) -> Lock:
    """Take the lock of the workdir `path`; raises a UserError that names the holder, if another process has it."""
    return _ObjectLock(path) if files.is_remote(path) else _FileLock(path)


def lock_file(file: IO) -> bool:
    """Lock an open file until it is closed or the process ends; False if another process has locked it.

    Without `fcntl` (Windows) nothing is locked, and a warning is printed. A file system without locks is an OSError.
    """
    if fcntl is None:
        warn(f"{file.name} cannot be locked on this system; make sure that no other process writes there")
        return True
    try:
        with files.named(file.name):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _in_use(path: Path, holder: str) -> UserError:
    return UserError(f"{path} is in use by {holder}; wait for it to end, stop it, or give another --workdir")


class _FileLock:
    """The locked file `lock`, which contains the holder's pid; the kernel unlocks it when the process ends."""

    def __init__(self, path: Path):
        self._file = open(path / "lock", "a+")
        if not lock_file(self._file):
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise _in_use(path, f"process {holder or 'unknown'}")
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def check(self) -> None:
        pass

    def release(self) -> None:
        if not self._file.closed:
            if fcntl:  # closing alone would leave it locked by a child forked meanwhile
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()


class _ObjectLock:
    """Objects `lock/000001`, `lock/000002`, ...: the last is the holder's, and each is created only if it is absent.

    So two processes that want the lock at once never both get it. The holder writes a new number into its object every
    `HEARTBEAT` seconds, and marks it free at its end. After a kill the object stays: a process that wants the lock
    takes the next number once the last has not changed for `STALE` seconds of its own clock (clocks are not compared).
    A holder that was wrongly taken for dead, for example without network for that long, sees a later number, and stops.
    """

    def __init__(self, path: Path):
        self._path, self._folder, self._store = path, path / "lock", files.store(path)
        self._holder = f"process {os.getpid()} on {socket.gethostname()}"
        self._beat, self._lost, self._ended = 0, False, threading.Event()
        newest = self._newest()
        self._number = newest + 1
        try:
            if newest:
                self._wait_for(newest)
            self._store.pipe_file(self._name(self._number), self._content(), mode="create")
        except (FileExistsError, FileNotFoundError):  # who takes a lock removes the one before it
            raise _in_use(path, "another process that took the lock first") from None
        for number in self._numbers():
            if number < self._number:
                self._store.rm_file(self._name(number))
        self._thread = threading.Thread(target=self._send_heartbeats, daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._lost:
            raise UserError(
                f"{self._path} was taken over by another process, because this one sent no heartbeat for {STALE:g}"
                " seconds; let the other one continue"
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

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _content(self, free: bool = False) -> bytes:
        return json.dumps({"holder": self._holder, "beat": self._beat, "free": free}).encode()

    def _wait_for(self, number: int) -> None:
        """Return once the lock is free or its holder dead; raises a UserError if the holder is alive."""
        first, began = self._store.cat_file(self._name(number)), time.monotonic()
        lock = json.loads(first)
        if lock["free"]:
            return
        print(f"{self._path} is locked by {lock['holder']}: waiting {STALE:g} s for a heartbeat", file=sys.stderr)
        while time.monotonic() - began < STALE:
            time.sleep(HEARTBEAT / 5)
            now = self._store.cat_file(self._name(number))
            if json.loads(now)["free"]:
                return
            if now != first:
                raise _in_use(self._path, lock["holder"])

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            try:
                if self._newest() != self._number:
                    self._lost = True
                    return
                self._beat += 1
                self._store.pipe_file(self._name(self._number), self._content())
            except Exception:  # the network: the next heartbeat may get through
                continue
