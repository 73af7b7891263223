"""A loop that resumes as if it had never stopped, and what it writes."""

import logging
import math
import time

import flax.struct
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import assert_trees_equal, refusal
from marks import slow

from qsharp_jax import train
from qsharp_jax.data.batches import Batches, Example, make_batch
from qsharp_jax.system.errors import Stopped
from qsharp_jax.system.progress import Bar
from qsharp_jax.train import loop
from qsharp_jax.train.checkpoint import Checkpoints

V = 11


class Numbers:
    """A batch source of plain numbers for toy losses: the batch of a step is the step. Counts what it was asked."""

    def __init__(self, ending=None):
        self.asked, self.ending = [], ending

    def __getitem__(self, step):
        if step == self.ending:
            raise KeyboardInterrupt
        self.asked.append(step)
        return SimpleBatch(jnp.float32(step), np.ones((1, 3), np.int32))


@flax.struct.dataclass
class SimpleBatch:
    step: jax.Array
    segments: np.ndarray


SGD = optax.sgd(0.1)


def toy_loss(params, batch):
    return jnp.sum((params["x"] - batch.step) ** 2), {"accuracy": batch.step / 10}


def toy_state():
    return train.init_state({"x": jnp.zeros(2)}, SGD)


def make_loop(lines=None, **changes):
    log = (lambda line: None) if lines is None else lines.append
    return train.Loop(**dict(total_steps=20, log_every=5, save_every=4, name="toy", log=log) | changes)


def toy_fit(folder, batches=None, loss_fn=toy_loss, lines=None, **changes):
    return train.fit(
        toy_state(), Numbers() if batches is None else batches, loss_fn=loss_fn, optimizer=SGD,
        checkpoints=Checkpoints(folder), loop=make_loop(lines, **changes),
    )  # fmt: skip


def test_init_state_copies(tmp_path):
    """The caller's arrays, often pi_ref's own, are whole after the state was donated, step after step."""
    params = {"x": jnp.arange(4.0)}
    optimizer = optax.adam(0.1)
    state = train.init_state(params, optimizer)
    train.fit(
        state, Numbers(), loss_fn=toy_loss, optimizer=optimizer, checkpoints=Checkpoints(tmp_path), loop=make_loop()
    )
    assert not params["x"].is_deleted() and params["x"].tolist() == [0, 1, 2, 3]
    assert state.params["x"].is_deleted()  # it was donated: nothing is held twice


def bag_params():
    """A small model with every group of the optimiser: Muon's matrices, decayed ones, and a bias."""
    rng = np.random.default_rng(0)
    shapes = {"embedding": (V, 8), "layers": {"up": {"kernel": (2, 8, 8)}}, "head": {"kernel": (8, 1), "bias": (1,)}}
    return jax.tree.map(lambda shape: jnp.float32(rng.normal(size=shape)), shapes, is_leaf=lambda x: type(x) is tuple)


def bag_loss(params, batch):
    x = params["embedding"][batch.tokens]
    for kernel in params["layers"]["up"]["kernel"]:
        x = x + jnp.tanh(x @ kernel)
    logits = (x @ params["head"]["kernel"] + params["head"]["bias"])[..., 0]
    losses = optax.sigmoid_binary_cross_entropy(logits, batch.reward_to_go)
    return jnp.where(batch.label_mask, losses, 0).sum() / batch.label_mask.sum(), {}


def bag_fit(folder, batches, name="muon", schedule="cosine", **changes):
    config = helpers.optimizer_config(name, warmup_steps=3, schedule=schedule, clip=1.0)
    optimizer = train.make_optimizer(config)
    return train.fit(
        train.init_state(bag_params(), optimizer), batches, loss_fn=bag_loss, optimizer=optimizer,
        schedule=train.make_schedule(config, 20), checkpoints=Checkpoints(folder), loop=make_loop(**changes),
    )  # fmt: skip


