"""The worker processes: right verdicts on mathematics, and bounded time and memory for whatever else comes."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks.judging import Pool, pool


@pytest.fixture(scope="module")
def quick():
    """Two workers that give up soon."""
    made = Pool(2, seconds=0.5, memory=1 << 30)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        ("2", r"1, 2, ) 2", False),
        ("x+1", "1+x", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
        ("x+1", "x-1", False),
        ("18", "", False),
    ],
)
def test_what_is_the_same(quick, gold, answer, same):
    assert quick.same(gold, answer).result() is same


HOSTILE = {
    "a tower": "9^{9^{9^9}}",
    "a tower of factorials": "((((9!)!)!)!)!",
    "a long product": "*".join(["99999999999"] * 150),
    "a power": "(1+x+y+z)^{99999}",
    "many braces": "{" * 100_000,
    "many matched braces": "{" * 50_000 + "}" * 50_000,
    "deep fractions": r"\frac{1}{" * 300 + "2" + "}" * 300,
    "deep roots": r"\sqrt{" * 3000 + "2" + "}" * 3000,
    "deep brackets": "(" * 5000 + "1" + ")" * 5000,
    "a sum": r"\sum_{n=1}^{10^{12}} \sin(n^n)",
    "an integral": r"\int_0^1 e^{\sin(x^{x^x})} dx",
    "a binomial": r"\binom{10^{10}}{10^9}",
    "a long number": "1" * 100_000,
    "a repeating decimal": "0." + "3" * 100_000,
    "nothing printable": "\x00\x01\u2028\ufffd",
    "a matrix": r"\begin{pmatrix}" + r"1 & 2 \\" * 500 + r"\end{pmatrix}^{1000}",
    "an evil name": "__import__('os').system('touch /tmp/evil')",
}


QUICKLY_TRIED = ("a tower", "many matched braces", "deep fractions", "nothing printable", "an evil name")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICKLY_TRIED else pytest.mark.slow) for name in HOSTILE]
)
def test_a_hostile_answer_is_no_answer(quick, name):
    began = time.monotonic()
    assert quick.same("3", HOSTILE[name]).result() is False
    assert time.monotonic() - began < 30
    assert quick.same("3", "3.0").result() is True
    assert name != "a tower" or quick.same(HOSTILE[name], "3").result() is False
    assert not Path("/tmp/evil").exists()


def test_what_hangs_is_killed_and_replaced(quick):
    """All workers at once, each in the midst of a product that no signal handler of Python could end."""
    began = time.monotonic()
    verdicts = [quick.same("3", f"{n}^{{9^{{9^9}}}}") for n in range(2, 6)]
    good = [quick.same(str(n), f"{n}.0") for n in range(20)]
    assert not any(verdict.result() for verdict in verdicts) and all(verdict.result() for verdict in good)
    assert time.monotonic() - began < 60


def memory_of(worker) -> int:
    pages = int(Path(f"/proc/{worker._process.pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def test_memory_is_bounded():
    """The system refuses a worker more addresses than it may have."""
    limited = Pool(1, seconds=2.0, memory=1 << 30)
    assert limited.same("1", "1.0").result()
    worker = limited._workers._idle.get()
    try:
        soft, hard = resource.prlimit(worker._process.pid, resource.RLIMIT_AS)
        assert soft == hard == 1 << 30
        assert worker.ask(["3", r"\binom{10^{9}}{5 \cdot 10^8}"]) in ("0", "")
        if worker._process.poll() is None:
            assert memory_of(worker) <= 1 << 30
    finally:
        worker.kill()


def test_a_worker_that_stands_still_is_replaced(monkeypatch):
    """It uses no processor time, so its own limit never comes."""
    monkeypatch.setattr(pool, "PATIENCE", 0.5)
    made = Pool(1)
    try:
        assert made.same("1", "1.0").result()
        worker = made._workers._idle.get()
        made._workers._idle.put(worker)
        os.kill(worker._process.pid, signal.SIGSTOP)
        assert made.same("1", "1.0").result() is False  # not known in time
        assert made.same("1", "1.0").result() is True
        assert worker._process.poll() is not None
    finally:
        made.close()


def test_workers_end_with_their_process():
    code = """
import os, signal
from qsharp_jax.tasks.judging import Pool
pool = Pool(1)
assert pool.same("1", "1.0").result()
worker = pool._workers._idle.get()
print(worker._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    process = Path(f"/proc/{int(done.stdout)}")
    deadline = time.monotonic() + 10
    while process.exists() and process.joinpath("stat").read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process.exists() or process.joinpath("stat").read_text().split()[2] == "Z"


def test_without_math_verify_it_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such thing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = Pool(1)
    with pytest.raises(UserError, match="cannot start .* .ImportError: no such thing.; install .* math-verify"):
        made.same("1", "1.0").result()
