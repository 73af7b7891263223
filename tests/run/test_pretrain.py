"""The pre-trained reference, stopped and taken up again."""

import json

import helpers
import pytest

from qsharp_jax.run import pretrain
from qsharp_jax.system import sigterm
from qsharp_jax.system.errors import Stopped
from qsharp_jax.train.checkpoint import Checkpoints


def session(folder):
    """One that ends at the first line with a loss below 2.5, which single steps have before the averages do."""
    return helpers.session(
        folder, "pretrain.steps=40", "pretrain.log_every=4", "pretrain.save_every=1000", "pretrain.batch_size=4",
        "pretrain.stop_loss=2.5", "pretrain.length_bucket=32",
    )  # fmt: skip


def lines(session):
    """The losses by step."""
    metrics = session.workdir.path / "metrics.jsonl"
    return {line["step"]: line["loss"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line}


@pytest.mark.slow
def test_a_run_that_ends_at_a_loss_and_was_stopped_ends_at_the_same_step(tmp_path, monkeypatch):
    """SIGTERM is heeded where a line of metrics is written: no line averages over fewer steps than without it."""
    straight = session(tmp_path / "straight")
    pretrain.run(straight)
    expected = lines(straight)
    assert 4 < max(expected) < 40 and all(step % 4 == 0 for step in expected)

    monkeypatch.setattr(sigterm, "requested", lambda: True)
    for _ in range(max(expected) // 4):
        stopped = session(tmp_path / "stopped")
        with pytest.raises(Stopped):
            pretrain.run(stopped)
        stopped.workdir.close()
    assert Checkpoints(tmp_path / "stopped" / "ref").finished()
    assert lines(stopped) == pytest.approx(expected, rel=1e-5)