def test_the_step_compiles_once_for_a_shape(tmp_path, caplog):
    """Steps on two widths compile two programs, from fresh parameters and from a checkpoint alike."""
    examples = [Example([1] * length, [2, 3], 1.0) for length in (2, 2, 2, 12, 12, 12)]
    batches = Batches(examples, rows=1, bucket=8, seed=0)

    def compiled():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return sum("Finished XLA compilation of jit(step_fn)" in message for message in messages)

    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        with pytest.raises(Killed):
            bag_fit(tmp_path, killed_at(10, batches), "adamw")
        assert compiled() == 2
        bag_fit(tmp_path, batches, "adamw")
        assert compiled() == 2


class Killed(Exception):
    pass


class killed_at:
    """Batches that end a training at a step, as a kill would."""

    def __init__(self, step, batches):
        self._step, self._batches = step, batches

    def __getitem__(self, step):
        if step == self._step:
            raise Killed
        return self._batches[step]


@pytest.mark.parametrize("name", ["adamw", slow("adafactor"), slow("muon")])
def test_a_training_that_was_stopped_ends_bit_for_bit_the_same(tmp_path, name):
    """20 steps at once, or killed at step 11 and started again: the same parameters and moments, over three epochs."""
    batches = Batches(helpers.random_examples(np.random.default_rng(0), count=14), rows=2, bucket=12, seed=1)
    assert 20 > 2 * batches.steps_per_epoch
    straight = bag_fit(tmp_path / "straight", batches, name)
    with pytest.raises(Killed):
        bag_fit(tmp_path / "stopped", killed_at(11, batches), name)
    assert int(Checkpoints(tmp_path / "stopped").restore(straight).step) == 8
    resumed = bag_fit(tmp_path / "stopped", batches, name)
    assert int(resumed.step) == 20
    assert_trees_equal(resumed, straight)
    assert_trees_equal(Checkpoints(tmp_path / "stopped").restore(straight), straight)
    assert_trees_equal(Checkpoints(tmp_path / "stopped").restore_params(straight.params), straight.params)
    for leaf, before in zip(jax.tree.leaves(straight.params), jax.tree.leaves(bag_params()), strict=True):
        assert np.abs(leaf - before).max() > 0.01  # all of them have learned


def test_a_finished_training_returns_at_once(tmp_path):
    state = toy_fit(tmp_path)
    batches, lines = Numbers(ending=0), []
    again = toy_fit(tmp_path, batches, lines=lines, total_steps=30)
    assert_trees_equal(again, state)
    assert not batches.asked and not lines


def test_metrics_lines(tmp_path):
    """At every log and save and at the end: means since the last line, by name; then what was measured at the end."""
    lines = []
    toy_fit(tmp_path, lines=lines, total_steps=11, measure=lambda params: {"brier": float(params["x"][0])})
    steps = [line["step"] for line in lines]
    assert steps == [4, 5, 8, 10, 11, 11]
    required = {"phase", "step", "loss", "gradient_norm", "accuracy", "tokens_per_second", "goodput", "seconds"}
    assert all(required <= set(line) <= required | {"peak_bytes"} for line in lines[:-1])
    x, expected = 0.0, []
    for step in range(11):
        expected.append((2 * (x - step) ** 2, 2 * abs(x - step) * math.sqrt(2), step / 10))
        x -= 0.1 * 2 * (x - step)
    for first, line in zip([0, *steps], lines[:-1]):
        loss, norm, accuracy = np.mean(expected[first : line["step"]], axis=0)
        found = [line["loss"], line["gradient_norm"], line["accuracy"]]
        np.testing.assert_allclose(found, [loss, norm, accuracy], rtol=1e-4)
        assert line["phase"] == "toy" and line["tokens_per_second"] > 0 and 0 < line["goodput"] < 1
    np.testing.assert_allclose(lines[-1].pop("brier"), x, rtol=1e-5)
    assert lines[-1] == {"phase": "toy", "step": 11}


class Later:
    """A number that a device has computed at a time."""

    def __init__(self, time):
        self.time = time

    def is_ready(self):
        return time.monotonic() >= self.time

    def __array__(self, dtype=None, copy=None):
        time.sleep(max(0.0, self.time - time.monotonic()))
        return np.asarray(0.5)

    def __float__(self):
        return float(np.asarray(self))


