"""What the policy methods share: scores against a decoder in numpy, batches in parts, and runs on a task with an optimum."""

import contextlib
import dataclasses
import functools
import re
import tempfile

import bandit_task as bandit
import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
from checkpoints import flip, largest
from marks import slow

from qsharp_jax import decoding, report, train
from qsharp_jax.algorithms import dpo, klq, policy_based, policy_scores, ppo, reinforce
from qsharp_jax.algorithms.policy_based import LIMITS, OnPolicyTraining, check_gaps
from qsharp_jax.algorithms.registry import ALGORITHMS
from qsharp_jax.data.batches import Example
from qsharp_jax.data.records import Rollout, Rollouts, read_rounds
from qsharp_jax.evaluation import measure
from qsharp_jax.models import lora
from qsharp_jax.run import config as configs
from qsharp_jax.run import models
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import registry
from qsharp_jax.train.damage import DamagedError

V, PADDED = 11, 3
MODEL = helpers.random_model(V, seed=1, scale=2.0)
EXAMPLES = [Example([1, 2, 3], [4, 5]), Example([6], [7, 1, 2, 3]), Example([2, 2], [7]), Example([3, 1], [2, 4, 6])]


def with_value_head(params):
    return params | {policy_scores.VALUE_HEAD: helpers.random_params({"kernel": jnp.zeros((32, 1)), "bias": jnp.zeros(1)}, 3)}


def scorer(**changes):
    return policy_scores.Scorer(**dict(config=MODEL.config, temperature=1.0, vocab_size=V, detach_values=True) | changes)


def test_log_probabilities_and_values_are_those_of_a_decoder_in_numpy():
    """At a temperature of its own, with ids that pad the vocabulary; V is of the state before the token."""
    by, params = scorer(temperature=0.7, vocab_size=V - PADDED), with_value_head(MODEL.params)
    batch = policy_scores.make_batch(EXAMPLES, {}, range(4), rows=5, width=8)
    log_probs, values = jax.jit(by)(params, batch)
    exact, head = numpy_decoder.to_float64(MODEL.params), numpy_decoder.to_float64(params[policy_scores.VALUE_HEAD])
    want_log_probs, want_values = np.zeros(log_probs.shape), np.zeros(log_probs.shape)
    for row, example in enumerate(EXAMPLES):
        tokens = [*example.prompt, *example.response]
        hidden = numpy_decoder.hidden(exact, MODEL.config, tokens)
        logits = numpy_decoder.logits(exact, MODEL.config, hidden)[:, : V - PADDED] / 0.7
        for place in range(len(example.prompt), len(example)):
            before = logits[place - 1] - logits[place - 1].max()
            want_log_probs[row, place] = before[tokens[place]] - np.log(np.exp(before).sum())
            want_values[row, place] = (hidden[place - 1] @ head["kernel"] + head["bias"])[0]
    np.testing.assert_allclose(log_probs, want_log_probs, atol=1e-5)
    np.testing.assert_allclose(values, want_values, atol=1e-5)


@pytest.mark.parametrize("detached", [slow(True), False])
def test_the_values_error_moves_the_trunk_unless_they_are_detached(detached):
    """Either way all of it is learned by the head, and log-probabilities move the trunk as they would without it."""
    params, batch = with_value_head(MODEL.params), policy_scores.make_batch(EXAMPLES, {}, range(4), rows=4, width=8)

    def gradient(of, detach_values):
        by = scorer(detach_values=detach_values)
        grads = dict(jax.jit(jax.grad(lambda params: of(*by(params, batch)).sum()))(params))
        return grads.pop(policy_scores.VALUE_HEAD), grads

    head, trunk = gradient(lambda _, values: (values - 1) ** 2, detached)
    chex.assert_trees_all_close(head, gradient(lambda _, values: (values - 1) ** 2, False)[0], atol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(trunk))
    assert largest == 0 if detached else largest > 0.1
    of_log_probs = gradient(lambda log_probs, _: log_probs, detached)[1]
    plain = jax.grad(lambda params: scorer()(params, batch)[0].sum())(MODEL.params)
    chex.assert_trees_all_close(of_log_probs, dict(plain), atol=1e-5)


