"""Comparison of answers by algebra, in worker processes with limits on processor time and memory.

A worker that exceeds its limits, or breaks, is replaced, and its two answers count as different.
"""

from concurrent.futures import Future
from pathlib import Path

from qsharp_jax.tasks.workers import Workers

SECONDS = 5.0  # of processor time per pair; MATH's own answers take milliseconds
PATIENCE = 60.0  # seconds of wall time per pair, for a worker that hangs without computing
MEMORY = 1 << 30  # bytes of a worker's address space; it starts with about 70 MB


class Pool:
    """Worker processes, started on demand. They end with this process, a busy one at the latest at its limit."""

    def __init__(self, workers: int | None = None, *, seconds: float = SECONDS, memory: int = MEMORY):
        """Create a pool of `workers`, by default one per core up to 16, with limits per pair and in bytes."""
        self._workers = Workers(
            Path(__file__).with_name("worker.py"), [str(seconds), str(memory)], seconds=PATIENCE, count=workers,
            refusal="cannot start the process that judges answers ({reason}); install the packages in requirements.txt,"
            " which include math-verify",
        )  # fmt: skip

    def same(self, gold: str, answer: str) -> Future[bool]:
        """Compare an answer with the gold answer (not symmetric); the result raises a UserError if no worker starts."""
        return self._workers.ask([gold, answer], lambda reply: reply == "1")

    def close(self) -> None:
        """End the workers; pairs that are still waiting are not compared."""
        self._workers.close()
