"""Algorithms side by side: each from the same pi_ref, with equal budgets of rollouts and of gradient FLOPs.

Every method and seed is a run in its own workdir, DIR/seed_S/METHOD, which all commands understand. DIR/seed_S/pi_ref
holds what they share: the reference, its rollouts of the first round, and its evaluation. All statistics are read from
these workdirs, so a stopped comparison resumes.

The budget of rollouts is the config's, rounds x prompts x samples. The budget of gradient FLOPs is what Q#'s fits take:
`fit.epochs` passes in every round over all rollouts so far. A method with a setting `epochs` takes the whole number of
passes nearest to that budget; a method without it leaves the rest unused.

Objectives are at the eta of the comparison, `collect.eta`, even of methods whose weight of the KL is another.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from qsharp_jax import report, train
from qsharp_jax.algorithms import value_based
from qsharp_jax.algorithms.registry import ALGORITHMS, DEFAULT
from qsharp_jax.data.records import Rollouts
from qsharp_jax.evaluation import measure, statistics
from qsharp_jax.experiments import pipeline
from qsharp_jax.report import NAMES, save_plot
from qsharp_jax.run import checks, models, pretrain, provenance
from qsharp_jax.run import config as configs
from qsharp_jax.run.problems import task
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system import files
from qsharp_jax.system.errors import UserError, nearest
from qsharp_jax.system.files import write_atomic

SHARED = "pi_ref"  # name of the workdir that the methods of a seed share
# Settings of pi_ref's samples, and of its rollouts, that a method which shares them has in common with `SHARED`.
OF_SAMPLES = ("task", "generate", "evaluate.problems", "evaluate.samples", "evaluate.guided_samples")
OF_ROLLOUTS = ("task", "generate", "collect.prompts", "collect.samples", "collect.shard_rows")
GREEDY = f"{DEFAULT}_greedy"
COLORS = report.COLORS | {"pi_ref_top_k": "#a0a0a0", GREEDY: "#7aa6d6"}


# --- Runs -----------------------------------------------------------------------------------------------------------


def run(workdir: Workdir) -> tuple[str, list[str]]:
    """Run what is missing, write the table and the plots; return the text for the terminal and the failures.

    A method that fails with a `UserError` is a failure, with its message, and the others continue. A `UserError` is
    raised for an invalid config, before anything is computed.
    """
    check(workdir.config)
    eta = workdir.config.collect.eta
    rows, failures = [], []
    for seed in workdir.config.compare.seeds:
        folder = workdir.path / f"seed_{seed}"
        with Workdir.open(folder / SHARED, settings(workdir.config, seed, DEFAULT), date=workdir.date) as shared:
            checks.check_loggers(shared)
            flops, epochs = _share(Session(shared))
        rows += [_row_of_samples(folder / SHARED, seed, method, eta) for method in ("pi_ref", "pi_ref_top_k")]
        for method in workdir.config.compare.methods:
            config = settings(workdir.config, seed, method, epochs.get(method))
            with Workdir.open(folder / method, config, ref_in=SHARED, date=workdir.date) as of_method:
                checks.check_loggers(of_method)
                session = Session(of_method)
                try:
                    _run_method(session, folder / SHARED)
                    rows.append(_row(session, folder, seed, flops, eta))
                    if method == DEFAULT:
                        rows.append(_row_of_samples(folder / method, seed, GREEDY, eta, config.rounds))
                except UserError as error:
                    failures.append(f"{NAMES[method]}, seed {seed}: {error}")
                    print(failures[-1], file=sys.stderr)
    return _write(workdir, rows, failures), failures


def settings(config: ConfigDict, seed: int, method: str, epochs: int | None = None) -> ConfigDict:
    """Return the config of one method's run; `epochs` are the passes that fill the budget, for methods that have it."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        del changed.compare
        changed.seed, changed.algorithm = seed, method
    changes = config.compare.changes.get(method, ())
    configs.override(changed, [f"--config.{change}" for change in changes])
    changed.evaluate.etas = (changed.collect.eta,)
    if epochs is not None:
        changed[method].epochs = epochs
    return changed.lock()


def check(config: ConfigDict) -> None:
    """Check that the section `compare` is complete, and the settings of every method; raises a UserError."""
    for key in ("methods", "seeds", "changes"):
        if "compare" not in config or key not in config.compare:
            raise UserError(f"the config lacks the setting compare.{key}; add it, as in configs/compare_arithmetic.py")
    for method in config.compare.changes:
        if method not in ALGORITHMS:
            raise UserError(f"config.compare.changes has the unknown method {method}; {nearest(method, ALGORITHMS)}")
    for method in config.compare.methods:
        checks.check(settings(config, config.compare.seeds[0], method))


