"""What becomes of a process at SIGTERM and Ctrl-C: at once, where it is deferred, at repeated signals, under `timeout`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from marks import slow
from repository import ROOT

from qsharp_jax.system import sigterm
from qsharp_jax.system.errors import Stopped

SCRIPT = """
import ctypes, os, signal, sys, time

import jax.experimental.multihost_utils  # `interruptible` imports JAX: not in the time that is measured

from qsharp_jax.system import sigterm
from qsharp_jax.system.errors import Stopped

def ready():
    print("ready", flush=True)

def at_once():
    # As in a program on the device: the main thread runs nothing of Python's for a long time.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ready()
    ctypes.CDLL(None).usleep(30_000_000)

def asked(seconds=0):
    with sigterm.deferred():
        ready()
        while not sigterm.requested():
            time.sleep(0.01)
        time.sleep(seconds)
        print("saved")
        raise Stopped

def slow():
    asked(1)

def never_asked():
    with sigterm.deferred():
        ready()
        time.sleep(0.5)
        print("done")
    print("too late")

def in_an_evaluation():
    with sigterm.deferred():
        try:
            with sigterm.interruptible():
                ready()
                for _ in range(3000):  # a signal just before the sleep does not end it
                    time.sleep(0.01)
        except Stopped:
            print("saved")
            raise

def before_an_evaluation():
    with sigterm.deferred():
        ready()
        time.sleep(0.5)
        with sigterm.interruptible():
            print("too late")

def deaf():
    with sigterm.deferred():
        sigterm.unsaved("step 7")
        ready()
        # As a fit in a long step: nothing of Python's runs in the main thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        ctypes.CDLL(None).usleep(30_000_000)

def busy():
    try:
        ready()
        time.sleep(30)
    finally:
        time.sleep(1)
        print("cleaned up")

signal.signal(signal.SIGINT, signal.default_int_handler)  # which the tests' own shell may have had ignored
sigterm.REPEATED = float(sys.argv[2])
try:
    with sigterm.sigterm_ends(lambda: sigterm.leave(0, "told to end")):
        globals()[sys.argv[1]]()
except Stopped:
    print("stopped by Ctrl-C" if sigterm.by_ctrl_c() else "stopped")
except KeyboardInterrupt:
    print("interrupted")
sys.stdout.flush()
os._exit(0)  # as the command line does after a signal
"""


def told(case: str, *signals: signal.Signals, apart: float = 0.1, repeated: float = 5.0) -> tuple[int, list[str], str]:
    """Exit code, lines after "ready", and standard error, within seconds.

    Args:
      signals: by default one SIGTERM.
      apart: seconds between them.
      repeated: seconds in which they count as one.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, case, str(repeated)], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    for number in signals or [signal.SIGTERM]:
        process.send_signal(number)
        time.sleep(apart)
    output, errors = process.communicate(timeout=20)
    return process.returncode, output.splitlines(), errors


@pytest.mark.parametrize(
    ("case", "output"),
    [
        ("at_once", []),  # whatever the main thread is waiting for
        ("asked", ["saved", "stopped"]),
        ("never_asked", ["done", "stopped"]),
        ("in_an_evaluation", ["saved", "stopped"]),
        ("before_an_evaluation", ["stopped"]),
    ],
)
def test_it_ends_at_once_and_where_it_is_deferred_whoever_saves_has_the_time_to(case, output):
    assert told(case) == (0, output, "" if output else "qsharp: told to end\n")


TERM, INT = signal.SIGTERM, signal.SIGINT


def test_signals_close_to_each_other_are_one():
    assert told("slow", TERM, TERM, TERM) == (0, ["saved", "stopped"], "")
    assert told("asked", *[TERM] * 8, apart=0.02) == (0, ["saved", "stopped"], "")


@pytest.mark.parametrize("number", [TERM, INT])
def test_a_later_one_ends_it_and_says_what_is_lost(number):
    code, output, errors = told("deaf", TERM, number, apart=1.0, repeated=0.5)
    assert (code, output) == (128 + number, [])
    assert errors == f"qsharp: {number.name} again, 1 s after the first: ends at once and gives up step 7\n"


@pytest.mark.parametrize("count", [1, slow(2)])
def test_ctrl_c_saves_where_it_is_deferred_and_interrupts_elsewhere(count):
    """Once, so that neither the save nor the clean-up is interrupted by a second."""
    assert told("slow", *[INT] * count)[:2] == (0, ["saved", "stopped by Ctrl-C"])
    assert told("in_an_evaluation", *[INT] * count)[:2] == (0, ["saved", "stopped by Ctrl-C"])
    assert told("busy", *[INT] * count)[:2] == (0, ["cleaned up", "interrupted"])


def test_a_later_ctrl_c_ends_a_clean_up_too():
    code, output, errors = told("busy", INT, INT, apart=0.6, repeated=0.5)
    assert (code, output) == (128 + INT, [])
    assert errors == "qsharp: SIGINT again, 1 s after the first: ends at once and gives up what is not written yet\n"


