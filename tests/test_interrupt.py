"""What becomes of a process at SIGTERM: at once, where it is deferred, and the second time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import ctypes, signal, sys, time

import jax.experimental.multihost_utils  # `interruptible` imports JAX: not in the time that is measured

from qsharp_jax import interrupt
from qsharp_jax.errors import Stopped

def ready():
    print("ready", flush=True)

def at_once():
    # As in a program on the device: the main thread runs nothing of Python's for a long time.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ready()
    ctypes.CDLL(None).usleep(30_000_000)

def asked():
    with interrupt.deferred():
        ready()
        while not interrupt.requested():
            time.sleep(0.01)
        print("saved")
        raise Stopped

def never_asked():
    with interrupt.deferred():
        ready()
        time.sleep(0.5)
        print("done")
    print("too late")

def in_an_evaluation():
    with interrupt.deferred():
        try:
            with interrupt.interruptible():
                ready()
                for _ in range(3000):  # a signal just before the sleep does not end it
                    time.sleep(0.01)
        except Stopped:
            print("saved")
            raise

def before_an_evaluation():
    with interrupt.deferred():
        ready()
        time.sleep(0.5)
        with interrupt.interruptible():
            print("too late")

def deaf():
    with interrupt.deferred():
        ready()
        time.sleep(30)

try:
    with interrupt.sigterm_ends(lambda: interrupt.leave(0, "told to end")):
        globals()[sys.argv[1]]()
except Stopped:
    print("stopped")
"""


def told(case: str, signals: int = 1) -> tuple[int, list[str], str]:
    """Exit code, lines after "ready", and standard error, within seconds."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, case], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "ready\n"
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    output, errors = process.communicate(timeout=20)
    return process.returncode, output.splitlines(), errors


def test_it_ends_at_once_with_code_0_whatever_the_main_thread_is_waiting_for():
    assert told("at_once") == (0, [], "qsharp: told to end\n")


@pytest.mark.parametrize(
    ("case", "output"),
    [
        ("asked", ["saved", "stopped"]),
        ("never_asked", ["done", "stopped"]),
        ("in_an_evaluation", ["saved", "stopped"]),
        ("before_an_evaluation", ["stopped"]),
    ],
)
def test_where_it_is_deferred_whoever_saves_has_the_time_to(case, output):
    assert told(case) == (0, output, "")


def test_a_second_one_ends_it_in_any_case():
    code, output, _ = told("deaf", signals=2)
    assert (code, output) == (128 + signal.SIGTERM, [])
