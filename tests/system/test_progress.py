"""Bars in a log: lines of text, and none where there is nothing to do."""

import pytest

from qsharp_jax.system.progress import Bar


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def test_a_log_gets_lines_without_carriage_returns_and_none_for_nothing_to_do(capsys):
    assert list(Bar(range(3), "count", total=3)) == [0, 1, 2]
    written = capsys.readouterr().err
    assert "count: 100%" in written and "3/3" in written and "\r" not in written
    assert list(Bar(iter(()), "count", total=0)) == [] and capsys.readouterr().err == ""