NUMBERS = ("old_log_probs", "ref_log_probs", "advantages", "returns", "targets")
LOSSES = {
    "reinforce": reinforce.loss,
    "ppo": functools.partial(ppo.loss, clip=0.1, value_weight=0.5),
    "klq": functools.partial(klq.loss, tau=0.3),
    "rpo": functools.partial(dpo.loss, beta=0.3, alpha=1.0),
}


@pytest.mark.parametrize("name", [slow(name) if name in ("klq", "rpo") else name for name in LOSSES])
def test_a_step_on_a_batch_in_parts_is_that_of_the_whole(name):
    """Responses of several lengths, and rows of padding: parts add up to the whole's means."""
    rng, params = np.random.default_rng(0), with_value_head(MODEL.params)
    numbers = {key: rng.normal(size=(4, 4)) for key in NUMBERS}
    # Of pairs the chosen come first, then the rejected; one place of each is empty.
    rows = [0, 1, 2, None, 2, 3, 0, None] if name == "rpo" else [0, 1, None, 2, 3]
    batch = policy_scores.make_batch(EXAMPLES, numbers, rows, rows=8, width=8)
    loss = functools.partial(policy_based._loss, by=scorer(), loss=LOSSES[name])
    optimizer = train.make_optimizer(helpers.optimizer_config(clip=1.0))
    state = train.init_state(params, optimizer)
    whole, parts = (
        jax.jit(functools.partial(train.train_step, loss_fn=loss, optimizer=optimizer, accumulate=count))(
            state, batch, 1.0
        )[1]
        for count in (1, 2)
    )
    assert whole["gradient_norm"] > 0.01
    for key in whole:
        np.testing.assert_allclose(parts[key], whole[key], rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.fixture(autouse=True, scope="module")
def bandit_is_a_task():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.TASKS, "bandit", bandit.TASK)
        yield


def run(session, ref, after_round=lambda number, guide: None):
    return ALGORITHMS[session.config.algorithm].run(session, ref, after_round)


@functools.cache
def trained(name):
    """A finished run: the session, the reference, the policy, and how many programs there were after each batch."""
    programs, sample = [], OnPolicyTraining.sample

    def counting(training, index):
        rollout_batch = sample(training, index)
        functions = (decoding.decode, decoding.prefill, policy_scores._score)
        programs.append(sum(function._cache_size() for function in functions))
        return rollout_batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnPolicyTraining, "sample", counting)
        session = bandit.session(tempfile.mkdtemp(), name)
        ref = bandit.reference(session)
        return session, ref, run(session, ref), programs


@pytest.mark.parametrize(
    "name", ["reinforce", slow("ppo"), slow("klq")]
)
def test_the_regularised_optimum_is_nearly_reached(name):
    """0.95 of it, from a reference at a good deal less; the learning curve is in the metrics, rollouts are on disk."""
    session, ref, made, programs = trained(name)
    before, best = bandit.exact_objective(session, ref, ref)
    after, _ = bandit.exact_objective(session, ref, made)
    assert before < 0.7 * best and after > 0.95 * best
    lots = [line for line in session.workdir.read_metrics() if "objective" in line]
    assert len(lots) == 20 and sum(line["rollouts"] for line in lots) == 1280
    assert np.mean([line["objective"] for line in lots[-3:]]) > np.mean([line["objective"] for line in lots[:3]]) + 0.1
    assert max(line["log_prob_gap"] for line in lots) < 1e-4
    assert len(programs) == 20 and programs[0] == programs[-1], "new weights compile nothing"
    assert len(read_rounds(session.workdir.path / "rollouts", [1])) == 1280
    helpers.assert_trees_equal(models.load_guide(session, 1).params, made.params)


def test_a_policy_is_measured_and_reported_like_a_guide():
    session, ref, made, _ = trained("reinforce")
    rows = measure.evaluate(session, ref, {1: made}, full=True)
    assert [row["method"] for row in rows] == [
        "pi_ref", "pi_ref_greedy", "pi_ref_top_k", "reinforce", "reinforce_greedy",
    ]  # fmt: skip
    objective, _ = bandit.exact_objective(session, ref, made)
    assert rows[3]["eta"] == configs.kl_weight(session.config) and rows[3]["n"] == 60 and rows[3]["kl"] > 0.1
    assert rows[3]["reward"] - configs.kl_weight(session.config) * rows[3]["kl"] == pytest.approx(objective, abs=0.15)
    assert re.search(r"\| REINFORCE +\| 0.2 ", report.write(session.workdir))
    assert {"learning.png", "frontier.png"} <= {path.name for path in session.workdir.path.iterdir()}


