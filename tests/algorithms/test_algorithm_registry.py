"""An algorithm is one file and one line of the registry, and its record is read without JAX."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from repository import ROOT

from qsharp_jax.algorithms.registry import ALGORITHMS, DEFAULT, RECORDS

PACKAGE = ROOT / "qsharp_jax"
HOMES = {name: line.partition(":")[0] for name, line in zip(ALGORITHMS, RECORDS, strict=True)}
# "cd" is also a mode of guidance; the file for `transformers` stands alone.
MODES = {
    "cd": {"sampling.py", "guidance.py", "algorithms/qsharp.py", "algorithms/vas.py", "integrations/transformers.py"}
}
ADVICE = {"vas": {"algorithms/cd.py"}}  # a refusal that advises another algorithm


def names_in(path: Path) -> set[str]:
    """The identifiers of a file, and the words of its strings that are no docstrings; prose may cite what it likes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            words |= {*re.split(r"[^\w]+", node.value), node.value}
        elif isinstance(node, ast.ImportFrom):
            words |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        words |= {getattr(node, field) for field in ("id", "attr", "arg") if isinstance(getattr(node, field, 0), str)}
    return words


FILES = {path.relative_to(PACKAGE).as_posix(): names_in(path) for path in PACKAGE.rglob("*.py")}


# The name of the default algorithm is also that of the package and of the command.
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != DEFAULT])
def test_no_other_file_names_an_algorithm(name):
    allowed = {f"algorithms/{HOMES[name]}.py", "algorithms/registry.py"} | MODES.get(name, set()) | ADVICE.get(name, set())
    naming = {path for path, words in FILES.items() if words & {name, ALGORITHMS[name].label}}
    others = {path for path in naming - allowed if not path.startswith("configs/")}
    assert not others, f"only {HOMES[name]}.py and the registry may name {name}"


def test_records_are_complete():
    colors = [algorithm.color for algorithm in ALGORITHMS.values()]
    assert len({*colors}) == len(colors)
    for algorithm in ALGORITHMS.values():
        names = [field.name for field in dataclasses.fields(algorithm.settings)] if algorithm.settings else []
        assert algorithm.eta is None or algorithm.eta in names
        assert (algorithm.learns == "guide") == (algorithm.collect is not None) == (algorithm.fit is not None)
