"""The oracle itself, against the enumeration of every sequence and against the theorems that it stands for."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import tabular
from hypothesis import given, settings
from hypothesis import strategies as st

examples = settings(max_examples=25)


@st.composite
def trees(draw):
    """Small trees of every shape, some with rewards on the way and some with negative ones."""
    return tabular.random_tree(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        vocab=draw(st.integers(2, 4)),
        depth=draw(st.integers(1, 4)),
        stop=draw(st.sampled_from([0.0, 0.3])),
        final_rewards=draw(st.sampled_from([(0.0, 1.0), (-1.0, 0.3, 2.0)])),
        step_rewards=draw(st.sampled_from([(0.0,), (0.0, 0.1, -0.2)])),
    )


def sequences(tree, policy, node=0):
    """Every continuation of a node: its probability, its reward, and its log pi / pi_ref. One at a time, on purpose."""
    if tree.first_child[node] < 0:
        return [(1.0, 0.0, 0.0)]
    found = []
    for token in range(tree.vocab):
        child = tree.first_child[node] + token
        log_ratio = np.log(policy[node, token] / tree.pi_ref[node, token])
        for probability, reward, rest in sequences(tree, policy, child):
            found.append((policy[node, token] * probability, tree.reward[child] + reward, log_ratio + rest))
    return found


def random_policy(rng, tree):
    policy = np.zeros_like(tree.pi_ref)
    policy[tree.inner] = rng.dirichlet(np.ones(tree.vocab), size=len(tree.inner))
    return policy


@examples
@given(trees())
def test_a_tree_is_well_formed(tree):
    """Every node but the prompt is the child of exactly one node; probabilities sum to one where a token is chosen."""
    children = np.concatenate([tree.children(level).ravel() for level in tree.inner_by_level])
    np.testing.assert_array_equal(np.sort(children), np.arange(1, len(tree.reward)))
    np.testing.assert_array_equal(np.concatenate(tree.inner_by_level), tree.inner)
    np.testing.assert_allclose(tree.pi_ref[tree.inner].sum(axis=1), 1)
    np.testing.assert_array_equal(tree.pi_ref[tree.first_child < 0], 0)


@examples
@given(trees(), st.integers(0, 2**32 - 1))
def test_reward_and_kl_are_those_of_the_enumerated_sequences(tree, seed):
    policy = random_policy(np.random.default_rng(seed), tree)
    reward, kl = tabular.evaluate(tree, policy)
    for node in tree.inner[:5]:
        probability, rewards, log_ratio = np.array(sequences(tree, policy, node)).T
        np.testing.assert_allclose(probability.sum(), 1)
        np.testing.assert_allclose(reward[node], probability @ rewards, atol=1e-12)
        np.testing.assert_allclose(kl[node], probability @ log_ratio, atol=1e-12)


@examples
@given(trees())
def test_laws_are_those_of_the_enumerated_sequences(tree):
    laws = tabular.Laws(tree)
    for node in tree.inner[:10]:
        for token in range(tree.vocab):
            child = tree.first_child[node] + token
            values, probabilities = laws(node, token)
            assert (np.diff(values) > 1e-9).all()
            want = {}
            for probability, reward, _ in sequences(tree, tree.pi_ref, child):
                key = round(tree.reward[child] + reward, 9)
                want[key] = want.get(key, 0) + probability
            np.testing.assert_allclose(values, sorted(want), atol=1e-9)
            np.testing.assert_allclose(probabilities, [want[key] for key in sorted(want)], rtol=1e-9)


@examples
@given(trees())
def test_laws_of_the_total_are_those_of_the_reward_to_go_and_what_has_been_paid(tree):
    """The table of all nodes against the law of each, whose atoms it holds among others."""
    laws, values, table = tabular.Laws(tree), tabular.totals(tree)[0], tabular.total_laws(tree)
    np.testing.assert_allclose(table.sum(axis=1), 1)
    for node in tree.inner[:10]:
        for token in range(tree.vocab):
            support, probabilities = laws(node, token)
            row = table[tree.first_child[node] + token]
            np.testing.assert_allclose(values[row > 0] - tree.paid[node], support, atol=1e-9)
            np.testing.assert_allclose(row[row > 0], probabilities, rtol=1e-9)


@examples
@given(trees(), st.integers(0, 2**32 - 1))
def test_sampled_sequences_pass_the_nodes_that_they_consist_of(tree, seed):
    """Counts add up over children and totals, none goes where the policy does not, and all are there."""
    policy = random_policy(np.random.default_rng(seed), tree)
    policy[0] = np.eye(tree.vocab)[1]
    counts = tabular.sample(tree, policy, 500, np.random.default_rng(seed))
    assert counts[0].sum() == 500 and not counts[tree.first_child[0]].any()
    for node in tree.inner:
        np.testing.assert_array_equal(counts[node], counts[tree.first_child[node] + np.arange(tree.vocab)].sum(axis=0))


def test_frequencies_of_samples_are_the_policys_probabilities():
    """400,000 sequences: within five standard errors of passing every node, and of the laws of the totals."""
    tree = tabular.random_tree(np.random.default_rng(5), 3, 3, final_rewards=(-1.0, 0.0, 2.0))
    counts = tabular.sample(tree, tree.pi_ref, 400_000, np.random.default_rng(0))
    passed, probability = counts.sum(axis=1), tabular.reach(tree, tree.pi_ref)
    assert (abs(passed / 400_000 - probability) <= 5 * np.sqrt(probability / 400_000)).all()
    laws = tabular.total_laws(tree)
    often = passed > 0
    errors = abs(counts[often] / passed[often, None] - laws[often])
    assert (errors <= 5 * np.sqrt(0.25 / passed[often, None])).all() and errors[laws[often] == 0].max() == 0


@examples
@given(trees(), st.sampled_from([0.05, 0.3, 1.0, 20.0]))
def test_soft_bellman_values_are_functionals_of_the_law_under_pi_ref(tree, eta):
    """The paper's theorem: Q*_eta(x, y) = eta log E_{z ~ Z*(x, y)}[exp(z / eta)], a law that knows nothing of eta."""
    q, _, _ = tabular.soft_bellman(tree, eta)
    laws = tabular.Laws(tree)
    for node in tree.inner:
        for token in range(tree.vocab):
            values, probabilities = laws(node, token)
            shift = values.max()
            want = shift + eta * np.log(probabilities @ np.exp((values - shift) / eta))
            np.testing.assert_allclose(q[node, token], want, atol=1e-10)


