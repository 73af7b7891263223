"""Whether two answers are the same mathematics, asked of worker processes that a hostile answer may well kill.

A worker has so much processor time for a pair of answers, and so much memory. One that takes more, or breaks, is
replaced, and its two answers count as different. It knows nothing about tasks, rewards or models.
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

SECONDS = 5.0  # of processor time for one pair; MATH's own answers take milliseconds
PATIENCE = 60.0  # seconds of wall time, for a worker that is not computing and does not answer either
MEMORY = 1 << 30  # bytes of a worker's addresses, some 70 MB of which it begins with
START = 120.0  # seconds of wall time that a worker may take to begin
MOST_WORKERS = 16


class Pool:
    """Workers, one for each of some threads, started when there is something to ask.

    They end with this process, however that ends.
    """

    def __init__(self, workers: int | None = None, *, seconds: float = SECONDS, memory: int = MEMORY):
        workers = workers or min(machine.cores(), MOST_WORKERS)
        self._start = functools.partial(_Worker, seconds, memory)
        self._threads = ThreadPoolExecutor(workers, "judge")
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)

    def same(self, gold: str, answer: str) -> Future[bool]:
        """Whether the answer means what the gold one does; `math_verify` does not take them symmetrically.

        The result raises UserError if no worker can be started.
        """
        return self._threads.submit(self._same, gold, answer)

    def _same(self, gold: str, answer: str) -> bool:
        worker = self._idle.get()
        try:
            worker = worker or self._start()
            verdict = worker.ask(gold, answer)
            if verdict is None:
                worker.kill()
                worker = None
            return bool(verdict)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the workers; what has not been begun is not judged."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            if worker := self._idle.get():
                worker.kill()


class _Worker:
    """One process of `worker.py`."""

    def __init__(self, seconds: float, memory: int):
        # Unsafe paths are left out, for the folder of `worker.py` is not one to import from. Sets of symbols have an
        # order that the hashes' seed decides, and with it the way that an algorithm takes.
        self._process = subprocess.Popen(
            [sys.executable, "-P", Path(__file__).with_name("worker.py"), str(seconds), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | {"PYTHONHASHSEED": "0"},
            start_new_session=True,  # a Ctrl-C is not theirs
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
                f"the process that judges answers cannot begin ({word or 'it said nothing'}); install what"
                " requirements.txt lists, math-verify among it"
            )

    def ask(self, gold: str, answer: str) -> bool | None:
        """None if the worker broke, or was killed for taking too long."""
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
