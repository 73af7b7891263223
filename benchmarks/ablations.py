"""Every claim of the paper that needs no large weights, on the word problems of configs/arithmetic.py.

    python benchmarks/ablations.py --workdir runs/ablations [--seeds 0,1,2] [--only frontier rollouts:1,200 ...]

A variant is the main job's budget of 4,800 rollouts in one round, with the settings changed that `ABLATIONS` names and
no others. Variants that come to the same settings are one run. What runs of a seed can share they do: pi_ref, its
samples, the first round's rollouts (a variant with fewer has the first of them), and the guide where only decoding
differs. A run is a workdir that all commands understand, DIR/seed_S/SETTINGS; one that is finished is not computed
again. The tables and figures, of all that is finished in DIR, go to benchmarks/ablations.md beside this file.
"""

import argparse
import datetime
import json
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from qsharp_jax import report
from qsharp_jax.data.records import shard_path
from qsharp_jax.evaluation import measure
from qsharp_jax.evaluation.statistics import by_problem, over_seeds, seeds_in_words
from qsharp_jax.experiments import compare, export, pipeline
from qsharp_jax.run import config as configs
from qsharp_jax.run import pretrain
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.files import write_atomic

CONFIG = Path(__file__).parents[1] / "configs" / "arithmetic.py"
SHARED = "pi_ref"  # the workdir of a seed with what its variants share
ETAS = "1,0.5,0.2,0.1,0.05,0.02"  # of the variant without changes
FEW_ETAS = "0.1,0.02"  # of the others
BASE = ("rounds=1", "collect.prompts=1200", "collect.shard_rows=100", "evaluate.samples=2")
TRUNKS = {  # guides of another shape than pi_ref's start from models of their own, pre-trained on the same texts
    "smaller": dict(embed=48, layers=2, heads=2, kv_heads=2, mlp=64),
    "larger": dict(layers=5),
}

Changes = tuple[str, ...]  # settings, "KEY=VALUE"; of `guide`, the value may be a name of `TRUNKS`

ABLATIONS: dict[str, dict[str, Changes]] = {
    "frontier": {"4,800 rollouts": ()},
    "rollouts": {
        "500": ("collect.prompts=125",),
        "1,200": ("collect.prompts=300",),
        "2,400": ("collect.prompts=600",),
        "4,800": (),
        "16,000": ("collect.prompts=4000",),
    },
    "rounds": {
        "one": (),
        "one, 8 epochs": ("fit.epochs=8",),
        "one, 10 epochs": ("fit.epochs=10",),
        "two of 2,400": ("rounds=2", "collect.prompts=600"),
        "three of 1,600": ("rounds=3", "collect.prompts=400"),
    },
    "heads": {
        "Bernoulli": (),
        "Categorical": ("value.distribution=categorical", "value.atoms=0,1"),
        "scalar (MSE)": ("value.distribution=scalar",),
    },
    "types": {"V": (), "Q": ("value.type=q",)},
    "start": {"pi_ref": (), "scratch": ("guide=scratch",)},
    "sizes": {"smaller": ("guide=smaller",), "pi_ref's": (), "larger": ("guide=larger",)},
    "candidates": {
        "2": ("generate.top_k_candidates=2",),
        "4": ("generate.top_k_candidates=4",),
        "5": (),
        "10": ("generate.top_k_candidates=10",),
        "20": ("generate.top_k_candidates=20",),
        "all": ("generate.top_k_candidates=128",),
    },
}
QUESTIONS = {
    "frontier": "Q# and CD with one guide, over eta: is Q# ever below CD at equal KL?",
    "rollouts": "Number of rollouts, 5 epochs each: where does CD break, and does Q# hold there?",
    "rounds": "Rounds, with 4,800 rollouts in all. Two rounds of 5 epochs over all rollouts so far are 7.5 passes over"
    " 4,800, three are 10: hence one round with as many epochs.",
    "heads": "Bernoulli and Categorical (atoms 0 and 1) by likelihood, a scalar by squared error. A scalar's Q# is CD:"
    " its two columns differ by their random numbers alone.",
    "types": "The value read at the appended token (V), or a head over the vocabulary (Q).",
    "start": "The guide's first weights: pi_ref's, or random.",
    "sizes": "The guide's trunk: 2 layers of width 48, pi_ref's 3 of 96, or 5 of 96, each pre-trained as pi_ref was.",
    "candidates": "Candidates that the guide scores at each step, with the same guide; the vocabulary has about 70.",
}