@pytest.fixture
def received():
    """A function that acts on a signal at a time, and what came of those so far."""
    events = []
    peers = sigterm.Peers(lambda code, sentence: events.append((code, sentence)), lambda: events.append("told"))

    def receive(number: int, now: float) -> list:
        sigterm._receive(number, now, lambda: events.append("ended"), peers)
        return events

    sigterm._reset()
    yield receive
    sigterm._reset()


def test_a_main_thread_that_is_leaving_already_is_not_ended(received):
    """It has saved, and left the block in which it was interrupted, before the thread that waits for signals ran."""
    sigterm._state.deferred = sigterm._state.raising = True
    with pytest.raises(sigterm.Stopped):
        sigterm._raise_where_allowed(TERM, None)
    sigterm._state.deferred = False
    assert received(TERM, 0.0) == ["told"]


@pytest.mark.parametrize("later", [0.0, 0.1, 4.9, 5.0])
def test_within_five_seconds_of_the_first_nothing_more_is_done(received, later):
    sigterm._state.deferred = True
    assert received(TERM, 1000.0) == ["told"]
    assert received(TERM, 1000.0 + later) == received(INT, 1000.0 + later) == ["told"]
    assert sigterm.requested() and not sigterm.by_ctrl_c()


def test_the_five_seconds_are_from_the_first(received):
    """Signals that go on and on do not keep a process alive."""
    sigterm._state.deferred = True
    for second in (0, 2, 4):
        assert received(TERM, second) == ["told"]
    sigterm.unsaved("the steps of 'fit' after 40")
    sentence = "SIGTERM again, 6 s after the first: ends at once and gives up the steps of 'fit' after 40"
    assert received(TERM, 6) == ["told", (143, sentence)]


def test_what_is_not_deferred_ends_at_the_first(received):
    assert received(TERM, 0.0) == ["ended"]


FIT = """
import sys
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qsharp_jax import train
from qsharp_jax.system import sigterm
from qsharp_jax.train.checkpoint import Checkpoints
from qsharp_jax.system.errors import Stopped

folder = Path(sys.argv[1])
optimizer = optax.sgd(0.1)

@flax.struct.dataclass
class Batch:
    x: jax.Array
    segments: np.ndarray

class Batches:
    def __getitem__(self, step):
        return Batch(jnp.zeros(3), np.ones((1, 3), np.int32))

def log(line):
    print(line["step"], flush=True)

loop = train.Loop(name="toy", total_steps=10**9, log_every=100, save_every=10**9, log=log)
with sigterm.sigterm_ends(lambda: sigterm.leave(0, "told to end")):
    try:
        train.fit(
            train.init_state({"x": jnp.ones(3)}, optimizer), Batches(), optimizer=optimizer, loop=loop,
            loss_fn=lambda params, batch: (jnp.sum((params["x"] - batch.x) ** 2), {}), checkpoints=Checkpoints(folder),
        )
    except Stopped:
        sigterm.leave(0, "saved")
"""


def timeout_of_a_fit(folder: Path, seconds: float) -> subprocess.Popen:
    """GNU `timeout`, which signals its child and then the group that the child is in; in a group of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        ["timeout", str(seconds), sys.executable, "-c", FIT, str(folder)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def saved_steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def test_a_fit_under_timeout_is_saved_every_time(tmp_path):
    """Told to end itself, `timeout` does what it does when the time is over, but for its own exit code."""
    fits = [timeout_of_a_fit(tmp_path / str(n), 600) for n in range(3)]
    for n, process in enumerate(fits):
        assert process.stdout.readline() == "100\n", process.stderr.read()
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors.splitlines()[-1]) == (0, "qsharp: saved")
        [step] = saved_steps(tmp_path / str(n))
        assert step >= 100


@pytest.mark.slow
def test_a_fit_whose_time_is_over_is_saved(tmp_path):
    """124 is what `timeout` says of it, whatever the exit code was."""
    process = timeout_of_a_fit(tmp_path / "fit", 40)
    output, errors = process.communicate(timeout=100)
    assert (process.returncode, errors.splitlines()[-1]) == (124, "qsharp: saved")
    [step] = saved_steps(tmp_path / "fit")
    assert step >= int(output.splitlines()[-1])


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_in_a_notebook_ctrl_c_saves_where_it_is_deferred_and_the_process_goes_on(monkeypatch):
    """Each block begins anew, and leaves the handler of the signal as it was."""
    handler = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        with pytest.raises(Stopped), sigterm.interrupts(), sigterm.deferred():
            assert not sigterm.requested()
            interrupt()
            interrupt()  # an impatient user's, within five seconds
            assert sigterm.requested()
        assert signal.getsignal(signal.SIGINT) is handler and not sigterm.requested()
    with pytest.raises(KeyboardInterrupt), sigterm.interrupts():
        interrupt()
    with pytest.raises(Stopped), sigterm.interrupts(), sigterm.deferred(), sigterm.interruptible():
        interrupt()
    monkeypatch.setattr(sigterm, "REPEATED", -1.0)
    with pytest.raises(KeyboardInterrupt), sigterm.interrupts(), sigterm.deferred():
        interrupt()
        interrupt()
