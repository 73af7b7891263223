"""Defaults of `qsharp serve`."""

import argparse

import pytest

from qsharp_jax.cli import serve


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
