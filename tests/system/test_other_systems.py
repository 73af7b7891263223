"""Without what macOS and Windows lack: importing, `--help`, `generate` and `judge` still work."""

import json
import os
import subprocess
import sys

import bpe
import pytest
from repository import PYTHONPATH
from text_models import make_ref

from qsharp_jax.models import hf

# psutil has its own way on each system, and on Linux it is these.
WITHOUT = """
import builtins, os, select, signal, sys

import psutil

for name in ("fcntl", "resource"):
    sys.modules[name] = None
del os.sched_getaffinity, select.poll, signal.setitimer
real_open = builtins.open

def open_but_proc(file, *args, **options):
    caller = sys._getframe(1).f_globals.get("__name__", "")
    if str(file).startswith("/proc") and not caller.startswith("psutil"):
        raise FileNotFoundError(file)
    return real_open(file, *args, **options)

builtins.open = open_but_proc
"""


@pytest.fixture(scope="module")
def ref(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ref")
    hf.export_ref(make_ref(), folder, tokenizer=bpe.make(), stop_ids=[bpe.EOS, bpe.EOT])
    return folder


@pytest.fixture
def qsharp(tmp_path):
    """A function that runs a command on such a system: Python runs `sitecustomize` first, in workers too."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)

    def run(*arguments) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{PYTHONPATH}", "JAX_PLATFORMS": "cpu"}
        words = [sys.executable, "-m", "qsharp_jax.cli", *map(str, arguments)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_help(qsharp):
    assert "generate" in qsharp("--help").stdout


@pytest.mark.slow
def test_generate_into_a_file_warns_that_it_is_not_locked(qsharp, ref, tmp_path):
    output = tmp_path / "out.jsonl"
    done = qsharp("generate", "How many eggs?", "--ref", ref, "--max-new-tokens", 4, "--output", output)
    assert len(json.loads(output.read_text())["tokens"]) <= 4
    assert f"{output} cannot be locked on this system" in done.stderr


def test_judge_asks_its_workers(qsharp, tmp_path):
    records = [{"response": rf"\boxed{{{answer}}}", "answer": "x+1"} for answer in ("1+x", "x-1")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    qsharp("judge", "--task", "math", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    judged = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["reward"] for record in judged] == [1.0, 0.0]
