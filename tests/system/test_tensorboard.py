"""TensorBoard's event files, read by TensorBoard's own reader, hold what metrics.jsonl holds."""

import math

import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsharp_jax.run.workdir import Workdir

LINES = [
    {"phase": "pre-train pi_ref", "step": 50, "loss": 2.5, "gradient_norm": 0.1, "peak_bytes": 123_456_789},
    {"phase": "pre-train pi_ref", "step": 100, "loss": 1.25, "gradient_norm": 0.2, "peak_bytes": 123_456_789},
    {"phase": "round 1: collect", "rollouts": 24, "reward": 0.375, "seconds": 1.5},
    {"phase": "round 1: fit", "step": 10, "loss": 0.5},
    {"phase": "round 1: fit", "step": 10, "nll": 0.75, "best_step": 10},
]


def opened(folder) -> Workdir:
    return Workdir.open(folder, ConfigDict({"seed": 0}))


def read(folder, phase: str) -> dict[str, list[tuple[int, float]]]:
    """Steps and numbers by name, of one phase's folder."""
    run = EventAccumulator(str(folder / "tensorboard" / phase)).Reload()
    return {tag: [(event.step, event.value) for event in run.Scalars(tag)] for tag in run.Tags()["scalars"]}


def expected(lines: list[dict], phase: str) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name in line.keys() - {"phase", "step"} if line["phase"] == phase else ():
            found.setdefault(name, []).append((line.get("step", 0), line[name]))
    return found


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, err_msg=name)  # event files keep float32


def test_the_event_files_hold_the_lines_of_metrics(tmp_path):
    with opened(tmp_path) as workdir:
        for line in LINES:
            workdir.append_metrics(line)
        kept = workdir.read_metrics()
    assert kept == LINES
    folders = {
        "pre-train_pi_ref": "pre-train pi_ref",
        "round_1_collect": "round 1: collect",
        "round_1_fit": "round 1: fit",
    }
    assert {path.name for path in (tmp_path / "tensorboard").iterdir()} == set(folders)
    for folder, phase in folders.items():
        assert_same(read(tmp_path, folder), expected(kept, phase))


def test_each_line_can_be_read_at_once(tmp_path):
    with opened(tmp_path) as workdir:
        for count in (1, 2):
            workdir.append_metrics({"phase": "fit", "step": count, "loss": 1.0})
            assert len(read(tmp_path, "fit")["loss"]) == count


def test_a_resumed_phase_takes_the_place_of_the_steps_that_were_lost(tmp_path):
    """Stopped after step 150, and on again from the checkpoint of step 100: metrics.jsonl has step 150 twice, the
    event files once, the later one. Another phase keeps its steps, though they are higher."""
    before = [{"phase": "pre-train pi_ref", "step": step, "loss": 3.0} for step in (500, 1000)]
    first = [{"phase": "round 1: fit", "step": step, "loss": 1.0} for step in (50, 100, 150)]
    again = [{"phase": "round 1: fit", "step": step, "loss": 0.5} for step in (150, 200)]
    for lines in ([*before, *first], again):
        with opened(tmp_path) as workdir:
            for line in lines:
                workdir.append_metrics(line)
    assert len(list((tmp_path / "tensorboard" / "round_1_fit").iterdir())) == 2
    assert_same(read(tmp_path, "round_1_fit"), {"loss": [(50, 1.0), (100, 1.0), (150, 0.5), (200, 0.5)]})
    assert_same(read(tmp_path, "pre-train_pi_ref"), {"loss": [(500, 3.0), (1000, 3.0)]})


@pytest.mark.parametrize("value", [math.nan, math.inf, None, True, "text", [1.0]])
def test_what_is_no_number_is_left_out(tmp_path, value):
    with opened(tmp_path) as workdir:
        workdir.append_metrics({"phase": "fit", "step": 1, "loss": 0.5, "other": value})
    assert read(tmp_path, "fit") == {"loss": [(1, 0.5)]}
