"""The report of a run: the table, the plots and a few examples, all from the workdir's files.

It knows nothing about models: whoever has the workdir can make the report again.
"""

import itertools
import json
import math
import re
from collections import defaultdict

import matplotlib
import numpy as np

matplotlib.use("Agg")  # a report needs no screen
import matplotlib.pyplot as plt  # noqa: E402

from qsharp_jax import evaluate, score  # noqa: E402
from qsharp_jax.errors import UserError  # noqa: E402
from qsharp_jax.files import read_text, write_atomic, writing  # noqa: E402
from qsharp_jax.session import Session  # noqa: E402

COLUMNS = (
    "method", "eta", "round", "problems", "samples", "reward", "95% interval", "KL", "KL truncated", "tokens",
    "tokens/s",
)  # fmt: skip
POLICIES = {"reinforce": "REINFORCE", "ppo": "PPO", "dpo": "DPO", "rpo": "RPO", "klq": "KLQ"}
NAMES = {"pi_ref": "pi_ref", "pi_ref_greedy": "pi_ref, greedy", "qsharp": "Q#", "cd": "CD", "vas": "VAS"} | POLICIES
GUIDED = ("qsharp", "cd", "vas")
COLOURS = {"qsharp": "#1f5fa8", "cd": "#c8641e", "vas": "#b58a00", "pi_ref": "#555555"} | dict.fromkeys(
    POLICIES, "#2c7a4b"
)
EXAMPLES = 3


def read_results(session: Session) -> list[dict]:
    """The rows of `results.json`.

    Raises:
      UserError: if there are none, or if the file is damaged.
    """
    path = session.workdir.results
    if not path.exists():
        raise UserError(f"there is no {path}; run `qsharp evaluate --workdir {session.workdir.path}` first")
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and evaluate again") from None


def _eta(guided: dict) -> float:
    """Of a guided row or sample: JSON knows no infinity."""
    return math.inf if guided["eta"] is None else guided["eta"]


def write(session: Session) -> str:
    """Writes `report.md` and the plots, and returns the text that ends a run on the terminal."""
    rows = read_results(session)
    folder = session.workdir.path
    plots = {
        "frontier.png": _plot_frontier,
        "rounds.png": _plot_rounds,
    }
    for name, plot in plots.items():
        save_plot(folder / name, lambda axes, plot=plot: plot(axes, rows))
    pictures = list(plots)
    number = max(row["round"] for row in rows)
    scored_path = evaluate.samples_path(session, "pi_ref_values", number)
    if scored_path.exists():
        scored = evaluate.read_samples(scored_path)
        save_plot(folder / "calibration.png", lambda axes: _plot_calibration(axes, scored))
        pictures.append("calibration.png")
    if lots := learning_curve(session.workdir.read_metrics()):
        save_plot(folder / "learning.png", lambda axes: _plot_learning(axes, lots))
        pictures.append("learning.png")
    shown, collected = table(rows), rollouts_table(session.workdir.read_metrics())
    examples = _examples(session, number)
    text = "\n\n".join(
        [
            f"# {session.config.task.name}: {folder.name}",
            shown,
            HOW,
            *(("## Rollouts", collected, HOW_ROLLOUTS) if collected else ()),
            *(f"![{name}]({name})" for name in pictures),
            "## Examples, unguided and guided",
            f"```text\n{examples}\n```",
        ]
    )
    write_atomic(session.workdir.report, text + "\n")
    files = ", ".join(str(folder / name) for name in ("report.md", "results.json", *pictures))
    return "\n\n".join(part for part in (collected, shown, examples, f"Files: {files}") if part)


HOW = (
    "Reward is the mean verified reward over problems (a problem with several samples counts with their mean); its 95%"
    " interval is a bootstrap over problems. KL is the sum over a response's tokens of the exact KL(pi || pi_ref) at"
    " each, in nats, before top-k, top-p and greedy truncation; the next column is the same after it. Tokens are those"
    " of a response (of all k of them in the lines with _k), tokens/s count response tokens over the method's wall"
    " time, compilation included."
)


