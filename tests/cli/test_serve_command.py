"""Defaults of `qsharp serve`, and numbers that JSON cannot hold in the lines of the commands beside it."""

import argparse

import pytest

from qsharp_jax.cli import json_lines, serve


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("meta-llama/Llama-3.3-70B-Instruct", "Llama-3.3-70B-Instruct"),
        ("Qwen/Qwen2.5-0.5B-Instruct@main", "Qwen2.5-0.5B-Instruct"),
        ("models/ref.v2", "ref.v2"),
        ("models/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        (".", "here.now"),
    ],
)
def test_the_reference_is_called_by_the_last_part_of_its_path_or_id(tmp_path, monkeypatch, ref, name):
    (tmp_path / "here.now").mkdir()
    monkeypatch.chdir(tmp_path / "here.now")
    assert serve._name(None, argparse.Namespace(ref=ref)) == name


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN"])
def test_numbers_that_json_cannot_hold_are_refused_as_they_are_read(number):
    assert json_lines.parse(f'{{"prompt": "a", "score": [{number}]}}', strict=True) is None
    assert json_lines.parse('{"prompt": "a", "score": [1e300]}', strict=True)
