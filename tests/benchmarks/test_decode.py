"""The benchmark of decode steps: the programs that it measures."""

import argparse

import jax

from benchmarks import decode


def test_pytorch_without_a_gpu_is_not_measured_beside_jax_on_one(monkeypatch, capsys):
    """It would compute models of 8B on the host's CPU for hours."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(decode, "has_cuda", lambda: False)
    monkeypatch.setattr(decode.decoding, "for_decoding", lambda model: model)
    options = argparse.Namespace(programs="unguided,guided", without_torch=False, quantize="none")
    assert list(decode.variants(options, None, None)) == ["ours, unguided", "ours, guided"]
    assert "finds no GPU" in capsys.readouterr().out