@examples
@given(trees(), st.sampled_from([0.05, 0.3, 1.0, 20.0]), st.integers(0, 2**32 - 1))
def test_no_policy_beats_the_optimal_one(tree, eta, seed):
    """V*_eta of the prompt is what pi*_eta earns, E reward - eta KL, and others earn less."""
    _, v, optimal = tabular.soft_bellman(tree, eta)

    def objective(policy):
        reward, kl = tabular.evaluate(tree, policy)
        return reward[0] - eta * kl[0]

    np.testing.assert_allclose(objective(optimal), v[0], atol=1e-9)
    other = random_policy(np.random.default_rng(seed), tree)
    for policy in (tree.pi_ref, other, 0.99 * optimal + 0.01 * other):
        assert objective(policy) <= v[0] + 1e-9


@examples
@given(trees(), st.sampled_from([0.05, 1.0]), st.integers(0, 2**32 - 1))
def test_a_policy_loses_eta_times_its_kl_to_the_optimal_one(tree, eta, seed):
    """V*_eta - (E reward - eta KL(pi || pi_ref)) = eta KL(pi || pi*_eta), at every node."""
    _, v, optimal = tabular.soft_bellman(tree, eta)
    policy = random_policy(np.random.default_rng(seed), tree)
    reward, kl = tabular.evaluate(tree, policy)
    np.testing.assert_allclose(v - (reward - eta * kl), eta * tabular.evaluate(tree, policy, optimal)[1], atol=1e-9)


@examples
@given(trees(), st.sampled_from([0.05, 1.0]))
def test_tilting_by_the_optimal_values_gives_the_optimal_policy(tree, eta):
    q, _, optimal = tabular.soft_bellman(tree, eta)
    weights = np.zeros(len(tree.reward))
    weights[tree.children(tree.inner)] = q[tree.inner] / eta
    np.testing.assert_allclose(tabular.tilted(tree, weights), optimal, atol=1e-12)


