"""Losses against numpy in float64, token by token."""

import functools
import itertools
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal

from qsharp_jax import train
from qsharp_jax.data.batches import Example, make_batch, make_packed_batch, pack
from qsharp_jax.models import decoder, value
from qsharp_jax.system.errors import UserError

V = 11
LM = helpers.random_model(V, seed=5, max_positions=64)


def log_softmax(x):
    x = np.float64(x)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


ATOMS = (-1.0, 0.0, 0.25, 2.0)
REWARDS = {"bernoulli": (0.0, 1.0), "categorical": (-1.0, 0.0, 0.2, 1.3, 2.0), "scalar": (-3.0, 0.5, 7.0)}


def outputs_by_hand(guide, batch):
    """The head's outputs of every token, [B, T, M]: read at the token (V) or, in its own columns, before it (Q)."""
    config, params = guide.config, guide.params
    hidden, _ = decoder.forward(params["trunk"], config.trunk, batch.tokens, batch.segments, batch.positions)
    hidden, kernel = np.float64(hidden), np.float64(params["head"]["kernel"])
    if config.type == "v":
        return hidden @ kernel + np.float64(params["head"]["bias"])
    outputs = np.zeros((*batch.tokens.shape, config.outputs))
    for row, place in itertools.product(*map(range, batch.tokens.shape)):
        if place:  # a row's first token has none
            columns = slice(batch.tokens[row, place] * config.outputs, (batch.tokens[row, place] + 1) * config.outputs)
            outputs[row, place] = hidden[row, place - 1] @ kernel[:, columns]
    return outputs


def nll_by_hand(kind, outputs, reward):
    """One token's negative log-likelihood, and its mean."""
    if kind == "bernoulli":
        p = 1 / (1 + math.exp(-outputs[0]))
        return -math.log(p if reward == 1 else 1 - p), p
    if kind == "scalar":
        return (outputs[0] - reward) ** 2 / 2, outputs[0]
    log_p, upper = log_softmax(outputs), max(1, np.searchsorted(ATOMS, reward))
    share = (reward - ATOMS[upper - 1]) / (ATOMS[upper] - ATOMS[upper - 1])
    return -(1 - share) * log_p[upper - 1] - share * log_p[upper], np.exp(log_p) @ ATOMS


def nll_of_labels(kind, outputs, batch):
    """Mean negative log-likelihood, and mean squared error of the mean, over labelled tokens one by one."""
    found = []
    for place in zip(*np.nonzero(batch.label_mask)):
        reward = float(batch.reward_to_go[place])
        nll, mean = nll_by_hand(kind, np.float64(outputs[place]), reward)
        found.append((nll, (mean - reward) ** 2))
    return np.mean(found, axis=0)


def make_guide(type, kind):
    return helpers.random_guide(LM.config, type=type, distribution=kind, atoms=ATOMS if kind == "categorical" else ())


@functools.cache
def jitted_value_loss(config):
    loss = functools.partial(train.value_loss, config=config)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("kind", REWARDS)
def test_value_loss_is_the_mean_nll_of_labelled_tokens(monkeypatch, kind):
    """Over all labelled tokens of the batch alike, whatever the head put out; a row of padding is no row."""
    rng = np.random.default_rng(1)
    batch = make_batch(helpers.random_examples(rng, rewards=REWARDS[kind]), rows=5, width=10)
    config = make_guide("v", kind).config
    outputs = np.float32(3 * rng.normal(size=(5, 10, config.outputs)))
    monkeypatch.setattr(decoder, "forward", lambda *arguments, **_: (jnp.zeros((5, 10, 1)), None))
    monkeypatch.setattr(value, "read", lambda *arguments: jnp.asarray(outputs))
    loss, metrics = jax.jit(functools.partial(train.value_loss, config=config))({"trunk": {}, "head": {}}, batch)
    nll, brier = nll_of_labels(kind, outputs, batch)
    np.testing.assert_allclose([loss, metrics["nll"], metrics["brier"]], [nll, nll, brier], rtol=1e-5)


