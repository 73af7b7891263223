"""Bars in a log: lines of text, and none where there is nothing to do."""

import sys
from types import SimpleNamespace

import pytest

from qsharp_jax.system import progress
from qsharp_jax.system.progress import Bar


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def test_a_log_gets_lines_without_carriage_returns_and_none_for_nothing_to_do(capsys):
    assert list(Bar(range(3), "count", total=3)) == [0, 1, 2]
    written = capsys.readouterr().err
    assert "count: 100%" in written and "3/3" in written and "\r" not in written
    assert list(Bar(iter(()), "count", total=0)) == [] and capsys.readouterr().err == ""


def test_a_notebook_gets_a_bar_that_is_overwritten(capsys, monkeypatch):
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert list(Bar(range(3), "count", total=3)) == [0, 1, 2]
    written = capsys.readouterr().err
    assert "\rcount: 100%|" in written and max(len(part.rstrip("\n")) for part in written.split("\r")) <= 100


def test_a_terminal_is_told_what_goes_on_and_a_log_is_not(capsys, monkeypatch):
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        progress.tell("loading the guide")
        with Bar(None, "fit", total=2, before="compiling") as bar:
            before = capsys.readouterr().err
            assert ("qsharp: loading the guide\n" in before) == ("compiling" in before) == terminal
            bar.set_postfix(loss="0.7", refresh=False)
            bar.update()
            bar.refresh()
            after = capsys.readouterr().err
            assert "1/2" in after and "loss=0.7" in after and "compiling" not in after
