"""Plots of a report, each on one pair of axes, from rows of `results.json`, samples or metrics."""

import io
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qsharp_jax.evaluation import score, statistics
from qsharp_jax.report.names import COLORS, GUIDED, NAMES, POLICIES, eta_of, learned, name_of
from qsharp_jax.system.files import writing

PLACES = {0.0: "first token", 0.25: "25%", 0.5: "50%", 0.75: "75%", 1.0: "last token"}  # of a response
BINS = 6  # of response lengths, with as many samples in each as ties allow


class Plot(Figure):
    """A `matplotlib` figure of its own, without pyplot, so that it needs no screen; a notebook shows it as PNG."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, dpi=130, format="png")
        return picture.getvalue()


def plot(draw: Callable[[Axes], None]) -> Plot:
    """Return a figure of one pair of axes, which `draw` fills."""
    figure = Plot(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure


def save_plot(path: Path, draw: Callable[[Axes], None]) -> None:
    figure = plot(draw)
    with writing(path) as file:
        figure.savefig(file, dpi=130, format="png")


def _errors(rows: list[dict], name: str = "reward") -> list[list[float]] | None:
    """Return the lower and upper errors of a statistic; None if a row has no interval."""
    if any(row.get(f"{name}_low") is None for row in rows):
        return None
    return [[row[name] - row[f"{name}_low"] for row in rows], [row[f"{name}_high"] - row[name] for row in rows]]


def frontier(axes, rows: list[dict]) -> None:
    """Draw pass@1 against KL over eta, with intervals of both, beside pi_ref and the reranking of its samples."""
    number = max(row["round"] for row in rows)
    for method in (*GUIDED, *(f"{method}_power" for method in GUIDED)):
        line = [row for row in rows if row["method"] == method and row["round"] == number]
        line.sort(key=lambda row: -eta_of(row))
        if not line:
            continue
        kl, reward = [row["kl"] for row in line], [row["reward"] for row in line]
        axes.errorbar(
            kl, reward, _errors(line), _errors(line, "kl"), marker="o", capsize=3, label=name_of(line[0]),
            color=COLORS[method], linestyle="--" if method.endswith("_power") else "-",
        )  # fmt: skip
        # Points gather where the tilt saturates, so only the ends of a line are labeled; lines that begin at the same
        # place have their labels on different sides.
        first = (6, -12) if method == GUIDED[0] else (-36, 5)
        ends = [(line[0], first), (line[-1], (6, -12))][: len(line)]  # one where there is one eta
        for row, offset in ends:
            place, text = (row["kl"], row["reward"]), f"η={eta_of(row):g}"
            axes.annotate(text, place, offset, textcoords="offset points", fontsize=8, color=COLORS[method])
    for row in rows:
        if row["method"] in POLICIES and row["round"] == number:
            at, color = ([row["kl"]], [row["reward"]]), COLORS[row["method"]]
            errors = _errors([row]), _errors([row], "kl")
            axes.errorbar(*at, *errors, marker="o", capsize=3, label=NAMES[row["method"]], color=color)
    start = [row for row in rows if row["method"] == "pi_ref"]
    if start:
        reward, color = [start[0]["reward"]], COLORS["pi_ref"]
        axes.errorbar([0], reward, _errors(start), marker="s", capsize=3, label="pi_ref", color=color)
    for row in rows:
        if row["method"].startswith(("best_of", "majority")):
            style = "--" if row["method"].startswith("best_of") else ":"
            label = row["method"].replace("_", " ")
            axes.axhline(row["reward"], linestyle=style, color="#999999", linewidth=1, label=label)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left=-0.02, right=2 * max([1, *(row["kl"] for row in rows if row["kl"])]))
    axes.set(xlabel="KL to pi_ref (nats per response, linear below 0.1)", ylabel="pass@1 (mean reward)")
    axes.set_title("pass@1 against KL")
    axes.legend(fontsize=8)


def rounds(axes, rows: list[dict]) -> None:
    """Draw the reward by round, at the smallest eta at which all rounds were evaluated."""
    by_round = defaultdict(dict)
    method = learned(rows)
    for row in rows:
        if row["method"] == method:
            by_round[row["round"]][eta_of(row)] = row
    shared = set.intersection(*(set(etas) for etas in by_round.values())) if by_round else set()
    line = [row for row in rows if row["method"] == "pi_ref"]
    label = NAMES[method]
    if shared:
        label = f"{label}, η={min(shared):g}"
        line += [by_round[number][min(shared)] for number in sorted(by_round)]
    axes.errorbar(
        [row["round"] for row in line], [row["reward"] for row in line], _errors(line), marker="o", capsize=3,
        color=COLORS[method], label=label,
    )  # fmt: skip
    axes.set_xticks([row["round"] for row in line], [str(row["round"]) if row["round"] else "pi_ref" for row in line])
    low, high = min([0.0, *(row["reward"] for row in line)]), max([1.0, *(row["reward"] for row in line)])
    axes.set(xlabel="round", ylabel="reward", title="Reward by round", ylim=(low, high))
    axes.legend(fontsize=8)


def learning_curve(metrics: list[dict]) -> list[dict]:
    """Return the metrics of each batch of rollouts that a policy was trained on, with the count "rollouts_so_far"."""
    batches = {(line["phase"], line["step"]): line for line in metrics if "log_prob_gap" in line}.values()
    so_far = itertools.accumulate(line["rollouts"] for line in batches)
    return [line | {"rollouts_so_far": count} for line, count in zip(batches, so_far, strict=True)]


def learning(axes, batches: list[dict]) -> None:
    """Draw reward, objective and KL of the rollouts that a policy was trained on."""
    for name, color in (("reward", "#1f5fa8"), ("objective", "#c8641e"), ("kl", "#555555")):
        label = name if name != "kl" else "KL (nats per response)"
        axes.plot(*smoothed(batches, name), label=label, color=color)
    axes.set(xlabel="rollouts", title="Training")
    axes.legend(fontsize=8)


def smoothed(batches: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Return the rollouts so far, and the mean of a metric over the last twentieth of all batches so far."""
    width, numbers = max(len(batches) // 20, 1), [line[name] for line in batches]
    means = [float(np.mean(numbers[max(i - width + 1, 0) : i + 1])) for i in range(len(numbers))]
    return [line["rollouts_so_far"] for line in batches], means


def calibration(axes, scored: list[dict]) -> None:
    """Draw mean value against mean reward, in bins, at several places of `pi_ref`'s responses."""
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    rewards = np.asarray([sample["reward"] for sample in scored])
    for place, color in zip(PLACES, ("#c6dcef", "#92bfe0", "#5598cd", "#2a6fae", "#0f3661"), strict=True):
        predicted = at_place(scored, place)
        bins = score.calibration(predicted, rewards)
        label = f"{PLACES[place]} (ECE {score.calibration_error(predicted, rewards):.3f})"
        at, observed = [b["predicted"] for b in bins], [b["observed"] for b in bins]
        axes.plot(at, observed, linewidth=1, color=color, label=label)
        axes.scatter(at, observed, [5 + 250 * b["count"] / len(scored) for b in bins], color=color)
    axes.set(
        xlabel="the guide's value (dot area: share of the responses)",
        ylabel="mean reward",
        title="Calibration on held-out problems",
    )
    axes.legend(fontsize=8, title="place in the response", title_fontsize=8)


def at_place(scored: Sequence[dict], place: float) -> np.ndarray:
    """Return the values, [n], at a place of each response, from 0 (first token) to 1 (last token)."""
    return np.asarray([sample["values"][round(place * (len(sample["values"]) - 1))] for sample in scored])


def lengths(axes, samples: dict[str, list[dict]]) -> None:
    """Draw mean reward by response length for each method's samples."""
    for name, of_method in samples.items():
        bins = reward_by_length(of_method)
        at, reward = [b["response_tokens"] for b in bins], [b["reward"] for b in bins]
        color = COLORS[name]
        axes.errorbar(at, reward, _errors(bins), marker="o", capsize=3, color=color, label=NAMES[name])
    lowest = min([0.0, *(sample["reward"] for of_method in samples.values() for sample in of_method)])
    axes.set(xlabel="tokens per response (mean of each bin)", ylabel="mean reward", ylim=(lowest, None))
    axes.set_title("Reward against response length")
    axes.legend(fontsize=8)


def reward_by_length(samples: Sequence[dict]) -> list[dict[str, float]]:
    """Bin the samples by length: mean tokens, mean reward with a bootstrap interval over problems, and the count."""

    tokens = np.asarray([len(sample["tokens"]) for sample in samples])
    edges = np.unique(np.quantile(tokens, np.linspace(0, 1, BINS + 1)[1:-1], method="inverted_cdf"))
    place, bins = np.searchsorted(edges, tokens), []
    for number in np.unique(place):
        mine = [sample for sample, of_sample in zip(samples, place, strict=True) if of_sample == number]
        by_problem = defaultdict(list)
        for sample in mine:
            by_problem[sample["problem_id"]].append(sample["reward"])
        sums, counts = (np.asarray([of(rewards) for rewards in by_problem.values()]) for of in (sum, len))
        low, high = statistics.bootstrap_pooled(sums, counts)
        bins.append(
            {
                "response_tokens": float(tokens[place == number].mean()),
                "reward": float(sums.sum() / counts.sum()),
                "reward_low": low,
                "reward_high": high,
                "count": len(mine),
            }
        )
    return bins