@pytest.mark.parametrize(("type", "kind"), [("v", "bernoulli"), ("q", "categorical")])
def test_the_value_of_a_token_is_read_where_it_belongs(type, kind):
    """The same through the model: V-type at the token itself, Q-type before it, in the token's own columns."""
    guide = make_guide(type, kind)
    batch = make_batch(
        helpers.random_examples(np.random.default_rng(1), rewards=REWARDS[kind]), rows=5, width=10
    )
    (loss, _), _ = jitted_value_loss(guide.config)(guide.params, batch)
    np.testing.assert_allclose(loss, nll_of_labels(kind, outputs_by_hand(guide, batch), batch)[0], rtol=2e-5)


@pytest.mark.parametrize(("type", "kind"), [("v", "bernoulli"), ("q", "categorical")])
def test_tokens_without_a_label_and_padding_change_nothing(type, kind):
    """Neither the reward-to-go that stands there, nor the padding's tokens: loss and gradient are the same bits."""
    guide = make_guide(type, kind)
    rng = np.random.default_rng(2)
    batch = make_batch(helpers.random_examples(rng, rewards=REWARDS[kind]), rows=5, width=10)
    other = batch.replace(
        reward_to_go=np.where(batch.label_mask, batch.reward_to_go, rng.choice(REWARDS[kind], batch.tokens.shape)),
        tokens=np.where(batch.segments > 0, batch.tokens, rng.integers(1, V, batch.tokens.shape)),
        positions=np.where(batch.segments > 0, batch.positions, 3),
    )
    assert (other.reward_to_go[batch.response_mask] != batch.reward_to_go[batch.response_mask]).any()
    step = jitted_value_loss(guide.config)
    (loss, _), gradient = step(guide.params, batch)
    (other_loss, _), other_gradient = step(guide.params, jax.tree.map(jnp.asarray, other))
    assert float(loss) == float(other_loss)
    assert_trees_equal(other_gradient, gradient)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))  # and everything learns


def test_a_batch_without_labels_has_loss_and_gradient_zero():
    guide = make_guide("v", "bernoulli")
    batch = make_batch([], rows=5, width=10)
    (loss, _), gradient = jitted_value_loss(guide.config)(guide.params, batch)
    assert loss == 0 and not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_rewards_that_the_guide_cannot_learn_are_refused_before_training():
    """Inside jit a reward out of range would be clipped in silence."""
    bernoulli, categorical, scalar = (make_guide("v", kind).config for kind in REWARDS)
    train.check_rewards(np.asarray([0, 1, 0.5]), bernoulli, clip=False)
    train.check_rewards(np.asarray([-1.0, 2.0]), categorical, clip=False)
    train.check_rewards(np.asarray([-1e9]), scalar, clip=False)
    for rewards, config in [([0, 2], bernoulli), ([3], categorical)]:
        with pytest.raises(UserError, match=f"{config.distribution} guide learns.*reach from .* to {rewards[-1]};"):
            train.check_rewards(np.asarray(rewards, float), config, clip=False)
    for clip in (False, True):
        with pytest.raises(UserError, match="nan"):
            train.check_rewards(np.asarray([np.nan]), bernoulli, clip=clip)


@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
def test_rewards_that_are_clipped_are_counted_and_fitted_as_the_end_of_the_range(kind, capsys):
    guide = make_guide("v", kind)
    low, high = guide.config.range
    train.check_rewards(np.asarray([low, high]), guide.config, clip=True)
    assert capsys.readouterr().out == ""
    train.check_rewards(np.asarray([low, high, high + 1, low - 2]), guide.config, clip=True)
    assert f"50.0% of 4 rewards are outside {low:g} to {high:g}" in capsys.readouterr().out
    losses = {
        reward: train.value_loss(
            guide.params, make_batch([Example([1, 2], [3, 4], reward=reward)], rows=1, width=4), config=guide.config, clip=True
        )[0]
        for reward in (high, high + 1)
    }
    assert losses[high + 1] == losses[high] > 0


