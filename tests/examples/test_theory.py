"""How far the tilt by the mean (CD) is from the optimal one, on trees: bounds, and what they become for a large eta.

With kappa the cumulants of z ~ Z(x, y), Q#'s log-weight less CD's is

    log E exp(z / eta) - E z / eta = kappa_2 / (2 eta^2) + kappa_3 / (6 eta^3) + ...,

never negative (Jensen) and at most R^2 / (8 eta^2) for rewards of range R (Hoeffding's lemma). Policies whose log-weights
differ by a function of range B have KL at most B^2 / 8 (Hoeffding's lemma again). By the oracle's identity, what a policy
loses is eta times its KL to the optimal one: CD loses at most H R^4 / (512 eta^3) over H tokens.
"""

import common
import jax
import numpy as np
import pytest
import tabular

from qsharp_jax import guidance, values

REWARDS = (-0.5, 0.0, 0.2, 1.0)
RANGE = 1.5


def random_tree(seed, depth=4):
    return tabular.random_tree(np.random.default_rng(seed), 2 + seed % 3, depth, final_rewards=REWARDS)


def lost(tree, eta, mode):
    """eta KL(policy || pi*_eta): exact also where the objectives agree in all their digits."""
    optimal = tabular.soft_bellman(tree, eta)[2]
    return eta * tabular.evaluate(tree, common.guided(tree, tabular.total_laws(tree), eta, mode), optimal)[1][0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("eta", [0.05, 0.3, 2.0])
def test_qsharps_tilt_with_the_exact_law_is_the_optimal_policy(seed, eta):
    tree = random_tree(seed)
    policy = common.guided(tree, tabular.total_laws(tree), eta)
    np.testing.assert_allclose(policy, tabular.soft_bellman(tree, eta)[2], atol=1e-6)


@pytest.mark.parametrize("eta", [0.1, 0.5, 2.0, 20.0])
def test_cds_log_weight_is_below_qsharps_by_half_the_variance_and_within_hoeffdings_bound(eta):
    tree = random_tree(1)
    laws, atoms = tabular.total_laws(tree)[1:], tabular.totals(tree)[0]
    with jax.enable_x64(True), np.errstate(divide="ignore"):
        z = values.Categorical(np.log(laws)[None], atoms)
        difference = np.asarray(
            guidance.log_weights(z, np.array([eta]), "qsharp") - guidance.log_weights(z, np.array([eta]), "cd")
        )[0]
    assert (difference >= -1e-12).all() and (difference <= RANGE**2 / (8 * eta**2) + 1e-12).all()
    mean = laws @ atoms
    variance, third = (np.sum(laws * (atoms - mean[:, None]) ** k, axis=1) for k in (2, 3))
    if eta == 20:  # the fourth cumulant is at most R^4 / 8 in size, and divided by 24 eta^4
        np.testing.assert_allclose(
            difference, variance / (2 * eta**2) + third / (6 * eta**3), atol=RANGE**4 / 192 / eta**4
        )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("eta", [0.2, 0.5, 2.0])
def test_what_cd_loses_is_within_the_bound_and_qsharp_loses_nothing(seed, eta):
    tree, depth = random_tree(seed), 4
    assert 1e-9 < lost(tree, eta, "cd") <= depth * RANGE**4 / (512 * eta**3)
    assert lost(tree, eta, "qsharp") < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_for_a_large_eta_cd_loses_the_variance_of_the_variances(seed):
    """To the leading order E_{x ~ pi_ref} sum_x Var_{y ~ pi_ref}[Var Z(x, y)] / (8 eta^3): here to one part in a hundred."""
    tree, eta = random_tree(seed), 300.0
    laws, atoms = tabular.total_laws(tree), tabular.totals(tree)[0]
    variance = (laws @ atoms**2 - (laws @ atoms) ** 2)[tree.children(tree.inner)]
    pi_ref = tree.pi_ref[tree.inner]
    spread = np.sum(pi_ref * variance**2, axis=1) - np.sum(pi_ref * variance, axis=1) ** 2
    leading = tabular.reach(tree, tree.pi_ref)[tree.inner] @ spread / (8 * eta**3)
    np.testing.assert_allclose(lost(tree, eta, "cd"), leading, rtol=0.01)