def _share(shared: Session) -> tuple[float, dict[str, int]]:
    """Compute what the methods of a seed share, and return their `budget`."""
    checks.check_devices(shared)
    provenance.check_problems(shared)
    ref = pretrain.run(shared)
    value_based.collect(shared, 1, ref, None)
    measure.evaluate(shared, ref, {}, full=False)
    return budget(shared, value_based.aggregate(shared, 1))


def budget(shared: Session, data: Rollouts) -> tuple[float, dict[str, int]]:
    """Return the budget of gradient FLOPs, and by method the number of epochs whose cost is nearest to it.

    Args:
      data: the first round's rollouts; later rounds are assumed to have responses of the same lengths and rewards.
    """
    config, rounds = shared.config, shared.config.rounds
    passes = rounds * (rounds + 1) / 2  # over a round's rollouts in one epoch, where each round fits all so far
    # With the same problems in every round, the k-th has k times the rollouts of each, and k^2 times the pairs.
    of_pairs = rounds * (rounds + 1) * (2 * rounds + 1) / 6 if task(shared).FINITE else passes
    of_guide = train.guide_flops(models.guide_config(shared), config.fit.future_offsets)
    of_policy = train.language_model_flops(models.ref_config(shared))
    flops = config.fit.epochs * passes * (1 - config.fit.holdout) * _flops(of_guide, data)
    epochs = {}
    for method, algorithm in ALGORITHMS.items():
        if algorithm.learns == "policy" and hasattr(algorithm.settings, "epochs"):
            of_epoch = _flops(of_policy, algorithm.epoch_rollouts(data))
            if cost := of_epoch * (rounds if algorithm.on_policy else of_pairs):
                epochs[method] = max(round(flops / cost), 1)
    return flops, epochs


def _flops(of_batch: train.Flops, data: Rollouts) -> float:
    """Return the FLOPs of one gradient of all the rollouts."""
    return of_batch(SimpleNamespace(segments=np.arange(data.lengths.max(initial=0)) < data.lengths[:, None]))


def _run_method(session: Session, shared: Path) -> None:
    """Run one method, unless it is finished, starting from the results that all methods of its seed share."""
    workdir, config = session.workdir, session.config
    if _results(workdir.results, config.algorithm, config.rounds):
        return
    if _shares(config, shared, OF_SAMPLES):
        copy_missing(shared / "samples", workdir.samples, "*.jsonl")
    if _shares_rollouts(config, shared):
        copy_missing(shared / "rollouts" / "round_1", workdir.rollouts(1), "shard-*.parquet")
    pipeline.run(session)


def _shares_rollouts(config: ConfigDict, shared: Path) -> bool:
    """Return true if the method's first rollouts are those of pi_ref in the shared workdir."""
    return not ALGORITHMS[config.algorithm].on_policy and _shares(config, shared, OF_ROLLOUTS)


def _shares(config: ConfigDict, shared: Path, keys: Sequence[str]) -> bool:
    """Return true if `compare.changes` left the method these settings of the shared workdir."""
    changed = configs.changed(Workdir.attach(shared).config, config)
    return not any(f"{name}.".startswith(f"{key}.") for name in changed for key in keys)


def copy_missing(source: Path, target: Path, pattern: str) -> None:
    """Copy the files that the target lacks."""
    if not files.is_remote(target):
        target.mkdir(parents=True, exist_ok=True)
    for path in source.glob(pattern):
        if not (target / path.name).exists():
            with files.writing(target / path.name) as file:
                file.write(path.read_bytes())


# --- Statistics -----------------------------------------------------------------------------------------------------


def _results(path: Path, method: str, number: int) -> dict | None:
    """Return a method's row of a round in a run's results.json; None if there is none."""
    rows = json.loads(files.read_text(path)) if path.exists() else []
    return next((row for row in rows if (row["method"], row["round"]) == (method, number)), None)


def _row_of_samples(folder: Path, seed: int, method: str, eta: float, number: int = 0) -> dict:
    """Return the result of pi_ref, or of another way to sample a trained model; its KL is that after truncation."""
    workdir = Workdir.attach(folder)
    row = _results(workdir.results, method, number)
    kl = 0.0 if method == "pi_ref" else row["kl_truncated"]
    rewards = _rewards(workdir, method, number)
    return {"seed": seed, "method": method, "rewards": rewards, "kl": kl, "objective": row["reward"] - eta * kl}


def _row(session: Session, folder: Path, seed: int, flops: float, eta: float) -> dict:
    """Return the result and the costs of a finished run."""
    workdir, method, number = session.workdir, session.config.algorithm, session.config.rounds
    result = _results(workdir.results, method, number)
    used = costs(workdir.read_metrics())
    if _shares_rollouts(session.config, folder / SHARED):  # which were collected in the shared workdir
        used["seconds"] += costs(Workdir.attach(folder / SHARED).read_metrics(), ("collect",))["seconds"]
    return {
        "seed": seed,
        "method": method,
        "rewards": _rewards(workdir, method, number),
        "kl": result["kl"],
        "objective": result["reward"] - eta * result["kl"],
        "flops_budget": flops,
        **used,
    }


