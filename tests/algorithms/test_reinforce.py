"""REINFORCE's estimator, averaged over every draw that there can be, is the objective's gradient."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular
import tree_policies as trees

from qsharp_jax.algorithms import reinforce

ETA = 0.3


@functools.cache
def setting():
    tree = tabular.random_tree(np.random.default_rng(1), vocab=2, depth=2, stop=0.5, final_rewards=(0.0, 0.4, 1.0))
    sequences = trees.Sequences(tree)
    assert sequences.mask.sum(1).tolist() == [2, 2, 1]
    logits, values = trees.random_tables(np.random.default_rng(0), tree)
    return sequences, jnp.float32(logits), values


def objective(logits):
    """E reward - eta KL(pi || pi_ref) by enumeration."""
    sequences, _, _ = setting()
    log_probs = sequences.log_probs(logits).sum(1)
    regularised = sequences.rewards - ETA * (log_probs - sequences.ref_log_probs.sum(1))
    return (jnp.exp(log_probs) * regularised).sum()


def expected_gradient(samples, baseline):
    """Of `samples` independent responses to the one prompt, over all that may come, by their probabilities."""
    sequences, logits, values = setting()
    probability = np.exp(sequences.log_probs(logits).sum(1))

    @jax.jit
    def gradient(logits, batch, which):
        return jax.grad(lambda logits: sequences.loss(reinforce.loss, logits, values, batch, which)[0])(logits)

    total = 0
    for which in itertools.product(range(len(probability)), repeat=samples):
        which = np.asarray(which)
        sampled = sequences.sampled(logits, values, which, samples)
        batch = sequences.batch(reinforce.token_targets(sampled, eta=ETA, baseline=baseline), which)
        total += probability[which].prod() * -gradient(logits, batch, which)
    return total


@pytest.mark.parametrize("samples", [2, 3])
def test_leave_one_out_is_unbiased(samples):
    _, logits, _ = setting()
    want = jax.grad(objective)(logits)
    assert np.abs(want).max() > 0.05
    np.testing.assert_allclose(expected_gradient(samples, "leave_one_out"), want, atol=1e-6)


def test_the_mean_of_all_is_shorter_by_a_share_and_points_the_same_way():
    """A response's own reward is in its baseline: (n - 1) / n of the gradient is left."""
    _, logits, _ = setting()
    np.testing.assert_allclose(expected_gradient(3, "mean"), 2 / 3 * jax.grad(objective)(logits), atol=1e-6)


def test_the_gradient_of_the_objective_is_zero_at_the_optimal_policy():
    """The same enumeration against the oracle: what is ascended has its top at pi*."""
    sequences, _, _ = setting()
    _, value, optimal = tabular.soft_bellman(sequences.tree, ETA)
    logits = np.log(np.where(optimal > 0, optimal, 1.0))
    np.testing.assert_allclose(jax.grad(objective)(jnp.float32(logits)), 0, atol=1e-6)
    np.testing.assert_allclose(objective(logits), value[0], atol=1e-6)
