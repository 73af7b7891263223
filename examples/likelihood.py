"""Why Q# fits by the likelihood: beside a noisy prompt, squared loss misses what the likelihood has long seen.

    python examples/likelihood.py        (seconds; the picture is runs/examples/likelihood.png)

A guide is one model for all prompts, so its fit to one prompt is paid for by its fit to others. Here it can only be one
of two, and n rollouts of pi_ref, by one loss or the other, choose between them. Half of the rollouts answer a quiet
prompt, of small variance, where the first token, A or B, decides (the wrong guide has the two exchanged):

    bandit   nothing follows; pi_ref's answer A pays 1 with probability 8 epsilon, B with epsilon
    chain    16 chances to slip follow, of probability epsilon each after A, 8 epsilon after B; unslipped, it pays 1

The other half answer a noisy prompt, whose answer pays 1 with probability 1/2; the wrong guide is off by as much there
as it is at A. Squared loss weighs the two errors alike, so that the coin's noise drowns the quiet prompt: it needs some
1 / epsilon^2 rollouts. The likelihood weighs an error by the variance that the guide itself expects, which at the quiet
prompt is of order epsilon: some 1 / epsilon rollouts are enough. So bounds that are small where pi_ref's variance is
(section 4 of the paper; Foster and Krishnamurthy, arXiv 2107.02237; Wang et al., 2409.12799) need the likelihood.

No more than that is shown: with a table, where no prompt shares anything with another, both losses give the average
reward; and where epsilon is not small, they need about as many rollouts.
"""

import functools
from statistics import NormalDist

import common
import jax
import matplotlib.pyplot as plt
import numpy as np

from qsharp_jax import values

CASES = {"bandit": (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4), "chain": (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)}  # epsilons
CHANCES = 16
LOSSES = {"likelihood": "likelihood (Q#)", "squared": "squared loss of the mean"}
COLORS = {"likelihood": common.COLORS["qsharp"], "squared": common.COLORS["cd"]}
ERROR = 0.1  # "enough" rollouts leave this probability of choosing the wrong guide


