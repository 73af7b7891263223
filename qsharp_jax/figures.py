"""Figures of judged samples: pass@k, majorities, and 95% intervals by bootstrap over problems.

Shapes: n problems. It knows nothing about where samples come from.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000  # of the bootstrap


def majority(answers: Sequence[str | None], rewards: np.ndarray, weights: np.ndarray) -> float:
    """Expected reward of the answer with most weight; ties are drawn by lot, and None is no vote."""
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
    """95% percentile interval of the mean over problems (Efron 1979), with a fixed seed."""
    rng = np.random.default_rng(0)
    picks = rng.integers(len(per_problem), size=(resamples, len(per_problem)))
    low, high = np.percentile(per_problem[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def by_problem(samples: Sequence[dict], key: str) -> list[float]:
    """The mean of a field over each problem's samples, in the order in which problems come."""
    groups = defaultdict(list)
    for sample in samples:
        groups[sample["problem_id"]].append(sample[key])
    return [float(np.mean(group)) for group in groups.values()]