@pytest.mark.parametrize("attend_by", ["xla", "blocks"])
def test_language_model_loss_is_cross_entropy_of_response_tokens(attend_by):
    """Each response token, the stop token and the first one among them, from the hidden state before it."""
    batch = make_batch(helpers.random_examples(np.random.default_rng(4)), rows=5, width=10)
    loss_fn = functools.partial(train.language_model_loss, config=LM.config, attend_by=attend_by)
    loss, metrics = jax.jit(loss_fn)(LM.params, batch)
    hidden, _ = decoder.forward(LM.params, LM.config, batch.tokens, batch.segments, batch.positions)
    log_p = log_softmax(np.float64(hidden) @ np.float64(LM.params["head"]))
    places = list(zip(*np.nonzero(batch.response_mask)))
    tokens = [batch.tokens[row, place] for row, place in places]
    before = [log_p[row, place - 1] for row, place in places]
    np.testing.assert_allclose(loss, -np.mean([p[token] for p, token in zip(before, tokens)]), rtol=2e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean([p.argmax() == t for p, t in zip(before, tokens)]))


@pytest.mark.parametrize("offsets", [1, 3, 12])  # 12: further than the batch is wide
def test_future_token_loss_predicts_later_response_tokens_of_successes(offsets):
    """From every response token of a rewarded response, each of the next F tokens that it has; nothing else."""
    rng = np.random.default_rng(6)
    examples = [
        Example([1, 2], [3, 4, 5, 6, 7], reward=1.0),
        Example([1], [8, 9, 10], reward=0.0),
        Example([3, 3, 3], [4, 1], reward=0.5, first_label=1),
        Example([5], [2], reward=1.0),  # nothing comes later
        Example([5], [6, 7], reward=-1.0),
    ]
    batch = make_batch(examples, rows=6, width=8)
    hidden, heads = rng.normal(size=(6, 8, 4)), rng.normal(size=(offsets, 4, V))
    losses = []
    for row, example in enumerate(examples):
        for place, offset in itertools.product(range(len(example.response)), range(1, offsets + 1)):
            if example.reward > 0 and place + offset < len(example.response):
                log_p = log_softmax(hidden[row, len(example.prompt) + place] @ heads[offset - 1])
                losses.append(-log_p[example.response[place + offset]])
    assert len(losses) == {1: 4 + 1, 3: 4 + 3 + 2 + 1, 12: 4 + 3 + 2 + 1 + 1}[offsets]
    loss = jax.jit(train.future_token_loss)(jnp.float32(heads), jnp.float32(hidden), batch)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


def test_without_a_success_there_is_nothing_to_predict():
    batch = make_batch([Example([1], [2, 3, 4], reward=0.0)], rows=1, width=5)
    heads, hidden = jnp.ones((2, 3, V)), jnp.ones((1, 5, 3))
    loss, gradient = jax.jit(jax.value_and_grad(train.future_token_loss, (0, 1)))(heads, hidden, batch)
    assert loss == 0 and not any(leaf.any() for leaf in gradient)


