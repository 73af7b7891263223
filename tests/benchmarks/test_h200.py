"""The script for an H200, with tiny models on the CPU, and its options with an interpreter that only notes its programs."""

import os
import platform
import re
import subprocess
import sys

import flax
import jax
import jaxlib
import pytest
from repository import ROOT


@pytest.mark.slow
def test_the_script_prints_every_table_and_keeps_them(tmp_path):
    results = tmp_path / "RESULTS.md"
    results.write_text("# Results\n")
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "h200.sh", "--small", "--results", results],
        env=os.environ | {"QSHARP_PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = results.read_text()
    assert (
        written.startswith("# Results\n\n## Decoding and fitting")
        and written.removeprefix("# Results\n") == done.stdout
    )
    assert written.count("| float32  |") == written.count("| bfloat16 |") == 2
    steps = re.findall(r"\| (run|bare) +\| +([12]) \| ours, (unguided|guided) +\| +[\d.]+ \| +[\d.]+ \|", written)
    assert len(set(steps)) == 8 and len(steps) == 9, "once more in 8 bits"
    assert len(re.findall(r"- (?:run|bare), batch [12], ours, \w+: .*decode \d", written)) == 9
    assert "MFU" in written and "compiled in" in written


@pytest.fixture
def noted(tmp_path):
    """Call the script in a folder of its own; returns how it ended, and the programs that it ran."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = - ]; then exec "{sys.executable}" -; fi\necho "$@" >>"{tmp_path}/programs"\n'
    )
    python.chmod(0o755)

    def call(*words: str, **more: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        environment = os.environ | {"QSHARP_PYTHON": str(python), "JAX_PLATFORMS": "cpu"} | more
        command = ["bash", ROOT / "benchmarks" / "h200.sh", "--small", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        programs = tmp_path / "programs"
        return done, programs.read_text().splitlines() if programs.exists() else []

    return call


def test_parts_are_run_alone_and_kept_where_the_caller_is(noted, tmp_path):
    done, programs = noted("--only", "fit,parity", "--results", "mine.md")
    assert done.returncode == 0, done.stderr
    assert [program.split()[0] for program in programs] == ["benchmarks/parity.py", "benchmarks/train.py"]
    assert (tmp_path / "mine.md").read_text() == done.stdout
    assert "`bash benchmarks/h200.sh --small --only fit,parity`, revision " in done.stdout
    assert len(noted()[1]) == 2 + 4


def test_unknown_parts_are_refused_with_the_list_and_help_has_them(noted):
    done, programs = noted("--only", "parity,all")
    assert done.returncode == 2 and programs == []
    assert done.stderr == (
        "h200.sh: there is no part all; --only takes some of parity,decode,decode-int8,fit with --small\n"
    )
    whole = noted("--help")[0].stdout
    assert all(name in whole for name in ("parity-wide", "decode-bare", "decode-int8", "fit"))


def test_the_report_names_versions_and_a_flax_that_is_not_as_required(noted, tmp_path):
    done, _ = noted("--only", "fit")
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, flax {flax.__version__}."
    assert f"\n{versions}\n" in done.stdout and "is not what requirements.txt asks for" not in done.stdout
    old = tmp_path / "old" / "flax-0.10.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: flax\nVersion: 0.10.0\n")
    done, _ = noted("--only", "fit", PYTHONPATH=str(tmp_path / "old"))
    assert "flax 0.10.0.\nflax 0.10.0 is not what requirements.txt asks for, flax" in done.stdout