def table(rows: list[dict]) -> str:
    """A Markdown table of the results."""
    lines = [list(COLUMNS)]
    for row in rows:
        answers = row["samples"] if row["kl"] is not None else row["n"]  # the _k lines take k samples for an answer
        lines.append(
            [
                NAMES.get(row["method"], row["method"]),
                f"{_eta(row):g}" if row["eta"] is not None or row["method"] in GUIDED else "",
                str(row["round"]) if row["round"] else "",
                str(row["n"]),
                str(row["samples"]),
                f"{row['reward']:.3f}",
                f"{row['reward_low']:.3f} .. {row['reward_high']:.3f}",
                "" if row["kl"] is None else f"{row['kl']:.3f}",
                "" if row["kl_truncated"] is None else f"{row['kl_truncated']:.3f}",
                f"{row['response_tokens']:.1f}",
                f"{row['response_tokens'] * answers / max(row['seconds'], 1e-9):.0f}",
            ]
        )
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """A table, its head first, whose columns line up as plain text too."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    text.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in text)


ROLLOUTS = ("round", "rollouts", "reward", "tokens", "finished", "labelled", "varied", "useful rows", "seconds")
HOW_ROLLOUTS = (
    "Of each round's rollouts: mean reward, mean tokens of a response, share that ended by a stop token, share of the"
    " tokens that carry a label, share of the problems whose rollouts do not all have one reward (with"
    " `collect.drop_no_variation` the others are left out). Useful rows: of the rows that decoding computed, over all"
    " steps, those that belonged to a response. Seconds are wall time, compilation included."
)


def rollouts_table(metrics: list[dict]) -> str:
    """Of the rollouts of each round, from the lines of metrics.jsonl; empty if there are none.

    A collection that was begun several times has as many lines: the last tells of all its rollouts, while rows and
    seconds are those of all that came to their end.
    """
    by_round = defaultdict(list)
    for line in metrics:
        if found := re.fullmatch(r"round (\d+): collect", line.get("phase", "")):
            by_round[int(found[1])].append(line)
    lines = [list(ROLLOUTS)]
    for number, found in sorted(by_round.items()):
        last, row_steps = found[-1], sum(line.get("row_steps", 0) for line in found)
        shares = [f"{last[name]:.3f}" if name in last else "" for name in ("finished", "labelled", "varied")]
        useful = f"{sum(line.get('tokens', 0) for line in found) / row_steps:.3f}" if row_steps else ""
        seconds = f"{sum(line['seconds'] for line in found):.0f}"
        whole = [str(number), str(last["rollouts"]), f"{last['reward']:.3f}", f"{last['response_tokens']:.1f}"]
        lines.append([*whole, *shares, useful, seconds])
    return markdown(lines) if by_round else ""


def _examples(session: Session, number: int) -> str:
    """Problems solved unguided and guided, first those where the guide made the difference."""
    learned = session.algorithm
    unguided, guided = (
        evaluate.samples_path(session, method, round_) for method, round_ in (("pi_ref", 0), (learned, number))
    )
    if not (unguided.exists() and guided.exists()):
        return f"(no samples of both pi_ref and {NAMES[learned]})"
    first = {}
    for sample in evaluate.read_samples(unguided):
        first.setdefault(sample["problem_id"], sample)
    eta, name = session.eta, f"{NAMES[learned]} eta "
    pairs = [
        (first[sample["problem_id"]], sample)
        for sample in evaluate.read_samples(guided)
        if _eta(sample) == eta or eta not in session.config.evaluate.etas
    ]
    pairs.sort(key=lambda pair: pair[0]["reward"] - pair[1]["reward"])
    # Two where it helped, and one as it came, so that the page does not only flatter.
    chosen = pairs[: EXAMPLES - 1] + pairs[len(pairs) // 2 :][:1]
    verdict = {True: "right", False: "wrong"}
    return "\n\n".join(
        f"{before['prompt']}\n  pi_ref        {before['response']}   ({verdict[before['reward'] > 0]})\n"
        f"  {name}{_eta(after):<6g} {after['response']}   ({verdict[after['reward'] > 0]}; answer {after['answer']})"
        for before, after in chosen
    )


# --- Plots ----------------------------------------------------------------------------------------------------------


def save_plot(path, draw) -> None:
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    with writing(path) as file:
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)


def _errors(rows: list[dict]) -> list[list[float]]:
    return [[row["reward"] - row["reward_low"] for row in rows], [row["reward_high"] - row["reward"] for row in rows]]


def _plot_frontier(axes, rows: list[dict]) -> None:
    number = max(row["round"] for row in rows)
    for method in GUIDED:
        line = [row for row in rows if row["method"] == method and row["round"] == number]
        line.sort(key=lambda row: -_eta(row))
        if not line:
            continue
        kl, reward = [row["kl"] for row in line], [row["reward"] for row in line]
        axes.errorbar(kl, reward, _errors(line), marker="o", capsize=3, label=NAMES[method], color=COLOURS[method])
        # Q#'s points gather where its tilt saturates, so only the line's ends are named.
        for row, offset in zip((line[0], line[-1]), ((-34, 4), (4, -13)), strict=True):
            place = (row["kl"], row["reward"])
            axes.annotate(f"η={_eta(row):g}", place, offset, textcoords="offset points", fontsize=8)
    for row in rows:
        if row["method"] in POLICIES and row["round"] == number:
            at, colour = ([row["kl"]], [row["reward"]]), COLOURS[row["method"]]
            axes.errorbar(*at, _errors([row]), marker="o", capsize=3, label=NAMES[row["method"]], color=colour)
    start = [row for row in rows if row["method"] == "pi_ref"]
    if start:
        reward, colour = [start[0]["reward"]], COLOURS["pi_ref"]
        axes.errorbar([0], reward, _errors(start), marker="s", capsize=3, label="pi_ref", color=colour)
    for row in rows:
        if row["method"].startswith(("best_of", "majority")):
            style = "--" if row["method"].startswith("best_of") else ":"
            label = row["method"].replace("_", " ")
            axes.axhline(row["reward"], linestyle=style, color="#999999", linewidth=1, label=label)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left=-0.02, right=2 * max([1, *(row["kl"] for row in rows if row["kl"])]))
    axes.set(xlabel="KL to pi_ref (nats a response, linear below 0.1)", ylabel="reward", title="Reward against KL")
    axes.legend(fontsize=8)


def _plot_rounds(axes, rows: list[dict]) -> None:
    """Reward of the guide at the strongest guidance that every round was evaluated at, or of the trained policy."""
    by_round = defaultdict(dict)
    methods = {row["method"] for row in rows}
    learned = next((method for method in ("qsharp", *POLICIES, "cd", "vas") if method in methods), "qsharp")
    for row in rows:
        if row["method"] == learned:
            by_round[row["round"]][_eta(row)] = row
    shared = set.intersection(*(set(etas) for etas in by_round.values())) if by_round else set()
    line = [row for row in rows if row["method"] == "pi_ref"]
    label = NAMES[learned]
    if shared:
        label = f"{label}, η={min(shared):g}"
        line += [by_round[number][min(shared)] for number in sorted(by_round)]
    axes.errorbar(
        [row["round"] for row in line], [row["reward"] for row in line], _errors(line), marker="o", capsize=3,
        color=COLOURS[learned], label=label,
    )  # fmt: skip
    axes.set_xticks([row["round"] for row in line], [str(row["round"]) if row["round"] else "pi_ref" for row in line])
    axes.set(xlabel="round", ylabel="reward", title="Reward by round", ylim=(0, 1))
    axes.legend(fontsize=8)


def learning_curve(metrics: list[dict]) -> list[dict]:
    """The lots of rollouts of a policy's training, each once, with the rollouts up to its end as "rollouts_so_far"."""
    last = {(line["phase"], line["step"]): line for line in metrics if "log_prob_gap" in line}
    so_far = itertools.accumulate(line["rollouts"] for line in last.values())
    return [line | {"rollouts_so_far": count} for line, count in zip(last.values(), so_far, strict=True)]


