"""Worker processes that judge responses, and that are replaced whatever a response does to them.

A worker runs a script. The script writes "ready" once it has started, or the reason that prevents it, and then one line
for each line of JSON that it reads. A worker that breaks, or takes too long, is replaced, and its reply is empty.
"""

import functools
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from qsharp_jax.system import children, machine
from qsharp_jax.system.errors import UserError

Result = TypeVar("Result")

START = 120.0  # seconds of wall time for a worker to start
LEAVE = 1.0  # and for its last words
MOST_WORKERS = 16


class Workers:
    """Processes of one script, started on demand, that do not outlive this process.

    An idle one ends as its pipe closes, however this process ends. A busy one is killed, with what it has started, by
    `close` and `children.exit_now`, by which the command line ends at errors and signals. If this process ends in
    another way, such as kill -9, nobody is left to kill it: a script that may hang must notice, as reward_worker.py
    does, or limit itself, as judging/worker.py does.
    """

    def __init__(
        self, script: Path, arguments: Sequence[str], *, seconds: float, refusal: str, count: int | None = None
    ):
        """Args:
        script: the Python file, with its arguments.
        seconds: wall time per request.
        refusal: the message of the UserError if a worker cannot start, with {reason}.
        count: by default one per core, up to 16.
        """
        count = count or min(machine.cores(), MOST_WORKERS)
        self._start = functools.partial(_Worker, script, arguments, seconds, refusal)
        self._threads = ThreadPoolExecutor(count, "judge")
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(None)

    def ask(self, request: Any, read: Callable[[str], Result]) -> Future[Result]:
        """Send a request, any JSON, to a worker that is free; the future's result is what `read` makes of its reply.

        The result raises a UserError if no worker starts.
        """
        return self._threads.submit(lambda: read(self._ask(request)))

    def _ask(self, request: Any) -> str:
        worker = self._idle.get()
        try:
            worker = worker or self._start()
            reply = worker.ask(request)
            if not reply:
                worker.kill()
                worker = None
            return reply
        finally:
            self._idle.put(worker)

    def start(self) -> None:
        """Start a worker, if none was, to see whether it can start; raises the UserError."""
        worker = self._idle.get()
        try:
            worker = worker or self._start()
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the workers; requests that are still waiting are dropped."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            if worker := self._idle.get():
                worker.kill()


class _Worker:
    def __init__(self, script: Path, arguments: Sequence[str], seconds: float, refusal: str):
        # -P: do not import from the script's folder. The seed: sets of symbols are ordered by their hashes, and the
        # order can change an algorithm's path.
        self._seconds = seconds
        self._process = subprocess.Popen(
            [sys.executable, "-P", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | {"PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C does not reach it
        )
        children.register(self._process)
        assert self._process.stdin and self._process.stdout  # they are pipes
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._queue_lines, daemon=True)
        self._reader.start()
        word = self._read(START)
        if word != "ready":
            self.kill()
            raise UserError(refusal.format(reason=word or "no message"))

    def ask(self, request: Any) -> str:
        """Return the reply; empty if the worker broke or took too long."""
        try:
            self._stdin.write(json.dumps(request).encode() + b"\n")
        except OSError:  # it has ended: a broken pipe, on Windows an invalid argument
            return ""
        return self._read(self._seconds)

    def kill(self) -> None:
        """End the worker and the processes that it has started."""
        children.kill(self._process)
        self._stdin.close()
        self._reader.join(LEAVE)  # one that is out of reach may hold the pipe open
        if not self._reader.is_alive():
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
