"""Docstrings begin as a stranger expects, and headers say what a file does rather than what it does not know."""

import ast
import re

import pytest
from repository import ROOT

FILES = sorted(path for folder in ("qsharp_jax", "benchmarks", "examples", "docs") for path in (ROOT / folder).rglob("*.py"))
PAGES = sorted(path for folder in (".", "docs", "benchmarks") for path in (ROOT / folder).glob("*.md"))
ODD = re.compile(r"(Of|That|What|As|By|Whether|Where|How)\b(?! to )")
BRITISH = re.compile(r"\b(behaviour|colour|regularis|optimis|normalis|initialis|labell|neighbour|licence|organis|centre\b|towards\b)", re.I)


def docstrings(path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_an_imperative_or_a_noun_phrase(path):
    assert [text.splitlines()[0] for text in docstrings(path) if ODD.match(text)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_headers_do_not_say_what_they_know_nothing_about(path):
    assert not re.search(r"knows? nothing", " ".join(docstrings(path)), re.I)


@pytest.mark.parametrize("path", [*FILES, *PAGES], ids=lambda p: p.name)
def test_words_are_american(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "arXiv" not in line]  # titles of papers
    text = "\n".join(lines).replace('"labelled"', "")  # the name of a metric in the files of finished runs
    assert BRITISH.findall(text) == []
