"""Q# with its tilt raised to a power, against CD at the same KL, with the guides of finished runs.

    python benchmarks/sharpening.py --workdir runs/ablations/seed_0/default [runs/ablations/seed_1/default ...]

As eta falls Q# becomes pi_ref conditioned on success, and its KL ends there; CD goes on, toward the likeliest success
alone. So does Q# where the logarithm of its tilt has a weight above 1 (`weights` of `generate`). Every held-out problem
is answered twice in each setting; intervals are 95%, by Student's t over the runs' means, of one run by bootstrap over
its problems; KL is exact, in nats a response. The table and the figure sharpening.png, beside this file, are of all
runs together.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ablations import Found, Measured, at_kl, interval

from qsharp_jax import report, rollouts
from qsharp_jax.evaluation import measure, statistics
from qsharp_jax.run import models
from qsharp_jax.run.problems import judge, test_problems
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.sampling import Sampling

SAMPLES = 2
ETAS = (1.2, 1.0, 0.6, 0.5, 0.2, 0.14, 0.02)  # of Q#, whose tilt hardly changes any more below the last
WEIGHTS = (1.5, 2.0, 3.0, 5.0)  # at that last eta
CD_ETAS = (1.0, 0.5, 0.2, 0.14, 0.1, 0.07, 0.05)


def measure_run(session: Session) -> Found:
    """Results by method and setting, in words; pi_ref has an eta of inf."""
    ref, guide = models.load_ref(session), models.load_guide(session)
    problems = [problem for problem in test_problems(session) for _ in range(SAMPLES)]
    prompts = [models.tokenizer(session).encode_prompt(problem.prompt) for problem in problems[::SAMPLES]]
    seeds = np.random.SeedSequence(session.seed("sharpening")).generate_state(len(problems))
    size = session.config.evaluate.batch_size
    sampling = models.sampling(session)

    def of(guide: Any, sampling: Sampling) -> Measured:
        made = rollouts.sample(
            ref, guide, prompts, sampling, samples=SAMPLES, seeds=seeds, batch_size=size, record=("kl",)
        )
        texts = [models.tokenizer(session).decode(made.response(row)) for row in range(len(problems))]
        rewards = [judgement.reward for judgement in judge(session)(problems, texts)]
        return Measured(*(np.reshape(x, (-1, SAMPLES)).mean(1) for x in (rewards, made.kl.sum(1))))

    samples = measure.read_samples(measure.samples_path(session.workdir, "pi_ref", 0))
    reward = np.asarray(statistics.by_problem(samples, "reward"))
    found = {("pi_ref", float("inf")): Measured(reward, np.zeros(len(reward)))}
    found |= {("qsharp", f"eta {eta:g}"): of(guide, replace(sampling, eta=eta)) for eta in ETAS}
    found |= {
        ("qsharp", f"eta {ETAS[-1]:g}, power {weight:g}"): of(
            (guide,), replace(sampling, weights=[weight], eta=ETAS[-1])
        )
        for weight in WEIGHTS
    }
    return found | {("cd", f"eta {eta:g}"): of(guide, replace(sampling, eta=eta, mode="cd")) for eta in CD_ETAS}


def table(runs: list[Found]) -> str:
    words = statistics.seeds_in_words(len(runs))
    lines = [["method", "setting", f"reward ({words})", "KL", f"Q#, powers too, less CD at CD's KL ({words})"]]
    for key in runs[0]:
        points = [run[key] for run in runs]
        kl = np.mean([point.kl.mean() for point in points])
        ahead = [at_kl(run, "qsharp", run[key].kl.mean()) - run[key].reward for run in runs] if key[0] == "cd" else []
        setting = key[1] if points[0].kl.any() else ""
        reward = interval([point.reward for point in points])
        lines.append([report.NAMES[key[0]], setting, reward, f"{kl:.3f}", interval(ahead, "+") if ahead else ""])
    return report.markdown(lines)


def plot(axes: Any, runs: list[Found]) -> None:
    for method in ("qsharp", "cd"):
        points = []
        for key in (key for key in runs[0] if key[0] == method):
            rewards = [run[key].reward for run in runs]
            kl, mean = (np.mean([part.mean() for part in parts]) for parts in ([run[key].kl for run in runs], rewards))
            points.append((kl, mean, *statistics.over_seeds(rewards), "power" in key[1]))
        points.sort()
        kl, mean, low, high, _ = map(np.asarray, zip(*points, strict=True))
        color = report.COLORS[method]
        axes.errorbar(
            kl, mean, [mean - low, high - mean], color=color, marker="o", capsize=3, label=report.NAMES[method]
        )
        sharpened = [point[:2] for point in points if point[-1]]
        if sharpened:
            axes.plot(*zip(*sharpened, strict=True), "s", color=color, markersize=9, label="Q#, tilt to a power")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    title = f"Beyond conditioning on success, 95% intervals ({statistics.seeds_in_words(len(runs))})"
    axes.set(xlabel="KL to pi_ref (nats a response)", ylabel="reward", title=title)
    axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", nargs="+", required=True)
    options = parser.parse_args()
    runs = [measure_run(Session(Workdir.attach(path))) for path in options.workdir]
    print(table(runs))
    report.save_plot(Path(__file__).parent / "sharpening.png", lambda axes: plot(axes, runs))


if __name__ == "__main__":
    main()
