"""A small server in a process of its own, and its limits."""

import dataclasses
import subprocess
import time
from pathlib import Path

CONTEXT, ROWS, QUEUE = 64, 4, 6


@dataclasses.dataclass
class Running:
    """A server of its own process."""

    process: subprocess.Popen
    url: str
    log: Path
    ref: Path
    guide: Path


def wait_until_ready(process: subprocess.Popen, log: Path) -> str:
    """Wait until the server is ready, and return its address."""
    deadline = time.monotonic() + 300
    while "\nready\n" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return next(line for line in log.read_text().splitlines() if line.startswith("serving ")).rpartition(" at ")[2]
