"""Statistics of judged samples: pass@k, majorities, and 95% intervals over problems, or over seeds.

Shapes: n problems.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import scipy.special

RESAMPLES = 2000  # of the bootstrap


def pass_at(k: int, rewards: Sequence[float]) -> float:
    """Return the expected best reward of k of a problem's n samples, drawn without replacement, 1 <= k <= n.

    With rewards 0 and 1 this is 1 - C(n - c, k) / C(n, k) for c right samples: the unbiased estimator of pass@k (Chen
    et al. 2021, arXiv 2107.03374).
    """
    subsets = math.comb(len(rewards), k)
    # In ascending order, sample i is the best of C(i, k - 1) of the subsets.
    return float(sum(math.comb(i, k - 1) / subsets * reward for i, reward in enumerate(np.sort(rewards))))


def majority(answers: Sequence[str | None], rewards: Sequence[float], weights: Sequence[float]) -> float:
    """Return the expected reward of the answer with the most weight; ties are drawn at random, None does not vote."""
    votes: dict[str, float] = defaultdict(float)
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            votes[answer] += float(weight)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, weight in votes.items() if weight >= most - 1e-9]
    reward_of = dict(zip(answers, rewards, strict=True))
    return float(np.mean([reward_of[answer] for answer in winners]))


def bootstrap(per_problem: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95% percentile interval of the mean over problems (Efron 1979), with a fixed seed."""
    means = np.asarray(per_problem)[_picks(len(per_problem), resamples)].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_pooled(sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the interval of the mean over samples, given each problem's sums and (positive) counts, [n]."""
    picks = _picks(len(sums), resamples)
    low, high = np.percentile(sums[picks].sum(axis=1) / counts[picks].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def over_seeds(per_seed: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the 95% interval of the mean over seeds, by Student's t over the seeds' means; it may exceed [0, 1].

    An interval over the pooled problems of all seeds is too narrow, because runs differ by more than their problems do:
    with three runs of standard deviation 0.03 it covers the true mean in 7 of 10 cases. A single seed gets the interval
    over its problems.

    Args:
      per_seed: for each seed, the rewards by problem, or the differences between two methods on the same problems.
    """
    if len(per_seed) == 1:
        return bootstrap(per_seed[0])
    means = np.asarray([np.mean(rewards) for rewards in per_seed])
    width = scipy.special.stdtrit(len(means) - 1, 0.975) * means.std(ddof=1) / math.sqrt(len(means))
    return float(means.mean() - width), float(means.mean() + width)


def seeds_in_words(count: int) -> str:
    """Describe what an interval of `over_seeds` covers."""
    return "1 seed, problems alone" if count == 1 else f"{count} seeds"


@functools.lru_cache(2)  # an evaluation computes dozens of statistics of the same problems
def _picks(n: int, resamples: int) -> np.ndarray:
    """Draw the problems of each resample, [resamples, n]."""
    return np.random.default_rng(0).integers(n, size=(resamples, n))


def with_interval(name: str, per_problem: Sequence[float]) -> dict[str, float]:
    """Return the mean over problems as NAME, and its interval as NAME_low and NAME_high."""
    low, high = bootstrap(np.asarray(per_problem))
    return {name: float(np.mean(per_problem)), f"{name}_low": low, f"{name}_high": high}


def by_problem(samples: Sequence[dict], key: str) -> list[float]:
    """Return the mean of a field over each problem's samples, in the order of the problems."""
    groups = defaultdict(list)
    for sample in samples:
        groups[sample["problem_id"]].append(sample[key])
    return [float(np.mean(group)) for group in groups.values()]