def test_the_auxiliary_loss_is_added_with_its_weight(monkeypatch):
    """From the same hidden states as the value, which learn from both."""
    rng = np.random.default_rng(1)
    batch = make_batch(helpers.random_examples(rng), rows=5, width=10)
    config = make_guide("v", "bernoulli").config
    # A "model" whose trunk is the hidden states themselves.
    monkeypatch.setattr(decoder, "forward", lambda trunk, *rest, **_: (trunk, None))
    monkeypatch.setattr(value, "read", lambda params, config, hidden, tokens: hidden @ params["head"])
    params = {"trunk": jnp.float32(rng.normal(size=(5, 10, 32))), "head": jnp.float32(rng.normal(size=(32, 1)))}
    future = jnp.float32(rng.normal(size=(2, 32, V)))

    def loss(params, **options):
        return train.value_loss(params, batch, config=config, **options)

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    grad_both = jax.jit(jax.value_and_grad(functools.partial(loss, future_weight=0.3), has_aux=True))
    (nll, _), by_nll = grad(params)
    (both, metrics), by_both = grad_both(params | {"future": future})
    grad_auxiliary = jax.jit(jax.value_and_grad(train.future_token_loss, (0, 1)))
    auxiliary, by_auxiliary = grad_auxiliary(future, params["trunk"], batch)
    np.testing.assert_allclose(both, nll + 0.3 * auxiliary, rtol=1e-6)
    np.testing.assert_allclose([metrics["nll"], metrics["future_nll"]], [nll, auxiliary], rtol=1e-6)
    np.testing.assert_allclose(by_both["future"], 0.3 * by_auxiliary[0], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(by_both["trunk"], by_nll["trunk"] + 0.3 * by_auxiliary[1], rtol=1e-4, atol=1e-8)


def packed_and_unpacked():
    """The same eight examples in three rows and in eight; a response begins and ends next to another example's."""
    rng = np.random.default_rng(7)
    examples = helpers.random_examples(rng, count=8, longest=6)
    groups = [[examples[i] for i in group] for group in pack([len(e) for e in examples], 24)]
    assert max(map(len, groups)) > 2
    return make_packed_batch(groups, 5, 24), make_batch(examples, 8, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v", "q", "future", "language model"])
def test_the_loss_of_a_packed_batch_is_that_of_its_examples_apart(name):
    """And its gradient: nothing is read or predicted from one segment to another, with a token shift and learned
    positions too."""
    lm = helpers.random_model(V, seed=5, max_positions=16, positions="learned", token_shift=True)
    if name == "language model":
        params, loss_fn = lm.params, functools.partial(train.language_model_loss, config=lm.config)
    else:
        guide = helpers.random_guide(lm.config, type="q" if name == "q" else "v")
        params = guide.params
        if name == "future":
            params = params | {"future": train.init_future(jax.random.key(0), 3, lm.config)}
        loss_fn = functools.partial(train.value_loss, config=guide.config, future_weight=0.5)
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    packed, unpacked = (step(params, batch) for batch in packed_and_unpacked())
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(unpacked), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_the_first_token_of_a_segment_has_nothing_before_it():
    """Without a prompt: a Q-type reads zeros there, and a language model predicts nothing, packed or not."""
    examples = [Example([], [3, 4, 5], reward=1.0), Example([], [6, 7], reward=0.0)]
    packed, apart = make_packed_batch([examples], 1, 6), make_batch(examples, 2, 3)
    guide = make_guide("q", "bernoulli")
    q_loss = jitted_value_loss(guide.config)
    np.testing.assert_allclose(q_loss(guide.params, packed)[0][0], q_loss(guide.params, apart)[0][0], rtol=1e-6)
    lm_loss = jax.jit(functools.partial(train.language_model_loss, config=LM.config))
    np.testing.assert_allclose(lm_loss(LM.params, packed)[0], lm_loss(LM.params, apart)[0], rtol=1e-6)


@pytest.mark.slow
def test_what_is_done_again_changes_memory_and_nothing_else():
    """One loss and one gradient; the memory that the compiler sets aside falls from keeping all to keeping inputs."""
    lm = helpers.random_model(V, seed=5, max_positions=64, layers=4)
    guide = helpers.random_guide(lm.config)
    examples = helpers.random_examples(np.random.default_rng(1), count=16, longest=30)
    batch = make_batch(examples, rows=16, width=64)
    found, memory = {}, {}
    for remat in ("none", "dots", "full"):
        loss = functools.partial(train.value_loss, config=guide.config, remat=remat)
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(guide.params, batch).compile()
        found[remat], memory[remat] = compiled(guide.params, batch), compiled.memory_analysis().temp_size_in_bytes
    for remat in ("dots", "full"):
        for a, b in zip(jax.tree.leaves(found[remat]), jax.tree.leaves(found["none"]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert memory["none"] > 1.1 * memory["dots"] > 1.2 * memory["full"]