@pytest.mark.parametrize(
    "failing", [slice(0, None, 3), np.r_[0:4, 5, 9, 10], slice(None)], ids=["some", "a prompt", "all"]
)
def test_a_response_without_a_reward_is_learned_from_as_its_prompts_mean_and_recorded_as_none(
    tmp_path, monkeypatch, failing
):
    session = bandit.session(tmp_path, "reinforce", "collect.prompts=8")
    rewards, sample, batches = policy_based.rollouts.rewards, OnPolicyTraining.sample, []

    def some(*args, **kwargs):
        judged = rewards(*args, **kwargs)
        judged[failing] = np.nan
        return judged

    monkeypatch.setattr(policy_based.rollouts, "rewards", some)
    monkeypatch.setattr(OnPolicyTraining, "sample", lambda *args: batches.append(sample(*args)) or batches[-1])
    if isinstance(failing, slice) and failing == slice(None):
        with pytest.raises(UserError, match="no response of a batch has a reward; fix the reward function"):
            run(session, bandit.reference(session))
    else:
        run(session, bandit.reference(session))
    recorded = read_rounds(tmp_path / "rollouts", [1]).rewards.astype(float)
    assert np.isnan(recorded[failing]).all() and np.isnan(recorded).sum() == len(recorded[failing])
    for batch in batches:
        expected = []
        for prompt in recorded.reshape(-1, 4):  # float32 on the disk
            judged = prompt[~np.isnan(prompt)]
            mean = judged.mean() if len(judged) else np.nanmean(recorded)
            expected += [mean if np.isnan(reward) else reward for reward in prompt]
        np.testing.assert_allclose(batch.rewards, expected, rtol=1e-6)
        (line,) = [line for line in session.workdir.read_metrics() if "objective" in line]
        assert line["reward"] == pytest.approx(np.nanmean(recorded))


def test_a_response_without_a_reward_neither_pushes_its_siblings_nor_is_pushed():
    """With one and with two failed of four: the judged ones' leave-one-out advantages still add up to 0."""
    rewards = policy_based.fill_rewards(np.asarray([np.nan, 0.1, 0.2, 0.6, 0.9, np.nan, 0.5, np.nan]), 4)
    examples = [Example([1], [2], reward=reward) for reward in rewards.tolist()]
    ones, zeros = np.ones((8, 1), bool), np.zeros((8, 1))
    batch = policy_based.RolloutBatch(examples, 4, ones, zeros, zeros, zeros)
    advantages = reinforce.token_targets(batch, eta=0.3, baseline="leave_one_out")["advantages"].reshape(2, 4)
    np.testing.assert_allclose(advantages[[0, 1, 1], [0, 1, 3]], 0, atol=1e-12)
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-12)
    assert advantages[0, 3] > 0.3 and advantages[1, 0] > 0.2


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    """Killed while it samples the fourth batch, after a checkpoint at the second: the same policy, bit for bit."""
    settings = ("ppo", "collect.prompts=64", "fit.save_every=4", "ppo.epochs=2")
    straight, killed = bandit.session(tmp_path / "straight", *settings), bandit.session(tmp_path / "killed", *settings)
    ref, sample = bandit.reference(straight), OnPolicyTraining.sample

    def dying(training, index):
        if index == 3:
            raise Killed
        return sample(training, index)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(OnPolicyTraining, "sample", dying)
        run(killed, ref)
    assert "4" in {path.name for path in (killed.workdir.guide_folder(1) / "training").iterdir()}
    want, got = run(straight, ref), run(killed, ref)
    helpers.assert_trees_equal(got.params, want.params)
    for session, steps in ((straight, [0, 2, 4, 6]), (killed, [0, 2, 4, 4, 6])):
        assert [line["step"] for line in session.workdir.read_metrics() if "objective" in line] == steps
    lines = len(killed.workdir.read_metrics())
    helpers.assert_trees_equal(run(killed, ref).params, want.params)
    assert len(killed.workdir.read_metrics()) == lines, "a finished run computes nothing again"


