"""KLQ's gradient identity, and its fixed point against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular
import tree_policies as trees

from qsharp_jax.algorithms import klq, ppo

TAU, LAMBDA, ALPHA = 0.3, 0.8, 0.7


@functools.cache
def setting():
    tree = tabular.random_tree(np.random.default_rng(2), vocab=3, depth=3, stop=0.3, final_rewards=(0.0, 0.5, 1.0))
    sequences = trees.Sequences(tree)
    return sequences, *map(jnp.float32, trees.random_tables(np.random.default_rng(5), tree))


def test_the_gradient_where_it_sampled_is_that_of_a_regularised_policy_gradient():
    """-2 alpha A (tau grad log pi + grad V), with A the GAE of the KL-penalised reward, as PPO has it."""
    sequences, logits, values = setting()
    which = np.asarray([0, 2, 4, 5, 8])
    sampled = sequences.sampled(logits, values, which)
    numbers = klq.token_targets(sampled, tau=TAU, return_lambda=LAMBDA, alpha=ALPHA)
    batch = sequences.batch(numbers, which)

    def loss(tables):
        return sequences.loss(functools.partial(klq.loss, tau=TAU), *tables, batch, which)[0]

    advantages = ppo.token_targets(sampled, eta=TAU, gae_lambda=LAMBDA)["advantages"]
    mask = sequences.mask[which]

    def identity(tables):
        """Linear in log pi and V, so its gradient is the sum of theirs, weighted."""
        q = TAU * sequences.log_probs(tables[0]) + sequences.values(tables[1])
        return (-2 * ALPHA * advantages * q[which] * mask).sum() / mask.sum()

    got, want = jax.grad(loss)((logits, values)), jax.grad(identity)((logits, values))
    for mine, theirs in zip(got, want):
        assert np.abs(theirs).max() > 0.01
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("return_lambda", [0.0, 0.9, 1.0])
def test_the_optimal_policy_and_value_are_its_fixed_point(return_lambda):
    """Q = tau log pi*/pi_ref + V* is the soft action value: every target of every sequence is what is there already."""
    sequences, _, _ = setting()
    q, v, optimal = tabular.soft_bellman(sequences.tree, TAU)
    logits = np.log(np.where(optimal > 0, optimal, 1.0))
    every = np.arange(len(sequences.rewards))
    sampled = sequences.sampled(logits, v, every)
    targets = klq.token_targets(sampled, tau=TAU, return_lambda=return_lambda, alpha=1.0)["targets"]
    want = np.where(sequences.mask, q[sequences.nodes, sequences.tokens], 0)
    np.testing.assert_allclose(targets, want, atol=1e-5)