@functools.cache
def outcomes(case: str, epsilon: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Probabilities [K] of pi_ref's rollouts, and how much each favors the true guide, [K] by loss.

    The latter is the wrong guide's loss less the true one's, summed over the rollout's labeled tokens.
    """
    rates = np.array([epsilon, 8 * epsilon])
    # Of each answer: the probability of passing each chance on the way to a reward of 1.
    passing = rates[::-1, None] if case == "bandit" else np.repeat(1 - rates[:, None], CHANCES, axis=1)
    value = np.cumprod(passing[:, ::-1], axis=1)[:, ::-1]  # [2, chances]: mean reward with so many chances behind
    off = abs(value[0, 0] - value[1, 0])
    length = passing.shape[1]
    coin = np.append(np.ones(length - 1), 0.5)
    parts = [
        _answer(coin, np.full(length, 0.5), np.full(length, 0.5 + off)),
        _answer(passing[0], value[0], value[1]),
        _answer(passing[1], value[1], value[0]),
    ]
    probabilities = np.concatenate([share * part[0] for share, part in zip((0.5, 0.25, 0.25), parts, strict=True)])
    return probabilities, {loss: np.concatenate([part[1][loss] for part in parts]) for loss in LOSSES}


def _answer(passing: np.ndarray, true: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The outcomes of one answer: failed at the first, second, ... chance, with a reward of 0, or never, with 1.

    Tokens up to there carry labels, whose means are `true` or `wrong` by the two guides.
    """
    reached = np.cumprod(np.append(1, passing))
    probabilities = np.append(reached[:-1] * (1 - passing), reached[-1])
    gains = {}
    for loss in LOSSES:
        failed, passed = (np.cumsum(nll(loss, wrong, reward) - nll(loss, true, reward)) for reward in (0.0, 1.0))
        gains[loss] = np.append(failed, passed[-1])
    return probabilities, gains


def nll(loss: str, mean: np.ndarray, reward: float) -> np.ndarray:
    """The library's loss of a guide that gives a mean: Bernoulli likelihood, or the squared error of a scalar."""
    with jax.enable_x64(True):  # differences between two guides' are of order epsilon^2
        z = values.Bernoulli(np.log(mean) - np.log1p(-mean)) if loss == "likelihood" else values.Scalar(mean)
        return np.asarray(z.nll(reward))


def wrong_choices(case: str, epsilon: float, rollouts: int, repetitions: int, rng: np.random.Generator) -> dict:
    """Share of repetitions, by loss, in which so many rollouts choose the wrong guide."""
    probabilities, gains = outcomes(case, epsilon)
    counts = rng.multinomial(rollouts, probabilities / probabilities.sum(), size=repetitions)
    return {loss: float(np.mean(counts @ gain < 0)) for loss, gain in gains.items()}


def expected_enough(case: str, epsilon: float, loss: str) -> float:
    """Rollouts that are enough by the central limit theorem: (1.28 deviation / mean)^2 of a rollout's gain."""
    probabilities, gains = outcomes(case, epsilon)
    mean = probabilities @ gains[loss]
    variance = probabilities @ gains[loss] ** 2 - mean**2
    return NormalDist().inv_cdf(1 - ERROR) ** 2 * variance / mean**2


def enough(case: str, epsilon: float, loss: str, repetitions: int, rng: np.random.Generator) -> float:
    """The same by simulation: where the share of wrong choices falls below `ERROR`, interpolated between numbers."""
    numbers = np.unique(np.round(expected_enough(case, epsilon, loss) * np.geomspace(0.2, 5, 11)).astype(int))
    shares = np.array([wrong_choices(case, epsilon, n, repetitions, rng)[loss] for n in numbers])
    first = max(int(np.argmax(shares < ERROR)), 1)
    low, high = np.log(numbers[first - 1 : first + 1])
    part = (shares[first - 1] - ERROR) / (shares[first - 1] - shares[first])
    return float(np.exp(low + part * (high - low)))


def run(quick: bool = False) -> dict:
    """For both cases: shares of wrong choices by n at the middle epsilon, and the rollouts that are enough."""
    rng, repetitions = np.random.default_rng(0), 1000 if quick else 3000
    found = {}
    for case, epsilons in CASES.items():
        epsilons = np.array(epsilons[1::2] if quick else epsilons)
        shown = epsilons[len(epsilons) // 2]
        fewest, most = 0.1 * expected_enough(case, shown, "likelihood"), 5 * expected_enough(case, shown, "squared")
        numbers = np.geomspace(fewest, most, 8 if quick else 16).astype(int)
        shares = [wrong_choices(case, shown, n, repetitions, rng) for n in numbers]
        needed = {loss: np.array([enough(case, e, loss, repetitions, rng) for e in epsilons]) for loss in LOSSES}
        found[case] = {
            "shown": shown,
            "numbers": numbers,
            "wrong": {loss: np.array([share[loss] for share in shares]) for loss in LOSSES},
            "epsilons": epsilons,
            "enough": needed,
            "expected": {loss: np.array([expected_enough(case, e, loss) for e in epsilons]) for loss in LOSSES},
            "slope": {loss: np.polyfit(np.log(epsilons[1:]), np.log(needed[loss][1:]), 1)[0] for loss in LOSSES},
        }
    return found


def draw(found: dict) -> plt.Figure:
    figure, grid = plt.subplots(2, 2, figsize=(9.5, 7.2), layout="constrained")
    for (choice, needed), (case, part) in zip(grid, found.items(), strict=True):
        for loss, label in LOSSES.items():
            color = COLORS[loss]
            choice.plot(part["numbers"], part["wrong"][loss], color=color, marker="o", markersize=4, label=label)
            slope = f"{label}: slope {part['slope'][loss]:.2f}"
            needed.plot(part["epsilons"], part["enough"][loss], color=color, marker="o", markersize=4, label=slope)
            needed.plot(part["epsilons"], part["expected"][loss], color=color, linestyle="--", linewidth=1)
        needed.plot([], [], color="#555555", linestyle="--", linewidth=1, label="central limit theorem")
        choice.axhline(ERROR, color="#999999", linestyle=":", linewidth=1)
        choice.set(xscale="log", ylim=(-0.02, 0.55))
        needed.set(xscale="log", yscale="log")
        needed.invert_xaxis()
        common.tidy(
            choice, xlabel="rollouts n", ylabel="probability of the wrong guide",
            title=f"{case}, epsilon = {part['shown']:g}",
        )  # fmt: skip
        common.tidy(
            needed, xlabel="epsilon, the scale of the quiet prompt's variance", ylabel="rollouts that are enough",
            title=f"{case}: rollouts for a probability of {ERROR:g}",
        )  # fmt: skip
    return figure


def words(found: dict) -> str:
    lines = []
    for case, part in found.items():
        rows = [
            (f"{epsilon:.0e}", *(part[kind][loss][i] for kind in ("enough", "expected") for loss in LOSSES))
            for i, epsilon in enumerate(part["epsilons"])
        ]
        columns = ["epsilon", *(f"{kind} {loss}" for kind in ("n", "CLT") for loss in LOSSES)]
        slopes = ", ".join(f"{loss} {part['slope'][loss]:.2f}" for loss in LOSSES)
        lines += [f"{case}: rollouts until the wrong guide is chosen with probability {ERROR:g}",
                  common.table(columns, rows), f"slope of log n by log epsilon: {slopes}", ""]  # fmt: skip
    return "\n".join(lines[:-1])


if __name__ == "__main__":
    common.main("likelihood", run, draw, words)
