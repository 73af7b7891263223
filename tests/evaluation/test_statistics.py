"""pass@k, majorities and intervals against enumeration, closed forms, and direct computation."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from qsharp_jax.evaluation import statistics


@given(st.sampled_from([(0.0, 1.0), (-1.0, 0.0, 0.25, 0.7, 2.0)]), st.data())
def test_pass_at_k_is_the_mean_of_the_best_over_all_subsets(kinds, data):
    """The indicator that one of k samples is right, for rewards 0 and 1, which is also Chen's formula."""
    rewards = data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=8))
    k, n, right = data.draw(st.integers(1, len(rewards))), len(rewards), int(sum(rewards))
    subsets = [max(subset) for subset in itertools.combinations(rewards, k)]
    assert statistics.pass_at(k, rewards) == pytest.approx(np.mean(subsets))
    if len(kinds) == 2:
        assert statistics.pass_at(k, rewards) == pytest.approx(1 - math.comb(n - right, k) / math.comb(n, k))


def test_pass_at_k_of_many_samples():
    """Binomials beyond the floats' range; of 2 of 2,000 right ones, 1 - (1/2)(999/1999) in 1,000 draws."""
    assert statistics.pass_at(1000, [1.0] * 2 + [0.0] * 1998) == pytest.approx(1 - 0.5 * 999 / 1999)


@pytest.mark.parametrize(
    ("answers", "rewards", "weights", "expected"),
    [
        (["4", "4", "7"], [0, 0, 1], None, 0),
        (["7", "4", "7"], [1, 0, 1], None, 1),
        (["4", "7"], [0, 1], None, 1 / 2),  # by lot
        (["4", "7", "9", "9", "4", "7"], [0, 1, 0, 0, 0, 1], None, 1 / 3),
        ([None, None, "7"], [0, 0, 1], None, 1),  # None is no vote
        ([None, None], [0, 0], None, 0),
        (["4", "4", "7"], [0, 0, 1], [0.2, 0.3, 0.6], 1),
        (["4", "4", "7"], [0, 0, 1], [0.1, 0.2, 0.3], 1 / 2),  # 0.1 + 0.2 is a tie with 0.3, not with floats
        ([None, "4", "7"], [0, 0, 1], [9.0, 0.2, 0.1], 0),
        (["4", "7"], [0, 1], [-2.0, -1.0], 1),  # values of a scalar guide may be negative
        (["4", "7"], [0, 1], [0.0, 0.0], 1 / 2),
    ],
)
def test_majority(answers, rewards, weights, expected):
    weights = np.ones(len(answers)) if weights is None else np.asarray(weights)
    assert statistics.majority(answers, np.asarray(rewards, float), weights) == pytest.approx(expected)


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(1, 3)), min_size=1, max_size=6),
    st.integers(1, 9),
)
def test_a_tie_is_the_mean_over_all_ways_to_break_it(votes, unit):
    """Every order of preference breaks ties in one way, all as likely; neither the votes' order nor the unit matters."""
    reward_of, total = {"a": 1.0, "b": 0.0, "c": 0.25, None: 0.0}, Counter()
    for answer, weight in votes:
        if answer is not None:
            total[answer] += weight
    expected = np.mean(
        [
            reward_of[max(total, key=lambda answer: (total[answer], -order.index(answer)))] if total else 0.0
            for order in itertools.permutations("abc")
        ]
    )
    for order in (votes, votes[::-1], sorted(votes, key=str)):
        answers, weights = zip(*order)
        rewards = [reward_of[answer] for answer in answers]
        assert statistics.majority(answers, rewards, np.asarray(weights) * unit / 7) == pytest.approx(expected)


