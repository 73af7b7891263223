"""Sentences about errors."""

import pytest

from qsharp_jax.system.errors import first_line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("no route\nto host"), "no route"),
        (ValueError("\n  a template\n"), "a template"),
        (TimeoutError(" \n "), "TimeoutError"),
        (KeyError(), "KeyError"),
        (RuntimeError("x" * 300), "x" * 200),
    ],
)
def test_an_error_of_a_library_is_told_in_one_line(error, words):
    assert first_line(error) == words