def test_the_bar_counts_what_the_device_has_done_and_shows_the_first_loss(tmp_path, monkeypatch):
    """A step takes 20 ms on the device and none to dispatch: the device never waits, and the bar never runs ahead."""
    losses, seen = [], []

    def step(state, frozen, batch, rate):
        begins = max(time.monotonic(), losses[-1].time if losses else 0.0)
        losses.append(Later(begins + 0.02))
        return state, {"loss": losses[-1], "gradient_norm": losses[-1]}

    class Seen(Bar):
        def update(self, n=1):
            super().update(n)
            seen.append((self.n, sum(loss.is_ready() for loss in losses), len(losses), self.postfix))

    monkeypatch.setattr(loop, "Bar", Seen)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    options = {"loss_fn": toy_loss, "optimizer": SGD, "checkpoints": Checkpoints(tmp_path)}
    with train.training(toy_state(), loop=make_loop(total_steps=6, log_every=6, save_every=6), **options) as trainer:
        trainer._step_fn = step
        while not trainer.done:
            trainer.update(Numbers()[trainer.step])
        trainer.finish()
    assert [shown for shown, *_ in seen] == [1, 2, 3, 4, 5, 6]
    assert all(shown <= finished for shown, finished, *_ in seen)
    assert [dispatched for _, _, dispatched, _ in seen] == [1, 3, 4, 5, 6, 6]
    assert all(postfix == "loss=0.500" for *_, postfix in seen)


