"""Targets of values: TD(lambda) against sums written out, and fixed points against the exact values of a tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular
from helpers import random_examples, random_guide, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from qsharp_jax import train
from qsharp_jax.data.batches import Example, make_batch, make_packed_batch
from qsharp_jax.models import decoder
from qsharp_jax.models.config import make
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.train import targets

V = 11
LM = random_model(V, seed=5, max_positions=64)


def packed_batch(rng):
    """Rows of several segments, one behind the other, and padding."""
    examples = [random_examples(rng, count=3, rewards=(-1.0, 0.5, 2.0)) for _ in range(2)]
    return make_packed_batch(examples, rows=3, width=32)


def returns_by_hand(means, batch, decay):
    """sum_k (1 - lambda) lambda^k V_t+1+k over the tokens still to come, and lambda^n of the reward: token by token."""
    found = {}
    for row in range(len(means)):
        for segment in range(1, batch.segments[row].max(initial=0) + 1):
            places = np.flatnonzero((batch.segments[row] == segment) & batch.response_mask[row])
            reward = batch.reward_to_go[row, places[-1]]
            for i, place in enumerate(places):
                later = means[row, places[i + 1 :]].astype(float)
                weights = (1 - decay) * decay ** np.arange(len(later))
                found[row, place] = weights @ later + decay ** len(later) * reward
    return found


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.95, 1.0]))
def test_lambda_returns_are_the_sums_written_out(seed, decay):
    """In packed rows: nothing goes from one response to another, and a last token has its reward."""
    rng = np.random.default_rng(seed)
    batch = packed_batch(rng)
    means = np.float32(rng.normal(size=batch.tokens.shape))
    got = targets.lambda_returns(means, batch.reward_to_go, targets.last_tokens(batch), decay)
    for place, want in returns_by_hand(means, batch, decay).items():
        np.testing.assert_allclose(got[place], want, atol=1e-5)


def test_lambda_1_is_the_regression_on_the_reward_and_other_targets_have_no_gradient():
    """The same loss and gradient; and for lambda 0.5 those of the same numbers put in by hand."""
    guide = random_guide(LM.config, type="q", distribution="scalar")
    rng = np.random.default_rng(1)
    batch = make_batch(random_examples(rng, rewards=(-3.0, 0.5, 7.0)), rows=4, width=10)
    loss = functools.partial(train.value_loss, config=guide.config, error="squared")
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames="targets")

    def returns(decay):
        return functools.partial(targets.td_lambda, config=guide.config, decay=decay)

    for got, want in zip(
        jax.tree.leaves(gradient(guide.params, batch, targets=returns(1.0))),
        jax.tree.leaves(gradient(guide.params, batch)),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)  # two programs may round differently
    hidden, _ = decoder.forward(guide.params["trunk"], LM.config, batch.tokens, batch.segments, batch.positions)
    numbers = returns(0.5)(guide.params, hidden, batch)
    (got, metrics), got_gradient = gradient(guide.params, batch, targets=returns(0.5))
    (want, want_metrics), want_gradient = gradient(guide.params, batch.replace(reward_to_go=numbers))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got_gradient, want_gradient)
    assert float(metrics["squared"]) == float(got) != float(metrics["brier"]) / 2  # against the observed reward
    assert abs(metrics["brier"] - want_metrics["brier"]) > 0.01


def test_squared_error_is_of_the_mean_whatever_the_head():
    guide = random_guide(LM.config)  # Bernoulli
    batch = make_batch(random_examples(np.random.default_rng(1)), rows=4, width=10)
    loss, metrics = jax.jit(functools.partial(train.value_loss, config=guide.config, error="squared"))(
        guide.params, batch
    )
    np.testing.assert_allclose(loss, metrics["brier"] / 2, rtol=1e-6)


TREE = tabular.random_tree(np.random.default_rng(4), vocab=3, depth=4, stop=0.3, final_rewards=(-1.0, 0.2, 1.0))
PADDED = TREE.vocab + 2  # columns of the embedding; the last two are of no token


@pytest.fixture
def table(monkeypatch):
    """Every sequence of the tree, once, in a batch; and models whose hidden state is the node, told by one number."""
    paths = [[0]]
    for level in TREE.inner_by_level:
        inner = set(level.tolist())
        paths = [
            q
            for p in paths
            for q in ([[*p, c] for c in TREE.children(np.array([p[-1]]))[0]] if p[-1] in inner else [p])
        ]
    examples = [
        Example([0], [(c - TREE.first_child[p]).item() for p, c in zip(path, path[1:])], TREE.paid[path[-1]].item())
        for path in paths
    ]
    batch = make_batch(examples, rows=len(examples), width=6)
    nodes = np.zeros(batch.tokens.shape, int)
    for row, path in enumerate(paths):
        nodes[row, : len(path)] = path
    hidden = jax.nn.one_hot(nodes, len(TREE.reward))
    monkeypatch.setattr(decoder, "forward", lambda *arguments, **settings: (hidden, None))
    return batch, nodes


def trunk():
    return make("tiny", vocab_size=PADDED, embed=len(TREE.reward))


def solve(params, batch, weights, loss, sweeps):
    """Moves every number of the table to its target, by the loss's own gradient; the targets move along."""
    gradient = jax.jit(jax.grad(lambda params: loss(params, batch)[0]))
    for _ in range(sweeps):
        kernel = params["head"]["kernel"] - np.where(weights > 0, gradient(params)["head"]["kernel"] / weights, 0)
        params = params | {"head": params["head"] | {"kernel": kernel}}
    return np.asarray(params["head"]["kernel"])


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_the_fixed_point_of_td_is_the_expected_reward(table, decay):
    """Among the batch's sequences that pass a node: to it, their frequencies are the policy."""
    batch, nodes = table
    config = ValueConfig(trunk(), distribution="scalar")
    params = {"trunk": {}, "head": {"kernel": jnp.zeros((len(TREE.reward), 1)), "bias": jnp.zeros(1)}}
    labelled = nodes[batch.label_mask]
    weights = np.bincount(labelled, minlength=len(TREE.reward))[:, None] / len(labelled)
    loss = functools.partial(
        train.value_loss, config=config, error="squared",
        targets=functools.partial(targets.td_lambda, config=config, decay=decay),
    )  # fmt: skip
    got = solve(params, batch, np.maximum(weights, 1e-9), loss, sweeps=30)[:, 0]
    rewards = TREE.paid[nodes.max(axis=1)]  # a sequence's last node has the highest number
    want = [rewards[(nodes == node).any(axis=1)].mean() for node in np.unique(labelled)]
    np.testing.assert_allclose(got[np.unique(labelled)], want, atol=1e-5)


