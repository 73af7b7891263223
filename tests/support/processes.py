"""Several processes of one run on this machine, with fake devices."""

import contextlib
import os
import socket
import subprocess
import sys

from devices import fake_devices
from repository import PYTHONPATH, ROOT


def free_port() -> int:
    """Find a port whose successor is free as well."""
    while True:
        with socket.socket() as one, socket.socket() as next_up, contextlib.suppress(OSError):
            one.bind(("", 0))
            next_up.bind(("", one.getsockname()[1] + 1))
            return one.getsockname()[1]


def start(*words: str, devices: int = 2) -> subprocess.Popen:
    environment = os.environ | {
        "XLA_FLAGS": fake_devices(devices), "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": PYTHONPATH,
    }  # fmt: skip
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *words], env=environment, cwd=ROOT, **pipes)