def test_a_checkpoint_is_overdue_after_a_while(tmp_path, monkeypatch):
    """Steps that take minutes each are saved long before `save_every` of them, at log lines that end units."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    lines = []
    saved = []
    monkeypatch.setattr(Checkpoints, "save", lambda _, state, **how: saved.append(int(state.step)))
    toy_fit(tmp_path, lines=lines, log_every=3, save_every=1000, save_unit=2, stop_requested=lambda step: False)
    assert saved == [6, 12, 18, 20]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12, 15, 18, 20], "as without the clock"


def test_evaluations_between(tmp_path):
    """Every so many steps and once at the end, of the parameters of that step; without patience the last are kept."""
    x, xs = 0.0, []
    for step in range(11):
        x -= 0.1 * 2 * (x - step)
        xs.append(x)
    for total, at in [(11, [3, 6, 9, 11]), (9, [3, 6, 9])]:
        lines, measure = [], lambda params: {"nll": float(params["x"][0])}  # it gets worse and worse
        state = toy_fit(tmp_path / str(total), lines=lines, total_steps=total, evaluate_every=3, measure=measure)
        measured = [line for line in lines if "nll" in line]
        assert [line["step"] for line in measured] == at and all(set(m) == {"phase", "step", "nll"} for m in measured)
        np.testing.assert_allclose([line["nll"] for line in measured], [xs[step - 1] for step in at], rtol=1e-5)
        assert state.params["x"][0] == measured[-1]["nll"]


UNIT = 3


def sampling_fit(folder, lines=None, stopped_at=None, killed_at=None, **changes):
    """A training whose batches come from its parameters: before every third update, a target that is x + 1.

    Returns the state, and every sample with its number.
    """
    loop, samples = make_loop(lines, total_steps=12, save_unit=UNIT, **changes), []
    with train.training(
        toy_state(), loss_fn=toy_loss, optimizer=SGD, checkpoints=Checkpoints(folder), loop=loop
    ) as trainer:
        while not trainer.done:
            with trainer.between_steps() as params:
                number, x = trainer.step // UNIT, float(params["x"][0])
                if number == stopped_at:
                    raise Stopped
                if number == killed_at:
                    raise Killed
            samples.append((number, x))
            trainer.log({"mean": x})
            for _ in range(UNIT):
                trainer.update(SimpleBatch(jnp.float32(x + 1), np.ones((1, 3), np.int32)))
        trainer.finish()
    return trainer.state, samples


def test_batches_made_from_the_present_parameters(tmp_path):
    lines = []
    _, samples = sampling_fit(tmp_path, lines)
    moved = 1 - 0.8**UNIT
    np.testing.assert_allclose(samples, [(number, number * moved) for number in range(4)], rtol=1e-5)
    assert [line["step"] for line in lines if "mean" in line] == [0, 3, 6, 9]


def test_checkpoints_come_between_units_of_steps(tmp_path):
    """Checkpoints every fifth step come every third, after whole units; stopped in a sample, between two, or killed,
    training resumes with the sample that comes next and ends the same."""
    straight, _ = sampling_fit(tmp_path / "straight")
    with pytest.raises(Stopped):
        sampling_fit(tmp_path / "in", stopped_at=2, save_every=100)
    with pytest.raises(Stopped):
        sampling_fit(tmp_path / "between", stop_requested=lambda step: step >= 4, save_every=100)
    with pytest.raises(Killed):
        sampling_fit(tmp_path / "killed", killed_at=2, save_every=5)
    for name in ("in", "between", "killed"):
        assert int(Checkpoints(tmp_path / name).restore(toy_state()).step) == 6
        state, samples = sampling_fit(tmp_path / name)
        assert_trees_equal(state, straight)
        assert [number for number, _ in samples] == [2, 3]
    with pytest.raises(Killed):
        sampling_fit(tmp_path / "late", killed_at=3, save_every=100)
    assert int(Checkpoints(tmp_path / "late").restore(toy_state()).step) == 0


EVERY, PATIENCE = 5, 3


def overfitting(folder, kill_at=None, stopped_measure=lambda: False, **changes):
    """Five examples learned by heart, measured on the same sequences with other rewards; with the lines written."""

    def measure(params):
        if stopped_measure():
            raise Stopped
        return {"nll": float(nll(params))}

    rng = np.random.default_rng(3)
    learned = helpers.random_examples(rng, count=5)
    held_out = make_batch(helpers.random_examples(rng, count=40), rows=40, width=10)
    batches = Batches(learned, rows=2, bucket=12, seed=1)
    nll = jax.jit(lambda params: bag_loss(params, held_out)[0])
    lines = []
    loop = dict(total_steps=120, evaluate_every=EVERY, patience=PATIENCE, log=lines.append) | changes
    loop["measure"] = measure
    state = bag_fit(folder, batches if kill_at is None else killed_at(kill_at, batches), "adamw", "constant", **loop)
    return state, [line for line in lines if "loss" not in line], nll


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    return overfitting(tmp_path_factory.mktemp("straight"))


def test_an_over_fitting_guide_is_stopped_and_the_best_is_returned(tmp_path, overfitted):
    """Stopped so many evaluations after the best; returned is what a training up to the best would have ended with."""
    state, lines, nll = overfitted
    figures = [line["nll"] for line in lines]
    best = int(np.argmin(figures))
    assert 0 < best and len(figures) == best + 1 + PATIENCE and int(state.step) == (best + 1 + PATIENCE) * EVERY < 120
    assert lines[-1]["best_step"] == (best + 1) * EVERY
    assert float(nll(state.params)) == figures[best] < figures[-1] - 0.005
    until, *_ = overfitting(tmp_path, total_steps=(best + 1) * EVERY, patience=0)
    assert_trees_equal(state.params, until.params)


@pytest.mark.slow
@pytest.mark.parametrize("after_best", [-2, 6, 13])
def test_patience_goes_on_where_it_was_stopped(tmp_path, overfitted, after_best):
    """Killed before the best evaluation or after it, and after a checkpoint or before: the same best, at the same
    step, returned and in the final checkpoint, which is not taken up again."""
    straight, lines, _ = overfitted
    with pytest.raises(Killed):
        overfitting(tmp_path, kill_at=lines[-1]["best_step"] + after_best)
    state, resumed, _ = overfitting(tmp_path)
    assert_trees_equal(state, straight)
    assert resumed == lines[-len(resumed) :]
    assert_trees_equal(Checkpoints(tmp_path).restore(straight), straight)
    again, none, _ = overfitting(tmp_path)
    assert_trees_equal(again, straight)
    assert not none


@pytest.mark.parametrize("at", [7, 8, 20])
def test_a_training_that_is_told_to_stop_saves_that_step_and_goes_on_from_it(tmp_path, at):
    """Between two checkpoints, at one, and after the last step: the end is that of one that never stopped."""
    with pytest.raises(Stopped):
        toy_fit(tmp_path / "stopped", stop_requested=lambda step: step == at)
    kept = Checkpoints(tmp_path / "stopped")
    assert int(kept.restore(toy_state()).step) == at and not kept.finished()
    batches = Numbers()
    state = toy_fit(tmp_path / "stopped", batches)
    assert batches.asked == list(range(at, 20)) and Checkpoints(tmp_path / "stopped").finished()
    assert_trees_equal(state, toy_fit(tmp_path / "straight"))


def test_several_processes_agree_to_stop_every_few_steps(monkeypatch):
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop.multihost, "everywhere", lambda condition: condition)
    monkeypatch.setattr(loop.sigterm, "requested", lambda: True)
    assert [step for step in range(1, 30) if loop.told_to_stop(step)] == [8, 16, 24]
    assert [step for step in range(1, 101) if loop.told_to_stop(step, every=25)] == [25, 50, 75, 100]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["after the step", "in the evaluation", "in the last evaluation"])
def test_patience_goes_on_where_a_training_was_told_to_stop(tmp_path, overfitted, when):
    """At the step of the best evaluation, which is then still to come."""
    straight, lines, _ = overfitted
    best = lines[-1]["best_step"]
    at = lines[-1]["step"] if when == "in the last evaluation" else best
    asked = []

    def stop_requested(step):
        asked.append(step)
        return when == "after the step" and step == at

    with pytest.raises(Stopped):
        overfitting(
            tmp_path,
            stop_requested=stop_requested,
            stopped_measure=lambda: when != "after the step" and asked[-1] == at,
        )
    assert asked[-1] == at
    state, resumed, _ = overfitting(tmp_path)
    assert_trees_equal(state, straight)
    assert resumed == lines[-len(resumed) :] and resumed[0]["step"] == at


def bad_from(step, what):
    """A loss that goes wrong at a step: nan itself, or finite with a gradient that is nan."""

    def loss_fn(params, batch):
        loss, metrics = toy_loss(params, batch)
        if what == "loss":
            return jnp.where(batch.step >= step, jnp.nan, loss), metrics
        # sqrt has an infinite slope at 0, and 0 * inf is nan.
        return loss + 0 * jnp.sqrt(jnp.where(batch.step >= step, 0.0, 1.0) + 0 * jnp.sum(params["x"])), metrics

    return loss_fn


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(("step", "seen"), [(6, 8), (7, 8), (8, 10), (19, 20)])
def test_a_loss_that_is_not_finite_stops_and_the_last_good_checkpoint_stays(tmp_path, what, step, seen):
    """With the phase, the step and what to do; also where the last step before saving is the first bad one."""
    message = refusal(toy_fit, tmp_path, loss_fn=bad_from(step, what), name="round 2: fit")
    assert "round 2: fit" in message and f"step {seen}" in message and "learning rate" in message
    kept = Checkpoints(tmp_path)
    state = kept.restore(toy_state())
    assert int(state.step) == step // 4 * 4 and np.isfinite(state.params["x"]).all() and not kept.finished()
    assert int(toy_fit(tmp_path).step) == 20  # and training goes on from it


def test_training_stops_early_when_told_to(tmp_path):
    """Asked at every line with its averages; then it is finished, and is not taken up again."""
    asked = []

    def stop(means):
        asked.append(means["accuracy"])
        return means["accuracy"] > 0.55

    state = toy_fit(tmp_path, stop=stop)
    assert int(state.step) == 8
    np.testing.assert_allclose(asked, [0.15, 0.4, 0.6], rtol=1e-5)  # steps 0 to 3, 4, and 5 to 7
    batches = Numbers()
    assert int(toy_fit(tmp_path, batches, stop=stop).step) == 8 and not batches.asked