def test_the_interval_is_the_bootstraps():
    """A sum of resampled 0s and 1s is binomial: the interval's ends are its 2.5% and 97.5% quantiles."""
    for n, right in ((20, 5), (50, 45), (40, 20)):
        p = right / n
        cumulative = np.cumsum([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
        low, high = (np.searchsorted(cumulative, quantile) / n for quantile in (0.025, 0.975))
        found = statistics.bootstrap(np.repeat([1.0, 0.0], [right, n - right]), resamples=20_000)
        np.testing.assert_allclose(found, (low, high), atol=1.01 / n)
    rewards = np.random.default_rng(0).random(400)
    error = 1.96 * rewards.std() / math.sqrt(400)
    expected = (rewards.mean() - error, rewards.mean() + error)
    np.testing.assert_allclose(statistics.bootstrap(rewards), expected, atol=0.1 * error)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """300 evaluations of 60 problems: 95% of their intervals hold the true mean, less what is lost to discreteness."""
    rng = np.random.default_rng(1)
    intervals = [statistics.bootstrap((rng.random(60) < 0.4).astype(float), resamples=400) for _ in range(300)]
    covered = np.mean([low <= 0.4 <= high for low, high in intervals])
    assert 0.90 <= covered <= 0.985


@settings(max_examples=50)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.sampled_from([1 / 8, 0.1, 1 / 3]))
def test_the_interval_holds_the_mean_and_is_the_same_every_time(counts, unit):
    rewards = np.asarray(counts) * unit
    low, high = statistics.bootstrap(rewards, resamples=300)
    assert low <= float(np.mean(rewards)) <= high
    assert rewards.min() - 1e-12 <= low and high <= rewards.max() + 1e-12
    assert statistics.bootstrap(rewards, resamples=300) == (low, high)


def test_the_paired_interval_is_of_differences_on_the_same_problems():
    """Against a loop over the bootstrap's draws: each draws problems, and both methods' rewards at these. Where the two
    move together it is narrower than what their own intervals would give.
    """
    rng = np.random.default_rng(3)
    hard = rng.random(80)
    one, other = (hard + 0.05 * rng.standard_normal(80) + shift for shift in (0.04, 0.0))
    low, high = statistics.bootstrap(one - other)
    draws = np.random.default_rng(0).integers(80, size=(statistics.RESAMPLES, 80))
    means = [one[picks].mean() - other[picks].mean() for picks in draws]
    np.testing.assert_allclose((low, high), np.percentile(means, [2.5, 97.5]), rtol=1e-12)
    assert low < (one - other).mean() < high
    assert high - low < 0.3 * (statistics.bootstrap(one)[1] - statistics.bootstrap(one)[0])


def test_the_pooled_interval_draws_problems_with_all_their_samples():
    """With equal counts it is the interval of the problems' means; with one problem there is nothing to draw."""
    rewards = np.random.default_rng(4).integers(0, 5, 30).astype(float)
    pooled = statistics.bootstrap_pooled(rewards, np.full(30, 4))
    np.testing.assert_allclose(pooled, statistics.bootstrap(rewards / 4), rtol=1e-12)
    assert statistics.bootstrap_pooled(np.asarray([3.0]), np.asarray([4])) == (0.75, 0.75)
    low, high = statistics.bootstrap_pooled(np.asarray([9.0, 0.0]), np.asarray([9, 1]))
    assert (low, high) == (0.0, 1.0)
    draws = np.random.default_rng(0).integers(2, size=(statistics.RESAMPLES, 2)).sum(axis=1)
    assert {0, 1, 2} == set(draws)  # of one problem twice, or both: 0, 9/10, 1


def simulate(rng, seeds, problems, shift=0.0, spread=0.03):
    """Draw for each seed rewards of its own problems under two policies whose means differ by `shift`.

    Each problem is solved with a probability of its own, and a run's mean is off by a normal deviate of `spread`.
    """
    runs = []
    for _ in range(seeds):
        chance = rng.beta(3, 3, problems) * 0.7  # the mean is 0.35
        off = spread * rng.standard_normal(2)
        runs.append([rng.random(problems) < np.clip(chance + by, 0, 1) for by in (off[0], off[1] + shift)])
    return np.asarray(runs, float)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("problems", [300, 500])
def test_the_interval_over_seeds_covers_the_truth_as_often_as_it_says(seeds, problems):
    """2,500 comparisons each: 95% hold the true mean reward, and the true difference of policies on the same problems."""
    rng = np.random.default_rng((seeds, problems))
    reward, difference = [], []
    for _ in range(2500):
        one, other = simulate(rng, seeds, problems, shift=0.1).swapaxes(0, 1)
        low, high = statistics.over_seeds(one)
        reward.append(low <= 0.35 <= high)
        low, high = statistics.over_seeds(other - one)
        difference.append(low <= 0.1 <= high)
    assert 0.935 <= np.mean(reward) <= 0.965
    assert 0.935 <= np.mean(difference) <= 0.965


def test_an_interval_over_the_pooled_problems_is_too_narrow():
    """The reason for `over_seeds`: with three seeds it holds the true mean in about 70% of cases."""
    rng = np.random.default_rng(0)
    intervals = [statistics.bootstrap(simulate(rng, 3, 400)[:, 0].ravel(), resamples=200) for _ in range(300)]
    assert np.mean([low <= 0.35 <= high for low, high in intervals]) < 0.8


def test_the_interval_over_seeds_is_students():
    """Against scipy's, of the means: with three seeds 4.303 standard errors. Of one seed it is over problems."""
    rewards = [np.asarray([0.0, 0.1]), np.asarray([0.6, 0.02, 0.0, 0.632]), np.asarray([0.303])]
    means = [0.05, 0.313, 0.303]
    found = statistics.over_seeds(rewards)
    np.testing.assert_allclose(found, scipy.stats.t(2, np.mean(means), scipy.stats.sem(means)).interval(0.95))
    assert found[1] - found[0] > 0.7, "not the 0.203 .. 0.241 of the pooled problems"
    one = np.random.default_rng(4).integers(0, 2, 30).astype(float)
    assert statistics.over_seeds([one]) == statistics.bootstrap(one)
    assert statistics.seeds_in_words(3) == "3 seeds" and statistics.seeds_in_words(1) == "1 seed, problems alone"


def test_figures_by_name():
    found = statistics.with_interval("reward", [0.0, 1.0, 1.0, 0.0])
    assert found == {"reward": 0.5, "reward_low": 0.0, "reward_high": 1.0}
    samples = [dict(problem_id=name, kl=kl) for name, kl in (("b", 1.0), ("a", 2.0), ("b", 3.0))]
    assert statistics.by_problem(samples, "kl") == [2.0, 2.0]