# --- Runs -----------------------------------------------------------------------------------------------------------


def plan(only: Sequence[str] = ()) -> list[Changes]:
    """The variants to run, each once, the one that others are compared with first.

    Args:
      only: "ABLATION" or "ABLATION:VARIANT"; all by default.

    Raises:
      ValueError: for one that there is not.
    """
    names = {name for ablation, variants in ABLATIONS.items() for name in (ablation, *_names(ablation, variants))}
    if unknown := sorted(set(only) - names):
        raise ValueError(f"there is no {unknown[0]!r}; there are {', '.join(sorted(names))}")
    asked = [
        changes
        for ablation, variants in ABLATIONS.items()
        for name, changes in zip(_names(ablation, variants), variants.values(), strict=True)
        if not only or {ablation, name} & {*only}
    ]
    return list(dict.fromkeys([(), *asked]))


def _names(ablation: str, variants: Iterable[str]) -> list[str]:
    return [f"{ablation}:{label}" for label in variants]


def folder_name(changes: Changes) -> str:
    return "_".join(changes) or "default"


def settings(folder: Path, seed: int, changes: Changes = ()) -> ConfigDict:
    """A variant's config; `folder` is the seed's, where guides of other shapes come from."""
    etas = FEW_ETAS if changes else ETAS
    guides = {f"guide={name}": f"guide={(_trunk(folder, name) / 'exported').absolute()}" for name in TRUNKS}
    asked = (*BASE, f"evaluate.etas={etas}", f"seed={seed}", *(guides.get(change, change) for change in changes))
    return configs.load(CONFIG, [f"--config.{change}" for change in asked])


def _trunk(folder: Path, name: str) -> Path:
    return folder / f"trunk_{name}"


def run(folder: Path, seed: int, variants: Sequence[Changes]) -> Iterable[Changes]:
    """Runs what is not there yet in the seed's folder; yields each variant when it is finished."""
    with Workdir.open(folder / SHARED, settings(folder, seed)) as workdir:
        session = Session(workdir)
        measure.evaluate(session, pretrain.run(session), {}, full=False)
    for changes in variants:
        for name in TRUNKS:
            if f"guide={name}" in changes:
                make_trunk(folder, seed, name)
        with Workdir.open(folder / folder_name(changes), settings(folder, seed, changes), ref_in=SHARED) as workdir:
            if not is_finished(workdir):
                share(workdir, changes)
                pipeline.run(Session(workdir))
                compare.copy_missing(workdir.rollouts(1), folder / SHARED / "rollouts" / "round_1", "shard-*.parquet")
        yield changes


