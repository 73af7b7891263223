"""Several processes of one run on this machine, with fake devices."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from typing import Any

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


def printed_on_fake_devices(*words: str) -> tuple[Any, str]:
    """The JSON that a script prints last on eight fake devices, and its standard error."""
    environment = os.environ | {
        "XLA_FLAGS": fake_devices(8), "JAX_PLATFORMS": "cpu", "PYTHONPATH": PYTHONPATH,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling takes most of the time
    }  # fmt: skip
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr
