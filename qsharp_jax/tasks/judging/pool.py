"""A pool of worker processes that compare answers by algebra, and that survives whatever an answer does to a worker.

A worker has limits on processor time per pair of answers and on memory. One that exceeds them, or breaks, is replaced,
and its two answers count as different.
"""

import functools
import json
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from qsharp_jax.system import machine
from qsharp_jax.system.errors import UserError

SECONDS = 5.0  # of processor time per pair; MATH's own answers take milliseconds
PATIENCE = 60.0  # seconds of wall time per pair, for a worker that hangs without computing
MEMORY = 1 << 30  # bytes of a worker's address space; it starts with about 70 MB
START = 120.0  # seconds of wall time for a worker to start
MOST_WORKERS = 16


class Pool:
    """Worker processes, started on demand. They end with this process, however that ends."""

    def __init__(self, workers: int | None = None, *, seconds: float = SECONDS, memory: int = MEMORY):
        """Create a pool of `workers`, by default one per core up to 16, with limits per pair and in bytes."""
        workers = workers or min(machine.cores(), MOST_WORKERS)
        self._start = functools.partial(_Worker, seconds, memory)
        self._threads = ThreadPoolExecutor(workers, "judge")
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)

    def same(self, gold: str, answer: str) -> Future[bool]:
        """Compare an answer with the gold answer (not symmetric); the result raises a UserError if no worker starts."""
        return self._threads.submit(self._same, gold, answer)

    def _same(self, gold: str, answer: str) -> bool:
        worker = self._idle.get()
        try:
            worker = worker or self._start()
            verdict = worker.compare(gold, answer)
            if verdict is None:
                worker.kill()
                worker = None
            return bool(verdict)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the workers; pairs that are still waiting are not compared."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            if worker := self._idle.get():
                worker.kill()


class _Worker:
    """A process that runs `worker.py`."""

    def __init__(self, seconds: float, memory: int):
        # -P: do not import from the folder of `worker.py`. The seed: sets of symbols are ordered by their hashes, and
        # the order can change an algorithm's path.

        self._process = subprocess.Popen(
            [sys.executable, "-P", Path(__file__).with_name("worker.py"), str(seconds), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | {"PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C does not reach it
        )
        assert self._process.stdin and self._process.stdout  # they are pipes
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._queue_lines, daemon=True)
        self._reader.start()
        word = self._read(START)
        if word != "ready":
            self.kill()
            raise UserError(
                f"cannot start the process that judges answers ({word or 'no message'}); install the packages"
                " in requirements.txt, which include math-verify"
            )

    def compare(self, gold: str, answer: str) -> bool | None:
        """Return the verdict; None if the worker broke or took too long."""
        try:
            self._stdin.write(json.dumps([gold, answer]).encode() + b"\n")
        except OSError:  # it has ended: a broken pipe, on Windows an invalid argument
            return None
        return {"1": True, "0": False}.get(self._read(PATIENCE))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._stdin.close()
        self._stdout.close()

    def _queue_lines(self) -> None:
        """Pass on each line of the process, and at its end what it wrote of the next one."""
        while line := self._stdout.readline():
            self._lines.put(line)
        self._lines.put(b"")

    def _read(self, seconds: float) -> str:
        """Return the next line; an empty one if the process ends, or after so many seconds."""
        try:
            return self._lines.get(timeout=seconds).decode().strip()
        except queue.Empty:
            return ""