def _rewards(workdir: Workdir, method: str, number: int) -> list[float]:
    """Return the mean reward over each problem's samples."""
    samples = measure.read_samples(measure.samples_path(workdir, method, number))
    return statistics.by_problem([sample for sample in samples if sample["reward"] is not None], "reward")


def costs(metrics: Sequence[dict], phases: Sequence[str] = ()) -> dict[str, float]:
    """Return the costs of a run's rounds, from its metrics; pre-training and evaluation are not counted.

    A line that was logged twice, before and after a kill, counts once.

    Args:
      phases: the last words of the phases to count, as in "round 1: collect"; by default all.

    Returns:
      seconds of collecting and training; rollouts; flops of gradients; tokens_per_second of training steps.
    """
    rounds = [line for line in metrics if line["phase"].startswith("round ")]
    rounds = [line for line in rounds if not phases or line["phase"].endswith(tuple(phases))]
    steps = {(line["phase"], line["step"]): line for line in rounds if "flops" in line}.values()
    drawn = {(line["phase"], line.get("step")): line for line in rounds if "rollouts" in line}.values()
    collected: dict[str, float] = {}  # a resumed collection logs a second line, with little time
    for line in rounds:
        if "step" not in line and "seconds" in line:
            collected[line["phase"]] = max(collected.get(line["phase"], 0.0), line["seconds"])
    busy = [line["flops"] / line["flops_per_second"] for line in steps]
    tokens = sum(line["tokens_per_second"] * time for line, time in zip(steps, busy, strict=True))
    return {
        "seconds": sum(line["seconds"] for line in steps) + sum(collected.values()),
        "rollouts": sum(line["rollouts"] for line in drawn),
        "flops": sum(line["flops"] for line in steps),
        "tokens_per_second": tokens / max(sum(busy), 1e-9),
    }


# --- Table and plots ------------------------------------------------------------------------------------------------


COLUMNS = (
    "method", "reward", "95% interval", "by seed", "KL", "objective", "seconds", "rollouts", "gradient FLOPs",
    "of budget", "tokens/s", f"of {ALGORITHMS[DEFAULT].label}'s",
)  # fmt: skip

HOW = (
    "Reward is the mean verified reward over held-out problems and seeds, its 95% interval Student's t over the"
    " seeds' means (of a single seed, a bootstrap over its problems, which leaves out how runs differ). KL is the"
    " exact KL(pi || pi_ref) summed over a response's tokens, in nats, before truncation (of the rows that are"
    " truncations, top-K and greedy, after it); objective is reward - eta KL, for every method at the comparison's"
    " config.collect.eta. Seconds are wall time of collecting and training, compilation included, without pre-training"
    " and evaluation; rollouts, gradient FLOPs (model FLOPs of forward and backward passes, without sampling) and"
    " seconds are means over seeds. The budget of gradient FLOPs is what Q#'s fits take in config.fit.epochs passes."
    " Tokens/s are those of training steps alone."
)