@pytest.mark.parametrize(
    "sampling", [dict(temperature=1.0, top_k=0, top_p=1.0), dict(temperature=0.6, top_k=2, top_p=1.0)], ids=str
)
def test_the_fixed_point_of_cd_q_is_the_expected_reward_under_pi_ref_as_it_was_sampled(table, sampling):
    """However often the batch has a sequence: the expectation over next tokens is pi_ref's own, not the batch's."""
    batch, nodes = table
    config = ValueConfig(trunk(), type="q", distribution="scalar")
    with np.errstate(divide="ignore"):
        logits = np.where(TREE.pi_ref > 0, np.log(np.where(TREE.pi_ref > 0, TREE.pi_ref, 1)), 0)
    ref_head = np.pad(logits, ((0, 0), (0, 2)), constant_values=9.0)  # what pads is never drawn, whatever its logit
    kernel = np.zeros((len(TREE.reward), PADDED), np.float32)
    kernel[:, TREE.vocab :] = 100.0
    params = {"trunk": {}, "head": {"kernel": jnp.asarray(kernel)}, "ref": {"head": jnp.float32(ref_head)}}
    weights = np.zeros(kernel.shape)
    for row, place in zip(*np.nonzero(batch.label_mask)):
        weights[nodes[row, place - 1], batch.tokens[row, place]] += 1 / batch.label_mask.sum()
    bellman = functools.partial(
        targets.bellman, config=config, ref_config=trunk(), sampling=sampling, vocab_size=TREE.vocab
    )
    loss = functools.partial(train.value_loss, config=config, error="squared", targets=bellman)
    got = solve(params, batch, weights, loss, sweeps=len(TREE.inner_by_level))

    policy = np.where(TREE.pi_ref > 0, np.exp(logits / sampling["temperature"]), 0)
    if sampling["top_k"]:
        policy[policy < np.sort(policy, axis=1)[:, [-sampling["top_k"]]]] = 0
    policy[TREE.inner] /= policy[TREE.inner].sum(axis=1, keepdims=True)
    expected = TREE.paid + tabular.evaluate(TREE, policy)[0]
    np.testing.assert_allclose(got[TREE.inner, : TREE.vocab], expected[TREE.children(TREE.inner)], atol=1e-5)


def test_the_backup_of_exact_values_is_exact():
    """In float64, by levels from the root: E[reward-to-go] is the one table that the backup leaves as it is."""
    expected = TREE.paid + tabular.evaluate(TREE, TREE.pi_ref)[0]
    table, last = np.zeros(len(TREE.reward)), TREE.first_child < 0
    with jax.enable_x64(True):
        for _ in range(len(TREE.inner_by_level) + 1):
            following = np.zeros_like(table)
            following[TREE.inner] = np.sum(TREE.pi_ref[TREE.inner] * table[TREE.children(TREE.inner)], axis=1)
            table = np.asarray(targets.backup(following[None], TREE.paid[None], last[None])[0])
    np.testing.assert_allclose(table, expected, atol=1e-14)