@pytest.mark.parametrize(("name", "then"), [("ppo", "it is written again"), ("dpo", "training resumes from step 12")])
def test_a_run_whose_last_policy_is_damaged_mends_it(name, then, tmp_path, capfd):
    """Without its value head PPO's is written from the training's own checkpoint, DPO's trained from the one before."""
    settings = ("collect.prompts=16", "fit.save_every=4", "ppo.epochs=2", "dpo.epochs=1", "policy.batch_size=8")
    session = bandit.session(tmp_path, name, *settings)
    ref = bandit.reference(session)
    policy, folder = run(session, ref), session.workdir.guide_folder(1)
    last = max((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    flip(largest(last / "params"), 5000)
    with pytest.raises(DamagedError, match=f"{last} is damaged .*; run its training again"):
        models.load_guide(session, 1)
    capfd.readouterr()
    helpers.assert_trees_equal(run(session, ref).params, policy.params)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert line.startswith(f"the checkpoint {last} is damaged") and line.endswith(f"{last}.damaged, and {then}")
    helpers.assert_trees_equal(models.load_guide(session, 1).params, policy.params)


def test_sampler_and_trainer_that_differ_are_told_apart(tmp_path):
    session = bandit.session(tmp_path, "reinforce", "policy.log_prob_limit=1e-12")
    with pytest.raises(UserError, match="reinforce, round 1, batch 0: .* limit is 1e-12, .*log_prob_limit"):
        run(session, bandit.reference(session))


@pytest.mark.parametrize(
    ("share", "gap", "passes"),
    [
        (1.0, 3e-6, {"float32", "bfloat16"}),  # rounding of float32, as measured
        (1.0, 1e-3, {"bfloat16"}),  # TF32
        (0.002, 3.0, {"bfloat16"}),  # a few tokens far apart, as in bfloat16
        (0.02, 3.0, set()),  # too many of them, with a small mean
        (1.0, 0.1, set()),
        (1.0, np.nan, set()),
    ],
)
def test_the_limit_is_the_dtype_s_and_of_the_mean_and_a_quantile(share, gap, passes):
    gaps = np.where(np.arange(10_000) < share * 10_000, gap, 0.0)
    passed = set()
    for dtype, limit in LIMITS.items():
        with contextlib.suppress(ValueError):
            check_gaps(gaps, limit)
            passed.add(dtype)
    assert passed == passes


def test_dpo_learns_from_pairs_of_two_rounds(tmp_path):
    """The reward rises; a round's pairs and skipped prompts are counted, and a finished round is loaded."""
    session = bandit.session(tmp_path, "dpo", "rounds=2", "collect.prompts=40", "dpo.epochs=3")
    ref, kept = bandit.reference(session), {}
    made = run(session, ref, kept.__setitem__)
    data = read_rounds(session.workdir.path / "rollouts", [1, 2])
    assert len(data) == 2 * 40 * 4 and all(rollout.switch == 0 for rollout in data)
    pairs, skipped = dpo.make_pairs(data)
    *_, line = [line for line in session.workdir.read_metrics() if "pairs" in line]
    assert (line["pairs"], line["skipped_prompts"], line["prompts"]) == (len(pairs), skipped, 80)
    (first, best), (second, _) = bandit.exact_objective(session, ref, ref), bandit.exact_objective(session, ref, made)
    assert first + 0.2 < second < best
    helpers.assert_trees_equal(run(session, ref).params, made.params)
    helpers.assert_trees_equal(models.load_guide(session, 1).params, kept[1].params)


def test_no_pairs_at_all_are_refused_with_how_many_prompts_were_skipped(tmp_path):
    session = bandit.session(tmp_path, "rpo", "collect.prompts=7")
    rollouts = [Rollout(f"p{i % 7}", 1, [1], [2], 0, float(i % 7 > 3), True, 1.0, 0, "") for i in range(28)]
    ref = bandit.reference(session)
    with pytest.raises(UserError, match="rpo has no pairs to learn from: all 7 prompts were skipped"):
        dpo.fit(session, 1, ref, None, Rollouts.of(rollouts))


# --- LoRA on pi_ref's own arrays, and bfloat16 ---------------------------------------------------------------------------


def gradient(params, config=MODEL.config, **changes):
    """The gradient of the sum of log-probabilities."""
    by, batch = scorer(config=config, **changes), policy_scores.make_batch(EXAMPLES, {}, range(4), rows=4, width=8)
    return jax.jit(jax.grad(lambda params: by(params, batch)[0].sum()))(params)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_a_lora_as_wide_as_the_kernels_has_the_whole_gradient(remat):
    """With A = 1 the gradient of scale * A B is the kernel's own, times the scale; the base is in the form for decoding."""
    dense = gradient(MODEL.params)["layers"]
    base = decoding.for_decoding(MODEL).params
    width = MODEL.config.embed
    params = lora.add(jax.random.key(0), base, rank=width, alpha=2.0 * width)
    for layer in params["layers"]:
        for module in layer.values():
            if "lora_a" in module and module["lora_a"].shape == (width, width):
                module["lora_a"] = jnp.eye(width)
    learned, frozen = lora.split(params, ())
    by_layer = gradient(lora.join(learned, frozen), remat=remat)["layers"]
    for number, layer in enumerate(by_layer):
        for name in ("query", "key", "value", "output", "gate", "up"):
            whole = 2.0 * dense[name]["kernel"][number]
            np.testing.assert_allclose(layer[name]["lora_b"], whole, atol=1e-4 * float(jnp.abs(whole).max()), err_msg=name)
    assert frozen["layers"][0]["query"]["weight"] is base["layers"][0]["query"]["weight"]


def test_the_gradient_in_bfloat16_is_that_in_float32_but_for_rounding():
    """Gradients of float32 masters, as float32 arrays."""
    exact = gradient(MODEL.params)
    rounded = gradient(MODEL.params, dataclasses.replace(MODEL.config, dtype="bfloat16"))
    for path, leaf in jax.tree.leaves_with_path(exact):
        other = functools.reduce(lambda tree, entry: tree[entry.key], path, rounded)
        assert other.dtype == jnp.float32
        cosine = jnp.vdot(leaf, other) / (jnp.linalg.norm(leaf) * jnp.linalg.norm(other))
        assert cosine > 0.99, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_a_policy_with_a_lora_learns_on_pi_ref_s_own_arrays(tmp_path):
    settings = ("fit.lora_rank=4", "collect.prompts=128", "rounds=2", "policy.optimizer.learning_rate=0.03")
    session = bandit.session(tmp_path, "reinforce", *settings)
    ref = decoding.for_decoding(bandit.reference(session))
    before = jax.tree.map(np.array, ref.params)
    policy = run(session, ref)
    (first, best), (second, _) = bandit.exact_objective(session, ref, ref), bandit.exact_objective(session, ref, policy)
    assert first + 0.1 < second < best
    helpers.assert_trees_equal(jax.tree.map(np.asarray, ref.params), before)
    assert policy.params["embedding"] is ref.params["embedding"]
    assert policy.params["layers"][0]["up"]["weight"] is ref.params["layers"][0]["up"]["weight"]
    helpers.assert_trees_equal(models.load_guide(session, 2, ref).params, policy.params)
    assert max(line["log_prob_gap"] for line in session.workdir.read_metrics() if "objective" in line) < 1e-4
    merged = policy.replace(params=lora.merged(policy.params))
    assert bandit.exact_objective(session, ref, merged)[0] == pytest.approx(second, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "klq", "dpo"])
def test_methods_in_bfloat16_with_a_lora_come_near_to_float32(name, tmp_path):
    """Sampling and training differ by rounding; what is learned is worth as much."""
    settings = ("fit.lora_rank=4", "policy.log_prob_limit=1", "policy.optimizer.learning_rate=0.03")
    worth = {}
    for dtype in ("float32", "bfloat16"):
        session = bandit.session(tmp_path / dtype, name, *settings, f"fit.dtype={dtype}")
        ref = decoding.for_decoding(bandit.reference(session))
        policy = run(session, ref)
        worth[dtype] = bandit.exact_objective(session, ref, policy)[0] - bandit.exact_objective(session, ref, ref)[0]
    assert worth["float32"] > 0.1 and worth["bfloat16"] > 0.7 * worth["float32"]