def _plot_learning(axes, lots: list[dict]) -> None:
    """Of the rollouts that a policy learned from."""
    for name, colour in (("reward", "#1f5fa8"), ("objective", "#c8641e"), ("kl", "#555555")):
        label = name if name != "kl" else "KL (nats a response)"
        axes.plot(*smoothed(lots, name), label=label, color=colour)
    axes.set(xlabel="rollouts", title="Training")
    axes.legend(fontsize=8)


def smoothed(lots: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Rollouts so far, and the mean of a figure over the last twentieth of all lots up to there."""
    width = max(len(lots) // 20, 1)
    means = [float(np.mean([line[name] for line in lots[max(i - width + 1, 0) : i + 1]])) for i in range(len(lots))]
    return [line["rollouts_so_far"] for line in lots], means


def _plot_calibration(axes, scored: list[dict]) -> None:
    """Mean value against mean reward, in bins, at three places of `pi_ref`'s responses."""
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    rewards = np.asarray([sample["reward"] for sample in scored])
    for share, colour in ((0.25, "#9cc3e6"), (0.5, "#4a8cc7"), (1.0, "#123f6d")):
        predicted = np.asarray([s["values"][max(round(share * len(s["values"])) - 1, 0)] for s in scored])
        bins = score.calibration(predicted, rewards)
        error = score.calibration_error(predicted, rewards)
        label = f"{'at the end' if share == 1 else f'{share:.0%} of the response'} (ECE {error:.3f})"
        axes.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], marker="o", color=colour, label=label)
    axes.set(xlabel="value given by the guide", ylabel="mean reward", title="Calibration on held-out problems")
    axes.legend(fontsize=8)
