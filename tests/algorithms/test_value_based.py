"""A run's fit: from the shards of its workdir to a guide in it."""

import itertools
import math

import helpers
import jax
import numpy as np
import pytest
from checkpoints import flip, largest
from helpers import assert_trees_equal

from qsharp_jax.algorithms import value_based
from qsharp_jax.data.records import Rollout, write_shard
from qsharp_jax.models import hf, value
from qsharp_jax.run import models


def write_rollouts(session, number, prompts=30):
    """Rollouts of fixed length whose reward is told by their first token."""
    rng = np.random.default_rng(number)
    made = []
    for index in range(prompts):
        response, name = [*rng.integers(3, 9, 4).tolist(), 2], f"p{number}-{index}"
        made.append(Rollout(name, number, [1, 3, 4], response, number - 1, float(response[0] % 2), True, 0.5, 0, ""))
    write_shard(session.workdir.rollouts(number), 0, made)


def test_the_fit_of_a_run(tmp_path):
    """pi_ref's arrays survive; the guide is fitted to all rounds but held-out prompts, is measured on those, and is
    what is loaded later: without the auxiliary heads, which lie in the checkpoint for resuming alone."""
    session = helpers.session(tmp_path, "fit.future_offsets=2", "fit.evaluate_every=5", "fit.patience=9")
    ref = helpers.random_model(models.tokenizer(session).vocab_size)
    before = jax.tree.map(np.array, ref.params)
    for number in (1, 2):
        write_rollouts(session, number)
    data = value_based.aggregate(session, 2)
    guide = value_based.fit(session, 2, ref, data, None)
    assert_trees_equal(jax.tree.map(np.asarray, ref.params), before)
    assert set(guide.params) == {"trunk", "head"} and guide.params["head"]["kernel"].any()
    assert_trees_equal(models.load_guide(session, 2).params, guide.params)

    *_, averages, last = session.workdir.read_metrics()
    assert averages["phase"] == last["phase"] == "round 2: fit"
    assert {"nll", "brier", "future_nll"} <= set(averages)
    assert {"nll", "brier", "calibration_error", "ranking", "best_step"} <= set(last)
    measured = {line["step"]: line["nll"] for line in session.workdir.read_metrics() if "ranking" in line}
    assert set(measured) == {*range(5, last["step"], 5), last["step"]}
    assert measured[last["best_step"]] == min(measured.values())
    # 60 rollouts less those held out, in batches of 8, twice over.
    assert 2 * math.ceil(40 / 8) <= last["step"] < 2 * math.ceil(60 / 8)


@pytest.mark.parametrize("error, metric", [("nll", "nll"), ("squared", "brier")])
def test_the_guide_that_is_kept_has_the_least_of_what_is_minimized(tmp_path, monkeypatch, error, metric):
    session = helpers.session(tmp_path, "fit.evaluate_every=2", "fit.patience=9")
    write_rollouts(session, 1)
    held_out = itertools.count()

    def quality(*args, **options):
        """One falls from evaluation to evaluation, the other rises."""
        number = float(next(held_out))
        return {"nll": -number, "brier": -number} | {metric: number}

    monkeypatch.setattr(value_based.score, "quality", quality)
    ref = helpers.random_model(models.tokenizer(session).vocab_size)
    value_based.fit(session, 1, ref, value_based.aggregate(session, 1), None, error=error)
    last = session.workdir.read_metrics()[-1]
    assert last["best_step"] == 2 < last["step"]


@pytest.mark.parametrize("warm", [True, False])
def test_a_warm_start_is_from_the_guide_of_the_round_before(tmp_path, warm):
    """With next to no learning rate the fit ends where it began: at that guide, or at pi_ref with a head of zeros."""
    session = helpers.session(tmp_path, f"fit.warm_start={warm}", "fit.optimizer.learning_rate=1e-12", "fit.epochs=1")
    ref = helpers.random_model(models.tokenizer(session).vocab_size)
    before = helpers.random_guide(ref.config, seed=3)
    write_rollouts(session, 1)
    write_rollouts(session, 2)
    guide = value_based.fit(session, 2, ref, value_based.aggregate(session, 2), before)
    start = before.params if warm else value.init(jax.random.key(0), guide.config, ref.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), guide.params, start)


def test_the_distribution_is_chosen_by_all_processes_or_by_none(tmp_path, monkeypatch):
    """One that reads it when another has just written it still chooses, and waits for the others."""
    session = helpers.session(tmp_path, "value.distribution=auto")
    write_rollouts(session, 1)
    waits = []
    monkeypatch.setattr(value_based.multihost, "wait_for_all", waits.append)
    value_based.aggregate(session, 1)
    assert session.workdir.read_distribution() == ("bernoulli", ()) and len(waits) == 1
    value_based.aggregate(session, 1)
    assert len(waits) == 1
    monkeypatch.setattr(value_based.multihost, "everywhere", lambda condition: False)
    value_based.aggregate(session, 1)
    assert len(waits) == 2


def test_a_guide_that_starts_from_an_exported_one_keeps_its_distribution(tmp_path):
    ref = helpers.random_model(20)
    hf.export_guide(helpers.random_guide(ref.config), tmp_path / "guide")
    session = helpers.session(tmp_path / "run", "value.distribution=auto", f"guide={tmp_path / 'guide'}")
    write_rollouts(session, 1)
    assert len(value_based.aggregate(session, 1)) == 30
    assert session.workdir.read_distribution() is None


def test_a_fit_whose_merged_guide_is_damaged_writes_it_again(tmp_path, capfd):
    """From the checkpoint of its LoRA, as often as it is damaged."""
    session = helpers.session(tmp_path, "fit.lora_rank=2")
    ref = helpers.random_model(models.tokenizer(session).vocab_size)
    write_rollouts(session, 1)
    data = value_based.aggregate(session, 1)
    guide, folder = value_based.fit(session, 1, ref, data, None), session.workdir.guide_folder(1)
    for aside in ("damaged", "damaged-2"):
        (last,) = [path for path in folder.iterdir() if path.name.isdecimal()]
        flip(largest(last / "params"), 5000)
        capfd.readouterr()
        assert_trees_equal(value_based.fit(session, 1, ref, data, None).params, guide.params)
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
        assert line.startswith(f"the checkpoint {last} is damaged (")
        assert line.endswith(f"; it is kept as {last}.{aside}, and it is written again")
        assert_trees_equal(session.for_fitting(models.load_guide(session, 1)).params, guide.params)
