"""CD and VAS as runs: they learn from pi_ref's own rollouts, by their papers' losses, and tilt as their papers do."""

import common
import helpers
import numpy as np
import pytest
import tabular
from ml_collections import ConfigDict

from qsharp_jax import guidance
from qsharp_jax.algorithms import cd, qsharp, value_based, vas
from qsharp_jax.data.records import Rollout, write_shard
from qsharp_jax.run import models
from qsharp_jax.system.errors import UserError


def write_rollouts(session, number, count=16):
    rng = np.random.default_rng(number)
    made = [
        Rollout(f"{number}-{i}", number, rng.integers(5, 9, 4).tolist(), rng.integers(5, 9, 3).tolist(), 0, i % 2, True,
                np.inf, 0, "")
        for i in range(count)
    ]  # fmt: skip
    write_shard(session.workdir.rollouts(number), 0, made)


@pytest.mark.parametrize(
    ("algorithm", "rounds", "settings"),
    [(cd, 2, ("cd.variant=q", "value.type=q", "fit.accumulate=2")), (vas, 1, ("vas.td_lambda=0.5", "fit.lora_rank=2"))],
    ids=["cd-q", "vas"],
)
def test_a_run_learns_from_rollouts_of_pi_ref_alone(tmp_path, monkeypatch, algorithm, rounds, settings):
    """In Q#'s rounds, each told; no guide rolls in. The guide is what is loaded, and has nothing of the reference."""
    session = helpers.session(tmp_path, f"rounds={rounds}", "fit.epochs=1", "fit.holdout=0", *settings)
    ref, told, asked = helpers.random_model(models.tokenizer(session).vocab_size), {}, []

    def collect(session, number, ref, guide):
        asked.append((number, guide))
        write_rollouts(session, number)

    monkeypatch.setattr(value_based, "collect", collect)
    guide = algorithm.run(session, ref, told.setdefault)
    numbers = list(range(1, rounds + 1))
    assert asked == [(number, None) for number in numbers] and sorted(told) == numbers
    assert models.fitted_rounds(session.workdir) == rounds
    assert set(guide.params) == {"trunk", "head"} and guide.params["head"]["kernel"].any()
    helpers.assert_trees_equal(models.load_guide(session).params, guide.params)
    lines = [line for line in session.workdir.read_metrics() if line["phase"] == f"round {rounds}: fit"]
    assert np.isfinite(lines[0]["squared"]) and "nll" not in lines[0]


def test_cd_by_regression_is_vas_with_lambda_1_and_fudge_goes_by_the_likelihood(tmp_path):
    """The former end with the same parameters, bit for bit."""
    fitted = {}
    for name, algorithm, setting in (
        ("regression", cd, "cd.variant=regression"), ("vas", vas, "vas.td_lambda=1"), ("fudge", cd, "cd.variant=fudge")
    ):  # fmt: skip
        session = helpers.session(tmp_path / name, "fit.epochs=1", "fit.holdout=0", setting)
        write_rollouts(session, 1)
        ref = helpers.random_model(models.tokenizer(session).vocab_size)
        fitted[name] = algorithm.fit(session, 1, ref, value_based.aggregate(session, 1), None).params
        line = session.workdir.read_metrics()[0]
        assert ("nll" in line, "squared" in line) == (name == "fudge", name != "fudge")
    helpers.assert_trees_equal(fitted["vas"], fitted["regression"])
    assert (np.asarray(fitted["fudge"]["head"]["kernel"]) != np.asarray(fitted["vas"]["head"]["kernel"])).any()


def settings(variant, **head):
    return ConfigDict({"cd": {"variant": variant}, "value": {"type": "v", "distribution": "bernoulli"} | head})


def test_fudge_tilts_by_log_p_and_samples_pi_ref_given_success():
    """On a tree with the exact p: pi ∝ pi_ref p, reward 1, KL the logarithm of one over pi_ref's own success."""
    tree = tabular.random_tree(np.random.default_rng(1), vocab=3, depth=4)
    laws = tabular.total_laws(tree)
    policy = common.guided(tree, laws, 0.3, cd.mode(settings("fudge")))
    hopeful = tree.inner[laws[tree.inner, 1] > 0]
    weights = tree.pi_ref[hopeful] * laws[tree.children(hopeful), 1]
    np.testing.assert_allclose(policy[hopeful], weights / weights.sum(axis=1, keepdims=True), atol=1e-12)
    reward, kl = tabular.evaluate(tree, policy)
    np.testing.assert_allclose([reward[0], kl[0]], [1, -np.log(laws[0, 1])])


def test_the_others_tilt_by_the_mean():
    assert {vas.VAS.mode(settings("q")), *(cd.mode(settings(name)) for name in ("regression", "q"))} == {"cd"}
    assert qsharp.QSHARP.mode(settings("q")) == "qsharp"
    assert {"qsharp", "cd", "expectation"} == set(guidance.MODES)


def test_a_variant_that_does_not_go_with_the_head_is_refused():
    for variant in ("regression", "fudge"):
        cd.check(settings(variant))
    cd.check(settings("q", type="q"))
    cd.check(settings("regression", distribution="scalar"))
    with pytest.raises(UserError, match="config.cd.variant fudge learns a probability.*is scalar; give bernoulli"):
        cd.check(settings("fudge", distribution="scalar"))
    with pytest.raises(UserError, match="config.cd.variant q .*give config.value.type=q"):
        cd.check(settings("q"))
