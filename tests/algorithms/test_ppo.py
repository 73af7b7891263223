"""PPO's parts against a brute-force loop, against REINFORCE, and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular
import tree_policies as trees
from hypothesis import given, settings
from hypothesis import strategies as st

from qsharp_jax.algorithms import ppo, reinforce

ETA, LAMBDA = 0.2, 0.9


@functools.cache
def setting():
    tree = tabular.random_tree(np.random.default_rng(2), vocab=3, depth=3, stop=0.3, final_rewards=(0.0, 1.0))
    sequences = trees.Sequences(tree)
    return sequences, *map(jnp.float32, trees.random_tables(np.random.default_rng(0), tree))


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from([0.0, 0.7, 1.0]))
def test_gae_is_the_weighted_sum_of_temporal_differences(seed, lengths, gae_lambda):
    """A_t = sum_l lambda^l (r_{t+l} + V_{t+l+1} - V_{t+l}), one by one, with V = 0 past the end."""
    rng, most = np.random.default_rng(seed), max(lengths)
    mask = np.arange(most) < np.asarray(lengths)[:, None]
    rewards, values = (np.where(mask, rng.normal(size=mask.shape), 0) for _ in range(2))
    got = ppo.advantages(rewards, values, gae_lambda)
    for row, length in enumerate(lengths):
        v = [*values[row, :length], 0.0]
        for t in range(length):
            want = sum(
                gae_lambda ** (k - t) * (rewards[row, k] + v[k + 1] - v[k]) for k in range(t, length)
            )  # fmt: skip
            np.testing.assert_allclose(got[row, t], want, atol=1e-9)
        np.testing.assert_array_equal(got[row, length:], 0)


def test_at_lambda_1_the_returns_are_samples_of_the_objective():
    """Their mean over all sequences is what the oracle gives: E reward - eta KL, from the first token on."""
    sequences, logits, values = setting()
    every = np.arange(len(sequences.rewards))
    sampled = sequences.sampled(logits, values, every)
    returns = ppo.token_targets(sampled, eta=ETA, gae_lambda=1.0)["returns"]
    probability = np.exp(sequences.log_probs(logits).sum(1))
    table = np.where(sequences.tree.pi_ref > 0, jax.nn.softmax(logits), 0)
    reward, kl = tabular.evaluate(sequences.tree, table)
    np.testing.assert_allclose(probability @ returns[:, 0], reward[0] - ETA * kl[0], atol=1e-5)


def test_at_ratio_1_the_gradient_is_reinforce_with_the_same_advantages():
    """PPO's mean is over tokens and REINFORCE's over responses: a factor of their numbers lies between."""
    sequences, logits, values = setting()
    which = np.asarray([0, 3, 5, 7])
    numbers = ppo.token_targets(sequences.sampled(logits, values, which), eta=ETA, gae_lambda=LAMBDA)
    batch = sequences.batch(numbers, which)
    clipped = functools.partial(ppo.loss, clip=0.2, value_weight=0.0)

    def gradient(loss):
        return jax.grad(lambda logits: sequences.loss(loss, logits, values, batch, which)[0])(logits)

    tokens = sequences.mask[which].sum()
    want = gradient(reinforce.loss) * len(which) / tokens
    assert np.abs(want).max() > 0.01
    np.testing.assert_allclose(gradient(clipped), want, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # within the clip: -rho A, with the slope -rho A in log pi
        (1.5, 2.0, -2.4, 0.0),  # too far up already: held at (1 + eps) A
        (0.5, 2.0, -1.0, -1.0),  # down though it is good: not held
        (0.5, -2.0, 1.6, 0.0),  # too far down already
        (1.5, -2.0, 3.0, 3.0),  # up though it is bad: not held
    ],
)
def test_the_clip_by_hand(ratio, advantage, loss, slope):
    sequences, _, _ = setting()
    which = np.flatnonzero(sequences.mask.sum(1) == 1)[:1]
    numbers = {"old_log_probs": np.zeros((1, 3)), "advantages": np.full((1, 3), advantage), "returns": np.zeros((1, 3))}
    batch = sequences.batch(numbers, which)

    def of(log_ratio):
        log_probs = jnp.zeros(batch.tokens.shape).at[0, 1].set(log_ratio)
        return ppo.loss(log_probs, jnp.zeros(batch.tokens.shape), batch, batch, clip=0.2, value_weight=0.0)[0]

    got = jax.value_and_grad(of)(jnp.log(ratio))
    np.testing.assert_allclose(got, (loss, slope), atol=1e-5)


def test_the_values_are_drawn_to_the_returns():
    sequences, logits, values = setting()
    which = np.asarray([1, 4, 7])
    numbers = ppo.token_targets(sequences.sampled(logits, values, which), eta=ETA, gae_lambda=LAMBDA)
    batch = sequences.batch(numbers, which)
    zero = sequences.batch(numbers | {"advantages": np.zeros_like(numbers["advantages"])}, which)
    loss = functools.partial(ppo.loss, clip=0.2, value_weight=0.5)
    got = sequences.loss(loss, logits, values, zero, which)[0]
    mask = sequences.mask[which]
    squares = (np.asarray(sequences.values(values))[which] - numbers["returns"]) ** 2
    np.testing.assert_allclose(got, 0.5 * squares[mask].mean(), rtol=1e-5)
    assert sequences.loss(loss, logits, values, batch, which)[1]["clipped"] == 0
