"""Workers that are in the midst of a call end with the process that started them, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repository import PYTHONPATH

PROGRAM = """
import os, re, subprocess

def tell():
    child = subprocess.Popen(["sleep", "100"])
    with open("pids.tmp", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename("pids.tmp", "pids")

def in_python(completions):
    tell()
    while True:
        pass

def in_c(completions):  # one call, which holds Python's lock
    tell()
    return [float(bool(re.match("(a+)+$", "a" * 100 + "b")))]

def while_it_is_loaded(completions):
    return [1.0]

if os.path.exists("hang"):
    in_python(None)
"""
PARENT = """
import os, signal, sys, threading, time
from qsharp_jax import cli
from qsharp_jax.system import sigterm
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.rewards import RewardJudge

judge = RewardJudge([("rewards.py", sys.argv[1])], [1.0], workers=1, seconds=100.0, most_failures=1.0)
judge.submit(Problem("0", "x", ""), "x")
while not os.path.exists("pids"):
    time.sleep(0.01)

def leave_by_the_command_line():
    cli.main = lambda: 2
    cli.console()

{
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "signal": lambda: sigterm.leave(2, "stopped"),
    "error": leave_by_the_command_line,
}[sys.argv[2]]()
"""


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("function", "end"),
    [
        ("in_python", "killed"),
        ("while_it_is_loaded", "killed"),
        ("in_c", "signal"),
        ("in_c", "error"),
    ],
)
def test_a_busy_worker_ends_with_its_process(tmp_path, function, end):
    (tmp_path / "rewards.py").write_text(PROGRAM)
    if function == "while_it_is_loaded":
        (tmp_path / "hang").touch()
    done = subprocess.run(
        [sys.executable, "-c", PARENT, function, end],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": PYTHONPATH}, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == {"killed": -signal.SIGKILL}.get(end, 2), done.stderr
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "the worker, and the process that it started"


def test_one_that_is_killed_as_the_process_leaves_is_not_taken_for_a_failed_one(tmp_path):
    """Nothing of what waits for its reply runs on: it would write a reward of none into the records."""
    (tmp_path / "rewards.py").write_text(PROGRAM)
    program = PARENT.replace(
        'judge.submit(Problem("0", "x", ""), "x")',
        'judgement = judge.submit(Problem("0", "x", ""), "x")\n'
        "def wait():\n    judgement()\n    open('judged', 'w').close()\n"
        "threading.Thread(target=wait, daemon=True).start()\n"
        "exit, os._exit = os._exit, lambda code: [time.sleep(1), exit(code)]",
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "in_python", "signal"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": PYTHONPATH}, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "judged").exists(), done.stderr
