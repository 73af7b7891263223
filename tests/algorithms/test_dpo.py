"""DPO's optimum against the oracle, RPO's loss by hand, and the pairs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import tabular
import tree_policies as trees
from hypothesis import given, settings
from hypothesis import strategies as st

from qsharp_jax.algorithms import dpo
from qsharp_jax.algorithms.policy_scores import PolicyBatch
from qsharp_jax.data.records import Rollout, Rollouts

BETA = 0.4


def test_the_minimiser_is_the_optimal_policy_of_the_rewards_behind_the_preferences():
    """Preferences by Bradley-Terry, P(a over b) = sigmoid(r_a - r_b), over all pairs of responses: then the log-ratios
    of the minimiser differ by (r_a - r_b) / beta, and it is pi* at eta = beta."""
    tree = tabular.random_tree(
        np.random.default_rng(11), vocab=2, depth=3, stop=0.3, final_rewards=tuple(np.linspace(-1, 1, 9))
    )
    sequences = trees.Sequences(tree)
    count = len(sequences.rewards)
    chosen, rejected = (place.reshape(-1) for place in np.indices((count, count)))
    weight = 1 / (1 + np.exp(sequences.rewards[rejected] - sequences.rewards[chosen]))
    batches = [
        sequences.batch({"ref_log_probs": sequences.ref_log_probs[list(pair)]}, pair)
        for pair in zip(chosen, rejected, strict=True)
    ]
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)  # one pair each
    loss = functools.partial(dpo.loss, beta=BETA, alpha=0.0)

    def of_pair(logits, batch, pair):
        return sequences.loss(loss, logits, np.zeros(len(tree.reward)), batch, pair)[0]

    @jax.jit
    @jax.value_and_grad
    def expected(flat):
        logits = flat.reshape(tree.pi_ref.shape)
        pairs = jnp.stack([chosen, rejected], axis=1)
        return (weight * jax.vmap(functools.partial(of_pair, logits))(batches, pairs)).sum()

    found = scipy.optimize.minimize(
        lambda flat: [np.float64(x) for x in expected(flat)], np.zeros(tree.pi_ref.size), jac=True,
        options={"gtol": 1e-6},
    )  # fmt: skip
    log_ratio = np.asarray((sequences.log_probs(found.x.reshape(tree.pi_ref.shape)) - sequences.ref_log_probs).sum(1))
    want = (sequences.rewards - sequences.rewards[0]) / BETA
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(log_ratio - log_ratio[0], want, atol=0.02)  # the minimum is flat in float32
    _, _, optimal = tabular.soft_bellman(tree, BETA)
    got = np.asarray(jax.nn.softmax(found.x.reshape(tree.pi_ref.shape)))
    np.testing.assert_allclose(got[tree.inner], optimal[tree.inner], atol=2e-3)


def test_rpo_by_hand():
    """One pair and a row of padding in each half: chosen of two tokens, rejected of one."""
    sequences = trees.Sequences(tabular.random_tree(np.random.default_rng(1), vocab=2, depth=2, stop=0.5))
    lengths = sequences.mask.sum(1)
    two, one = np.flatnonzero(lengths == 2)[0], np.flatnonzero(lengths == 1)[0]
    ref = np.asarray([[-1.0, -2.0], [-0.7, 0.0]])
    batch = sequences.batch({"ref_log_probs": ref}, [two, one])
    rows = [np.asarray(leaf) for leaf in (batch.tokens, batch.segments, batch.positions, batch.response_mask)]
    spread = [np.stack([leaf[0], 0 * leaf[0], leaf[1], 0 * leaf[1]]) for leaf in rows]
    numbers = {"ref_log_probs": np.insert(batch.numbers["ref_log_probs"], [1, 2], 0.0, axis=0)}
    batch = PolicyBatch(*spread, numbers)
    log_probs = jnp.float32([[0, -0.5, -1.5], [0, 0, 0], [0, -0.9, 0], [0, 0, 0]])

    chosen, rejected = (-0.5 - 1.5) - (-1.0 - 2.0), -0.9 - -0.7
    preferred = math.log(1 + math.exp(-BETA * (chosen - rejected)))
    for alpha, want in [(0.0, preferred), (1.0, preferred + 2.0 / 2), (0.3, preferred + 0.3 * 2.0 / 2)]:
        got, metrics = dpo.loss(log_probs, jnp.zeros_like(log_probs), batch, batch, beta=BETA, alpha=alpha)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        np.testing.assert_allclose(metrics["margin"], BETA * (chosen - rejected), rtol=1e-6)


def test_at_pi_ref_the_loss_is_log_2_whatever_the_pair():
    sequences = trees.Sequences(tabular.random_tree(np.random.default_rng(4), vocab=3, depth=3))
    which = np.asarray([0, 7, 3, 1])
    batch = sequences.batch({"ref_log_probs": sequences.ref_log_probs[which]}, which)
    with np.errstate(divide="ignore"):
        logits = np.where(sequences.tree.pi_ref > 0, np.log(sequences.tree.pi_ref), 0)
    loss = functools.partial(dpo.loss, beta=BETA, alpha=0.0)
    got, _ = sequences.loss(loss, logits, np.zeros(len(sequences.tree.reward)), batch, which)
    np.testing.assert_allclose(got, math.log(2), rtol=1e-6)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=12))
def test_pairs_are_all_of_one_prompt_with_different_rewards(made):
    data = [Rollout(f"p{p}", 1, [1], [2] * (i + 1), 0, r, True, 0.1, 0, "") for i, (p, r) in enumerate(made)]
    pairs, skipped = dpo.make_pairs(Rollouts.of(data))
    want = {(i, j) for i, (p, r) in enumerate(made) for j, (q, s) in enumerate(made) if p == q and r > s}
    assert {(pair.chosen, pair.rejected) for pair in pairs} == want and len(pairs) == len(want)
    assert all(len(pair) == 2 + max(pair.chosen, pair.rejected) for pair in pairs)
    with_pair = {made[i][0] for i, _ in want}
    assert skipped == len({p for p, _ in made} - with_pair)


def test_an_empty_half_counts_for_nothing():
    empty = PolicyBatch(
        *(np.zeros((4, 3), kind) for kind in (int, int, int, bool)), {"ref_log_probs": np.zeros((4, 3))}
    )
    zeros = jnp.zeros((4, 3))
    loss, _ = dpo.loss(zeros, zeros, empty, empty, beta=BETA, alpha=1.0)
    assert float(loss) == 0.0