def share(workdir: Workdir, changes: Changes) -> None:
    """Gives a variant's workdir what is there already of what it has in common with others of its seed."""
    shared, default = workdir.path.parent / SHARED, workdir.path.parent / folder_name(())
    compare.copy_missing(shared / "samples", workdir.samples, "*.jsonl")
    collect = workdir.config.collect
    for shard in range(-(-collect.prompts * collect.samples // collect.shard_rows)):
        name = shard_path(Path(), shard).name
        compare.copy_missing(shared / "rollouts" / "round_1", workdir.rollouts(1), name)
    if changes and all(change.startswith("generate.") for change in changes) and not workdir.guide.exists():
        half = workdir.path / "guide.half"
        shutil.copytree(default / "guide", half, dirs_exist_ok=True)
        half.rename(workdir.guide)
        compare.copy_missing(default / "samples", workdir.samples, "pi_ref_values*.jsonl")


def make_trunk(folder: Path, seed: int, name: str) -> None:
    """A language model of another shape, as a folder that a guide may start from."""
    config = settings(folder, seed)
    with config.unlocked():
        config.model.update(TRUNKS[name])
    with Workdir.open(_trunk(folder, name), config) as workdir:
        if not (workdir.path / "exported" / "config.json").exists():
            pretrain.run(Session(workdir))
            export.write(Session(workdir), "ref", workdir.path / "exported")


def is_finished(workdir: Workdir) -> bool:
    """Check that the last round's guide has been evaluated; CD comes last."""
    return workdir.results.exists() and any(row["method"] == "cd" for row in json.loads(workdir.results.read_text()))


# --- Figures --------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Mean reward [n] and KL [n] by problem, over the samples of one method, eta and seed."""

    reward: np.ndarray
    kl: np.ndarray


Found = dict[tuple[str, float | str], Measured]  # by method and eta, or a setting in words; pi_ref's eta is inf


def read(workdir: Workdir) -> Found:
    """Measurements of a finished run, from its samples."""
    found = {}
    rounds = workdir.config.rounds
    for method, name in (("pi_ref", "pi_ref"), ("qsharp", f"qsharp_round_{rounds}"), ("cd", f"cd_round_{rounds}")):
        samples = measure.read_samples(workdir.samples / f"{name}.jsonl")
        for eta in dict.fromkeys(sample["eta"] for sample in samples):
            part = [sample for sample in samples if sample["eta"] == eta]
            measured = Measured(*(np.asarray(by_problem(part, key)) for key in ("reward", "kl")))
            found[method, float("inf") if eta is None else eta] = measured
    return found


def read_all(folder: Path) -> dict[tuple[Changes, int], Found]:
    """All finished runs, by changes and seed."""
    found = {}
    for seed in sorted(int(path.name.removeprefix("seed_")) for path in folder.glob("seed_*")):
        for changes in plan():
            path = folder / f"seed_{seed}" / folder_name(changes)
            if (path / "config.json").exists() and is_finished(workdir := Workdir.attach(path)):
                found[changes, seed] = read(workdir)
    return found


def at_kl(found: Found, method: str, kl: float) -> np.ndarray:
    """A method's rewards [n] at a KL: of two neighboring etas, each taken with a probability.

    The KL of such a mixture is at most the mean of the two, so it is a policy within `kl`; beyond the largest KL that
    the method comes to it is the policy of that.
    """
    points = [found["pi_ref", float("inf")], *(found[key] for key in found if key[0] == method)]
    points.sort(key=lambda point: point.kl.mean())
    kls = np.asarray([point.kl.mean() for point in points])
    above = int(np.searchsorted(kls, kl))
    if above == len(points):
        return points[-1].reward
    if above == 0:
        return points[0].reward
    weight = (kl - kls[above - 1]) / (kls[above] - kls[above - 1])
    return (1 - weight) * points[above - 1].reward + weight * points[above].reward


def interval(values: Sequence[np.ndarray], sign: str = "") -> str:
    """The mean over seeds of each seed's problems, with its 95% interval."""
    mean = np.mean([part.mean() for part in values])
    return "{:{sign}.3f} ({:{sign}.3f} .. {:{sign}.3f})".format(mean, *over_seeds(values), sign=sign)


# --- Tables and plots -----------------------------------------------------------------------------------------------

COLUMNS = (
    "variant", "eta", "seeds", "n", "Q# reward", "KL", "CD reward", "KL", "Q# - CD at CD's KL",
    "Q# - CD, reward - eta KL", "Q# - default",
)  # fmt: skip

HOW = (
    "Reward is the mean verified reward of one response to each of 500 held-out problems and seed (n in all), with"
    " its 95% interval: of several seeds Student's t over their means, of one a bootstrap over problems, which"
    " leaves out how runs differ; KL is the exact KL(pi || pi_ref) of a response in nats, before truncation,"
    " averaged. Differences are paired by problem. At CD's KL means: Q# at the KL that CD has in that line, by"
    " drawing one of the two neighboring etas for each response (a mixture's KL is at most the mean of the two), or"
    " at Q#'s largest KL where CD's is larger still. The next column compares the objective, each reward less eta"
    " times its KL. The last is Q#'s reward less that of the variant without changes at the same eta and seeds."
)


def table(variants: dict[str, Changes], found: dict[tuple[Changes, int], Found]) -> str:
    """A Markdown table, a line for each variant that is finished and eta."""
    lines = [list(COLUMNS)]
    for label, changes in variants.items():
        seeds = [seed for held, seed in found if held == changes]
        runs = [found[changes, seed] for seed in seeds]
        defaults = [found[(), seed] for seed in seeds]
        shown = ETAS if len(variants) == 1 else FEW_ETAS
        for eta in map(float, shown.split(",") if seeds else ()):
            q, cd = ([run_[method, eta] for run_ in runs] for method in ("qsharp", "cd"))
            pairs = list(zip(q, cd, strict=True))
            at_equal = [at_kl(run_, "qsharp", c.kl.mean()) - c.reward for run_, c in zip(runs, cd, strict=True)]
            objective = [a.reward - eta * a.kl - (b.reward - eta * b.kl) for a, b in pairs]
            to_default = [a.reward - b["qsharp", eta].reward for a, b in zip(q, defaults, strict=True)]
            lines.append(
                [
                    label,
                    f"{eta:g}",
                    ", ".join(map(str, seeds)),
                    str(sum(len(part.reward) for part in q)),
                    interval([part.reward for part in q]),
                    f"{np.mean([part.kl.mean() for part in q]):.3f}",
                    interval([part.reward for part in cd]),
                    f"{np.mean([part.kl.mean() for part in cd]):.3f}",
                    interval(at_equal, "+"),
                    interval(objective, "+"),
                    interval(to_default, "+") if changes else "",
                ]
            )
    return report.markdown(lines)


def write(folder: Path, target: Path) -> None:
    """`ablations.md` and the figures, of all finished runs."""
    found = read_all(folder)
    plots = {"frontier": _plot_frontier, "rollouts": _plot_rollouts, "candidates": _plot_candidates}
    parts = []
    for name, variants in ABLATIONS.items():
        if not {held for held, _ in found} & {*variants.values()} - ({()} if len(variants) > 1 else set()):
            continue  # there is nothing to compare yet
        parts += [f"## {name.capitalize()}", QUESTIONS[name], table(variants, found)]
        if name in plots:
            picture = f"ablations_{name}.png"
            report.save_plot(target / picture, lambda axes, draw=plots[name]: draw(axes, found))
            parts.append(f"![{name}]({picture})")
    made = max((path.stat().st_mtime for path in folder.glob("seed_*/*/results.json")), default=0.0)
    references = [found[(), seed]["pi_ref", float("inf")].reward for held, seed in found if held == ()]
    by_seed = ", ".join(interval([reward]) for reward in references)
    seeds = ",".join(map(str, sorted({seed for _, seed in found})))
    head = (
        f"`python benchmarks/ablations.py --workdir runs/ablations --seeds {seeds}`, on one CPU core, by"
        f" {datetime.date.fromtimestamp(made)}; variants without a line were not run. pi_ref's reward by seed:"
        f" {by_seed}."
    )
    paragraphs = ["# Ablations on the arithmetic task", head, HOW, *parts]
    lines = [part if part.startswith("| ") else textwrap.fill(part, 120) for part in paragraphs]
    write_atomic(target / "ablations.md", "\n\n".join(lines) + "\n")


def _series(axes: Any, xs: Sequence[float], values: Sequence[Sequence[np.ndarray]], **style: Any) -> None:
    """A line with 95% intervals through the means of what each x has of all seeds."""
    means = np.asarray([np.mean([part.mean() for part in value]) for value in values])
    bounds = np.asarray([over_seeds(value) for value in values])
    axes.errorbar(xs, means, [means - bounds[:, 0], bounds[:, 1] - means], marker="o", capsize=3, **style)


def _runs(found: dict[tuple[Changes, int], Found], changes: Changes) -> list[Found]:
    return [run_ for (held, _), run_ in found.items() if held == changes]


def _plot_frontier(axes: Any, found: dict[tuple[Changes, int], Found]) -> None:
    runs = _runs(found, ())
    for method in ("qsharp", "cd"):
        points = [[run_[method, float(eta)] for run_ in runs] for eta in ETAS.split(",")]
        xs = [float(np.mean([part.kl.mean() for part in parts])) for parts in points]
        rewards = [[part.reward for part in parts] for parts in points]
        _series(axes, xs, rewards, label=report.NAMES[method], color=report.COLORS[method])
    _series(axes, [0], [[run_["pi_ref", float("inf")].reward for run_ in runs]], label="pi_ref", color="#555555")
    axes.set_xscale("symlog", linthresh=0.1)
    axes.xaxis.set_major_formatter("{x:g}")
    title = f"eta from 1 to 0.02, 95% intervals ({seeds_in_words(len(runs))})"
    axes.set(xlabel="KL to pi_ref (nats a response, linear below 0.1)", ylabel="reward", title=title)
    axes.legend(fontsize=8)


def _plot_variants(axes: Any, found: dict, ablation: str, xs: dict[str, float], methods: Sequence[str]) -> None:
    """Reward at two etas against what the ablation changes, of which a variant's value is in `xs`.

    Of the variants that the seed with most of them has, and the seeds that all of these have: others' would look like
    what is changed.
    """
    changes = {x: ABLATIONS[ablation][label] for label, x in xs.items()}
    seeds = {x: {seed for held, seed in found if held == change} for x, change in changes.items()}
    fullest = max(sorted(set.union(*seeds.values())), key=lambda seed: sum(seed in of for of in seeds.values()))
    there = [x for x, of in seeds.items() if fullest in of]
    common = sorted(set.intersection(*(seeds[x] for x in there)))
    for method in methods:
        for eta, style in zip(map(float, FEW_ETAS.split(",")), ("-", "--"), strict=True):
            points = {x: [found[changes[x], seed][method, eta].reward for seed in common] for x in there}
            label, color = f"{report.NAMES[method]}, eta {eta:g}", report.COLORS[method]
            _series(axes, [*points], [*points.values()], label=label, color=color, linestyle=style)
    words = f"seeds: {', '.join(map(str, common))}" + (" (problems alone)" if len(common) == 1 else "")
    axes.text(0.99, 0.01, words, transform=axes.transAxes, ha="right", fontsize=8)
    axes.set_xscale("log")
    axes.set_xticks(list(xs.values()), list(xs))
    axes.minorticks_off()
    axes.set(ylabel="reward", ylim=(0, 1))
    axes.legend(fontsize=8)


def _plot_rollouts(axes: Any, found: dict[tuple[Changes, int], Found]) -> None:
    xs = {label: float(label.replace(",", "")) for label in ABLATIONS["rollouts"]}
    _plot_variants(axes, found, "rollouts", xs, ("qsharp", "cd"))
    axes.set(xlabel="rollouts that the guide is fitted to", title="Few rollouts make a weak guide")


def _plot_candidates(axes: Any, found: dict[tuple[Changes, int], Found]) -> None:
    xs = {label: 70.0 if label == "all" else float(label) for label in ABLATIONS["candidates"]}
    _plot_variants(axes, found, "candidates", xs, ("qsharp", "cd"))
    axes.set(xlabel="candidates scored at each step", title="Candidates")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", nargs="+", default=(), metavar="ABLATION[:VARIANT]", help="by default all")
    options = parser.parse_args()
    try:
        variants, seeds = plan(options.only), [int(seed) for seed in options.seeds.split(",")]
    except ValueError as error:
        parser.error(str(error))
    jax.config.update("jax_compilation_cache_dir", str((options.workdir / "programs").absolute()))
    for seed in seeds:
        for changes in run(options.workdir / f"seed_{seed}", seed, variants):
            print(f"seed {seed}: {folder_name(changes)}", flush=True)
            write(options.workdir, Path(__file__).parent)


if __name__ == "__main__":
    main()