def summary(rows: Sequence[dict]) -> list[dict]:
    """Return one line per method over its seeds, in the methods' order of appearance."""
    by_method: dict[str, list[dict]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    lines = []
    for method, runs in by_method.items():
        by_seed = {row["seed"]: float(np.mean(row["rewards"])) for row in runs}
        low, high = statistics.over_seeds([np.asarray(row["rewards"]) for row in runs])
        line = {"method": method, "reward": float(np.mean([*by_seed.values()])), "reward_low": low, "reward_high": high}
        line["by_seed"] = by_seed
        names = runs[0].keys() - {"seed", "method", "rewards"}
        lines.append(line | {name: float(np.mean([row[name] for row in runs])) for name in sorted(names)})
    return lines


def table(lines: Sequence[dict], rollouts: int, *, width: int | None = None) -> str:
    """Make a Markdown table of what `summary` returns; `rollouts` is the budget, the `width` as in `markdown`."""
    speed = next((line["tokens_per_second"] for line in lines if line["method"] == DEFAULT), None)
    cells = []
    for line in lines:
        seeds = statistics.seeds_in_words(len(line["by_seed"]))
        cell = [
            NAMES[line["method"]],
            f"{line['reward']:.3f}",
            f"{line['reward_low']:.3f} .. {line['reward_high']:.3f} ({seeds})",
            " ".join(f"{reward:.3f}" for reward in line["by_seed"].values()),
            f"{line['kl']:.3f}",
            f"{line['objective']:.3f}",
        ]
        if "flops" in line:
            cell += [
                f"{line['seconds']:.0f}",
                f"{line['rollouts']:.0f} of {rollouts}",
                f"{line['flops']:.2e}",
                f"{line['flops'] / line['flops_budget']:.2f}",
                f"{line['tokens_per_second']:.0f}",
                "" if speed is None else f"{line['tokens_per_second'] / speed:.2f}",
            ]
        cells.append(cell + [""] * (len(COLUMNS) - len(cell)))
    return report.markdown([list(COLUMNS), *cells], width=width)


def _write(workdir: Workdir, rows: list[dict], failures: list[str]) -> str:
    config, lines = workdir.config, summary(rows)
    write_atomic(workdir.results, json.dumps({"lines": lines, "runs": rows, "failures": failures}, indent=1) + "\n")
    budget = config.rounds * config.collect.prompts * config.collect.samples
    without = "\n\nWithout a result:\n" + "\n".join(failures) if failures else ""
    curves = _curves(workdir)
    plots = {
        "frontier.png": lambda axes: _plot_frontier(axes, lines),
        "costs.png": lambda axes: _plot_costs(axes, lines),
        "learning.png": lambda axes: _plot_learning(axes, lines, curves),
    }
    for name, draw in plots.items():
        save_plot(workdir.path / name, draw)
    pictures = [f"![{name}]({name})" for name in plots]
    text = "\n\n".join([f"# {config.task.name}: {workdir.path.name}", table(lines, budget) + without, HOW, *pictures])
    write_atomic(workdir.report, text + "\n")
    names = ", ".join(str(workdir.path / name) for name in ("report.md", "results.json", *plots))
    return f"{table(lines, budget, width=report.TERMINAL)}{without}\n\nFiles: {names}"


def _curves(workdir: Workdir) -> dict[tuple[str, int], list[dict]]:
    """Return the learning curves of on-policy methods that have begun, by method and seed, for the objective."""
    compared, eta = workdir.config.compare, workdir.config.collect.eta
    curves = {}
    for method, seed in itertools.product(compared.methods, compared.seeds):
        folder = workdir.path / f"seed_{seed}" / method
        if ALGORITHMS[method].on_policy and files.is_file(folder / "config.json"):
            batches = report.learning_curve(Workdir.attach(folder).read_metrics())
            curves[method, seed] = [line | {"objective": line["reward"] - eta * line["kl"]} for line in batches]
    return curves


def _plot_frontier(axes: Any, lines: Sequence[dict]) -> None:
    for line in lines:
        error = [[line["reward"] - line["reward_low"]], [line["reward_high"] - line["reward"]]]
        color = COLORS[line["method"]]
        label = f"{NAMES[line['method']]} ({statistics.seeds_in_words(len(line['by_seed']))})"
        axes.errorbar([line["kl"]], [line["reward"]], error, marker="o", capsize=3, color=color, label=label)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set(xlabel="KL to pi_ref (nats per response, linear below 0.1)", ylabel="reward", title="Reward against KL")
    axes.legend(fontsize=8)


def _plot_costs(axes: Any, lines: Sequence[dict]) -> None:
    paid = [line for line in lines if "seconds" in line]
    names, seconds = [NAMES[line["method"]] for line in paid], [line["seconds"] for line in paid]
    axes.barh(names, seconds, color=[COLORS[line["method"]] for line in paid])
    axes.invert_yaxis()
    axes.set(xlabel="seconds of collecting and training", title="Wall time")


def _plot_learning(axes: Any, lines: Sequence[dict], curves: dict[tuple[str, int], list[dict]]) -> None:
    """Draw the objective of on-policy methods' rollouts while training; of other methods the final one, as a line.

    A method far below the others is named with its number alone, since its line would flatten the rest.
    """
    drawn = {key: report.smoothed(batches, "objective") for key, batches in curves.items() if batches}
    start = next((line["objective"] for line in lines if line["method"] == "pi_ref"), 0.0)
    lowest = min([start, *(min(means) for _, means in drawn.values())]) - 1
    for line in lines:
        method, end, first = line["method"], line["objective"], True
        on_policy = method in ALGORITHMS and ALGORITHMS[method].on_policy
        if not on_policy and end < lowest:
            axes.plot([], [], linestyle="--", linewidth=1, color=COLORS[method], label=f"{NAMES[method]}: {end:.3g}")
        elif not on_policy:
            axes.axhline(end, linestyle="--", linewidth=1, color=COLORS[method], label=NAMES[method])
        for (of_method, _), (at, means) in drawn.items():
            if of_method == method:
                axes.plot(at, means, linewidth=1, color=COLORS[method], label=NAMES[method] if first else None)
                first = False
    axes.set(xlabel="rollouts", ylabel="reward - eta KL", title="Objective while training")
    axes.legend(fontsize=8)
