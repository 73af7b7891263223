"""An algorithm is one file and one line of the registry, and its record is read without JAX."""

import dataclasses
import re
import subprocess
import sys

import pytest
from repository import ROOT

from qsharp_jax.algorithms.registry import ALGORITHMS, DEFAULT, RECORDS

PACKAGE = ROOT / "qsharp_jax"
HOMES = {name: line.partition(":")[0] for name, line in zip(ALGORITHMS, RECORDS, strict=True)}
# "cd" is also a mode of guidance, some docstrings cite a paper, and a refusal may advise another algorithm.
EXCEPTED = {
    "cd": {"sampling.py", "guidance.py", "values.py", "train/targets.py", "algorithms/qsharp.py", "algorithms/vas.py"},
    "vas": {"guidance.py", "values.py", "generate/step.py", "algorithms/cd.py"},
}


# The name of the default algorithm is also that of the package and of the command.
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != DEFAULT])
def test_no_other_file_names_an_algorithm(name):
    mine = {f"algorithms/{HOMES[name]}.py", "algorithms/registry.py"} | EXCEPTED.get(name, set())
    words = re.compile(rf"\b({re.escape(name)}|{re.escape(ALGORITHMS[name].label)})\b", re.IGNORECASE)
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    naming = {path for path, text in files.items() if not path.startswith("configs/") and words.search(text)}
    assert naming <= mine


def test_records_are_complete():
    colors = [algorithm.color for algorithm in ALGORITHMS.values()]
    assert len({*colors}) == len(colors)
    for algorithm in ALGORITHMS.values():
        names = [field.name for field in dataclasses.fields(algorithm.settings)] if algorithm.settings else []
        assert algorithm.eta is None or algorithm.eta in names
        assert (algorithm.learns == "guide") == (algorithm.collect is not None) == (algorithm.fit is not None)


def test_records_are_read_without_jax():
    """So that `--help`, recipes and refusals are quick."""
    code = "import sys, qsharp_jax.run.schema, qsharp_jax.run.config; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