def test_a_token_that_pi_ref_never_chooses_is_worth_nothing_however_well_it_pays():
    tree = tabular.toy_tree()
    never = dataclasses.replace(tree, pi_ref=np.array([[1.0, 0.0], [0, 0], [0.05, 0.95], [0, 0], [0, 0]]))
    _, v, policy = tabular.soft_bellman(never, 1e-4)
    np.testing.assert_allclose(v[0], 0.1)
    np.testing.assert_array_equal(policy[0], [1, 0])


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_best_of_n_is_that_of_all_lists_of_n_sequences(n, seed):
    """Every list of n sequences, one at a time, gives its probability to the first of its best."""
    tree = tabular.random_tree(np.random.default_rng(seed), 2, 3, final_rewards=(-1.0, 0.3, 2.0), step_rewards=(0, 0.1))
    probability, total = tabular.reach(tree, tree.pi_ref), np.round(tree.paid, 9)
    want = np.zeros(len(tree.reward))
    for several in itertools.product(tree.ends, repeat=n):
        want[max(several, key=lambda end: total[end])] += np.prod(probability[list(several)])
    np.testing.assert_allclose(tabular.reach(tree, tabular.best_of_n(tree, n))[tree.ends], want[tree.ends], atol=1e-12)


def test_best_of_n_keeps_to_its_bound_and_ends_at_the_best():
    """KL at most log n - (n - 1) / n (equal were no two totals the same), while the reward grows to the best there is."""
    tree = tabular.random_tree(np.random.default_rng(2), 4, 4, final_rewards=tuple(np.linspace(0, 1, 50)))
    last = tabular.evaluate(tree, tree.pi_ref)[0][0]
    for n in (2, 4, 16, 64, 1024):
        reward, kl = (x[0] for x in tabular.evaluate(tree, tabular.best_of_n(tree, n)))
        bound = math.log(n) - (n - 1) / n
        assert last < reward and 0.5 * bound < kl <= bound
        last = reward
    reward = tabular.evaluate(tree, tabular.best_of_n(tree, 10**9))[0][0]
    np.testing.assert_allclose(reward, tree.paid[tree.ends].max(), atol=1e-6)


@examples
@given(trees())
def test_values_go_from_the_mean_to_the_best_reward_as_eta_falls(tree):
    _, weak, policy = tabular.soft_bellman(tree, 1e7)
    np.testing.assert_allclose(weak, tabular.evaluate(tree, tree.pi_ref)[0], atol=1e-6)
    np.testing.assert_allclose(policy, tree.pi_ref, atol=1e-6)
    _, strong, _ = tabular.soft_bellman(tree, 1e-5)
    best = max(reward for _, reward, _ in sequences(tree, tree.pi_ref))
    np.testing.assert_allclose(strong[0], best, atol=1e-3)


def test_kl_of_pi_ref_is_zero_and_of_an_impossible_token_infinite():
    tree = tabular.toy_tree()
    assert tabular.evaluate(tree, tree.pi_ref)[1][0] == 0
    excluded = dataclasses.replace(tree, pi_ref=np.array([[1.0, 0.0], [0, 0], [0.05, 0.95], [0, 0], [0, 0]]))
    assert tabular.evaluate(excluded, tree.pi_ref)[1][0] == np.inf


@pytest.mark.parametrize("eta", [0.3, 0.1, 0.01])
def test_toy_tree_separates_the_mean_from_the_optimal_value(eta):
    """On the way right the mean is 0.05, less than the 0.1 on the left; Q*_eta is near 1 for a small eta."""
    tree = tabular.toy_tree()
    laws = tabular.Laws(tree)
    np.testing.assert_allclose(laws(0, 0), ([0.1], [1.0]))
    np.testing.assert_allclose(laws(0, 1), ([0, 1], [0.95, 0.05]))
    q, _, _ = tabular.soft_bellman(tree, eta)
    np.testing.assert_allclose(q[0], [0.1, eta * np.log(0.95 + 0.05 * np.exp(1 / eta))])
    assert q[0, 1] > q[0, 0]


def test_a_hundred_thousand_nodes_are_no_trouble():
    tree = tabular.random_tree(np.random.default_rng(0), vocab=5, depth=7, stop=0.0)
    assert len(tree.reward) == 97656
    _, v, _ = tabular.soft_bellman(tree, 0.1)
    values, probabilities = tabular.Laws(tree)(0, 0)
    assert 0 < v[0] <= 1 and set(values) <= {0.0, 1.0}
    np.testing.assert_allclose(probabilities.sum(), 1)
    # And the same by another way: the objective of the policy that tilts pi_ref by the laws.
    weights = np.log(tabular.total_laws(tree) @ np.exp(tabular.totals(tree)[0] / 0.1))
    reward, kl = tabular.evaluate(tree, tabular.tilted(tree, weights))
    np.testing.assert_allclose(reward[0] - 0.1 * kl[0], v[0])
