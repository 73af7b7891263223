"""A trace of ten steps, after those that compile, read back by JAX's own reader of profiles."""

import jax
import optax

from qsharp_jax import train
from qsharp_jax.data.batches import Example, make_batch
from qsharp_jax.train import trace
from qsharp_jax.train.checkpoint import Checkpoints


def toy_fit(folder, widths, profile):
    """Steps on batches of these widths."""
    batches = [make_batch([Example([1] * 4, [2] * 4)], 1, width) for width in widths]
    optimizer, lines = optax.sgd(0.1), []
    return train.fit(
        train.init_state({"x": jax.numpy.zeros((64, 64))}, optimizer), batches,
        loss_fn=lambda params, batch: (((params["x"] @ params["x"] - 1) ** 2).sum() + batch.tokens.sum() * 0.0, {}),
        optimizer=optimizer, checkpoints=Checkpoints(folder),
        loop=train.Loop(
            total_steps=len(widths), log_every=100, save_every=1000, name="toy", log=lines.append, profile=profile
        ),
    )  # fmt: skip


def read(folder) -> tuple[list[int], set[str]]:
    """The numbers of the steps in the one trace of a folder, and the names of everything in it."""
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = sorted({dict(event.stats)["step_num"] for event in events if event.name == "train"})
    return steps, {event.name for event in events}


def test_ten_steps_after_those_that_compile(tmp_path):
    """Steps 0 and 3 compile, for 8 and for 16 tokens: the trace is of steps 9 to 18, and computes but compiles not."""
    widths = [8] * 3 + [16] + [8, 16] * 20
    toy_fit(tmp_path / "run", widths, tmp_path / "profile")
    steps, names = read(tmp_path / "profile")
    assert steps == list(range(3 + 1 + trace.WARM, 3 + 1 + trace.WARM + trace.STEPS))
    assert any("dot" in name for name in names), "what the devices computed"
    assert not any("compile" in name.lower() for name in names)


def test_a_training_that_ends_sooner_has_fewer_steps_and_none_unless_asked_for(tmp_path, capsys):
    toy_fit(tmp_path / "run", [8] * 9, tmp_path / "profile")
    assert read(tmp_path / "profile")[0] == [6, 7, 8]
    toy_fit(tmp_path / "short", [8] * 4, tmp_path / "none")
    assert not (tmp_path / "none").exists() and "no trace in" in capsys.readouterr().err
    toy_fit(tmp_path / "long", [8] * 30, None)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "profile", "short", "long"}
