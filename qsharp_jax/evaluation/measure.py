"""Evaluation of a policy on held-out problems: reward, KL to `pi_ref`, and reranking of `pi_ref`'s samples.

All statistics are computed from the samples stored in the workdir (see `samples.py`), so a stopped evaluation resumes,
and samples can be judged again without a model. Intervals are 95%, by bootstrap over problems.
"""

import dataclasses
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qsharp_jax.algorithms.registry import ALGORITHMS
from qsharp_jax.decoding import Guide
from qsharp_jax.evaluation.samples import (
    SAMPLE,
    read_samples,
    sample_method,
    samples_path,
    score_samples,
    write_samples,
)
from qsharp_jax.evaluation.statistics import majority, pass_at, with_interval
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.run import config as configs
from qsharp_jax.run import models
from qsharp_jax.run.problems import judge
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.files import write_atomic
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.rewards import AnyJudge

# --- The evaluation of a run ----------------------------------------------------------------------------------------

Samples = dict[tuple[str, int], list[dict]]  # by method and round


def evaluate(session: Session, ref: LanguageModel, guides: dict[int, Guide], *, full: bool) -> list[dict]:
    """Write and return the rows of `results.json`, given the guides (or policies) by round.

    This measures pi_ref (sampled, greedy, and cut to as many tokens as the guide scores) and the run's algorithm after
    each round at its own eta (at the smallest of the config's etas, if its own is not among them). With `full`, it also
    measures the last round's guide greedily, at every eta of the config, in the algorithm's extra modes, with its tilt
    to the power of the config, and as a reranker of pi_ref's samples.
    """
    config, latest = session.config.evaluate, max(guides, default=0)
    algorithm = ALGORITHMS[session.config.algorithm]
    method, has_guides, own_eta = algorithm.name, algorithm.learns == "guide", configs.kl_weight(session.config)
    sampling = models.sampling(session)
    greedy = dataclasses.replace(sampling, temperature=0.0)
    # As few tokens as the guide scores, or fewer where top_k leaves fewer.
    top_k = dataclasses.replace(sampling, top_k=min(k for k in (sampling.top_k, sampling.top_k_candidates) if k))
    samples: Samples = {
        (name, 0): sample_method(session, name, ref, None, sampled_by, number=0, samples=count)
        for name, sampled_by, count in (
            ("pi_ref", sampling, config.samples),
            ("pi_ref_greedy", greedy, 1),
            ("pi_ref_top_k", top_k, config.guided_samples),
        )
    }
    if has_guides:
        mode = algorithm.mode(session.config)
        sampling, greedy = (dataclasses.replace(each, mode=mode) for each in (sampling, greedy))
    # Rounds are compared at one eta, so it must be one at which the last round is measured.
    shared_eta = min(config.etas) if has_guides and own_eta not in config.etas else own_eta
    for number, guide in guides.items():
        etas = list(config.etas) if full and number == latest and has_guides else [shared_eta]
        samples[method, number] = sample_method(
            session, method, ref, guide, sampling, number=number, etas=etas, samples=config.guided_samples
        )
    if full and guides:
        name = f"{method}_greedy"
        samples[name, latest] = sample_method(session, name, ref, guides[latest], greedy, number=latest, etas=[own_eta])
        for mode in algorithm.extra_modes:
            samples[mode, latest] = sample_method(
                session, mode, ref, guides[latest], dataclasses.replace(sampling, mode=mode), number=latest,
                etas=list(config.etas), samples=config.guided_samples,
            )  # fmt: skip
        if has_guides and config.power != 1:
            samples[f"{method}_power", latest] = sample_method(
                session, f"{method}_power", ref, guides[latest],
                dataclasses.replace(sampling, weights=(config.power,)), number=latest, etas=list(config.etas),
                samples=config.guided_samples,
            )  # fmt: skip
    scored = None
    if full and guides and has_guides:
        scored = score_samples(session, guides[latest], samples["pi_ref", 0], number=latest)
    return _write_results(session.workdir, judge(session), samples, latest, scored)


def rejudge(workdir: Workdir, judge: AnyJudge) -> tuple[list[dict], dict[str, tuple[int, int, int]]]:
    """Judge the stored samples again, and rewrite their files and `results.json`.

    This needs no model, data set or device.

    Returns:
      The rows of `results.json`, and by file: samples, rewards that changed, parsed answers that changed.

    Raises:
      UserError: if there are no samples, or naming a damaged line.
    """
    algorithm = ALGORITHMS[workdir.config.algorithm]
    learned = (algorithm.name, f"{algorithm.name}_greedy", *algorithm.extra_modes, f"{algorithm.name}_power")
    places = [
        *itertools.product(("pi_ref", "pi_ref_greedy", "pi_ref_top_k"), [0]),
        *itertools.product(learned, range(1, workdir.config.rounds + 1)),
    ]
    paths = {place: path for place in places if (path := samples_path(workdir, *place)).exists()}
    if ("pi_ref", 0) not in paths:
        raise UserError(
            f"there are no samples of pi_ref in {workdir.samples}; run `qsharp evaluate --workdir {workdir.path}` first"
        )
    latest = max(number for _, number in paths)
    scored_path = samples_path(workdir, "pi_ref_values", latest)
    samples = {place: _read_judged(path) for place, path in paths.items()}
    scored = read_samples(scored_path) if scored_path.exists() else None
    if scored is not None and len(scored) != len(samples["pi_ref", 0]):
        raise UserError(
            f"{scored_path} does not match the samples in {paths['pi_ref', 0]}; delete it and evaluate again"
        )
    changed = {}
    for place, rows in samples.items():
        pending = [
            judge.submit(_problem(row), row["response"], tokens=row["tokens"], finished=row["finished"]) for row in rows
        ]
        judgements = [judgement() for judgement in pending]
        verdicts = sum(row["reward"] != j.reward for row, j in zip(rows, judgements, strict=True))
        parsed = sum(row["parsed"] != j.parsed for row, j in zip(rows, judgements, strict=True))
        changed[paths[place].name] = len(rows), verdicts, parsed
        for row, judgement in zip(rows, judgements, strict=True):
            row |= vars(judgement)
    for place, rows in samples.items():
        write_samples(paths[place], rows)
    if scored is not None:
        for row, sample in zip(scored, samples["pi_ref", 0], strict=True):
            row |= {key: sample[key] for key in ("parsed", "reward")}
        write_samples(scored_path, scored)
    return _write_results(workdir, judge, samples, latest, scored), changed


def _problem(row: dict) -> Problem:
    return Problem(row["problem_id"], row["prompt"], row["answer"], row.get("columns", {}))


def _read_judged(path: Path) -> list[dict]:
    rows = read_samples(path)
    for number, row in enumerate(rows, start=1):
        for key in SAMPLE:
            if not isinstance(row, dict) or key not in row:
                raise UserError(f"{path}, line {number}, has no {key!r}; delete the file and evaluate again")
    return rows


# --- Statistics -----------------------------------------------------------------------------------------------------

Statistics = dict[str, dict[str, float]]  # by name and problem


def _write_results(
    workdir: Workdir, judge: AnyJudge, samples: Samples, latest: int, scored: list[dict] | None
) -> list[dict]:
    """Write and return the rows of `results.json`; the values in `scored` come from the guide of round `latest`."""
    config = workdir.config.evaluate
    rows = to_rows(
        judge, samples, latest, scored, passes=config.pass_at, majorities={config.samples, config.guided_samples},
        power=config.power,
    )  # fmt: skip
    if workdir.writes:
        write_atomic(workdir.results, json.dumps(rows, indent=1) + "\n")
    return rows


def to_rows(
    judge: AnyJudge,
    samples: Samples,
    latest: int,
    scored: list[dict] | None,
    *,
    passes: Sequence[float],
    majorities: Collection[int],
    power: float = 1.0,
) -> list[dict]:
    """Return a row of statistics for every method, round and eta of the samples, and for reranking.

    Args:
      latest: the round of the guide that gave the values in `scored`.
      scored: as in `rerank_rows`, of pi_ref's samples; None for no reranking.
      passes, majorities: as in `measure`.
      power: of the tilt in the samples of methods with a power.
    """
    parts: dict[tuple, list[dict]] = defaultdict(list)
    for (method, number), rows in samples.items():
        if all(row["reward"] is None for row in rows):
            raise UserError(
                f"no response of {method} to the test problems has a reward; fix the reward function, and judge the"
                " samples again by `qsharp evaluate --rejudge`"
            )
        for row in rows:
            if row["reward"] is not None:  # the reward function failed
                parts[method, number, row["eta"]].append(row)
    statistics = {place: measure(part, _classes(judge, part), passes, majorities) for place, part in parts.items()}
    rows = [
        _row(method, number, statistics[method, number, eta], eta=eta)
        | {"samples": len(part), "seconds": sum(sample["seconds"] for sample in part)}
        | _compared(statistics, method, number, eta)
        | ({"power": power} if method.endswith("_power") else {})
        for (method, number, eta), part in parts.items()
    ]
    if scored is not None:
        pairs = [pair for pair in zip(samples["pi_ref", 0], scored, strict=True) if pair[0]["reward"] is not None]
        unguided, scored = map(list, zip(*pairs, strict=True))
        rows += rerank_rows(latest, unguided, _classes(judge, unguided), scored)
    return rows


def _groups(samples: Sequence[dict], items: Sequence[Any]) -> dict[str, list]:
    """Group `items`, one per sample, by problem, in the order of the problems."""
    groups = defaultdict(list)
    for sample, item in zip(samples, items, strict=True):
        groups[sample["problem_id"]].append(item)
    return groups


def _classes(judge: AnyJudge, samples: Sequence[dict]) -> dict[str, list[str | None]] | None:
    """Return the answers to each problem, equivalent ones spelled alike; see `Judge.classes`. None without answers."""
    if not judge.has_answers:
        return None
    groups = _groups(samples, samples)
    problems = [_problem(group[0]) for group in groups.values()]
    answers = [[sample["parsed"] for sample in group] for group in groups.values()]
    return dict(zip(groups, judge.classes(problems, answers), strict=True))


def _fewest(samples: Sequence[dict]) -> int:
    """Return the smallest number of samples of a problem."""
    return min(Counter(sample["problem_id"] for sample in samples).values())


def measure(
    samples: Sequence[dict],
    answers: Mapping[str, Sequence[str | None]] | None,
    passes: Sequence[float],
    majorities: Collection[int],
) -> Statistics:
    """Compute the statistics of one method's samples, problem by problem.

    Args:
      answers: the parsed answers of each problem's samples, equivalent ones spelled alike; None in a task without.
      passes: the k of pass@k; those above the number of samples are skipped. Empty: 1, 2, 4, ... and all.
      majorities: the k of maj1@k: the numbers of samples of the methods to compare.

    Returns:
      By name and problem: means over the problem's samples of the reward, of the exact KL to pi_ref in nats before and
      after truncation, of the length in tokens, and shares of responses that finished and that have no answer; pass_K;
      and majority_K, the reward of the most frequent answer among the first K samples, for K above 1.
    """
    rewards = _groups(samples, [sample["reward"] for sample in samples])
    most = _fewest(samples)
    means = {
        "reward": [sample["reward"] for sample in samples],
        "kl": [sample["kl"] for sample in samples],
        "kl_truncated": [sample["kl_truncated"] for sample in samples],
        "response_tokens": [len(sample["tokens"]) for sample in samples],
        "finished": [sample["finished"] for sample in samples],
    }
    if answers is not None:
        means["no_answer"] = [sample["parsed"] is None for sample in samples]
    statistics: Statistics = {
        name: {problem: float(np.mean(group)) for problem, group in _groups(samples, items).items()}
        for name, items in means.items()
    }
    chosen = {int(k) for k in passes if k <= most} if passes else {most, *(2**i for i in range(most.bit_length()))}
    for k in sorted(chosen):
        statistics[f"pass_{k}"] = {problem: pass_at(k, group) for problem, group in rewards.items()}
    for k in sorted(k for k in majorities if 1 < k <= most) if answers is not None else ():
        statistics[f"majority_{k}"] = {
            name: majority(answers[name][:k], group[:k], np.ones(k)) for name, group in rewards.items()
        }
    return statistics


def rerank_rows(
    number: int, samples: list[dict], answers: Mapping[str, Sequence[str | None]] | None, scored: list[dict]
) -> list[dict]:
    """Return rows for pass@k, majority, best of k and weighted majority, where k is the samples per problem.

    Where some have no reward, it is the fewest of a problem's, and the first k of each count.

    Args:
      answers: as in `measure`; without, there are no majorities.
      scored: for each sample the guide's "values", the last of which ranks it, and the "seconds" of both.
    """
    k = _fewest(samples)

    def first(groups: Mapping[str, Sequence]) -> dict[str, Sequence]:
        return {name: group[:k] for name, group in groups.items()}

    rewards = first(_groups(samples, [sample["reward"] for sample in samples]))
    values = first(_groups(samples, [row["values"][-1] for row in scored]))
    answers = None if answers is None else first(answers)
    rerankers = {
        f"pass_{k}": lambda name: float(max(rewards[name])),
        f"majority_{k}": lambda name: majority(answers[name], rewards[name], np.ones(len(rewards[name]))),
        f"best_of_{k}": lambda name: float(rewards[name][np.argmax(values[name])]),
        f"weighted_majority_{k}": lambda name: majority(answers[name], rewards[name], values[name]),
    }
    if answers is None:
        rerankers = {name: rerank for name, rerank in rerankers.items() if "majority" not in name}
    tokens = float(np.mean([len(sample["tokens"]) for sample in samples])) * k
    seconds = sum(row["seconds"] for row in scored)
    return [
        _row(method, number, {"reward": {name: of_problem(name) for name in rewards}})
        | {"samples": len(samples), "response_tokens": tokens, "seconds": seconds}
        for method, of_problem in rerankers.items()
    ]


def _row(method: str, number: int, statistics: Statistics, *, eta: float | None = None) -> dict:
    """Return the means over problems, each with its interval."""
    row = {"method": method, "eta": eta, "round": number, "n": len(statistics["reward"])}
    row |= {"kl": None, "kl_truncated": None}
    for name, per_problem in statistics.items():
        row |= with_interval(name, list(per_problem.values()))
    return row


def _compared(statistics: Mapping[tuple, Statistics], method: str, number: int, eta: float | None) -> dict[str, float]:
    """Return NAME_minus_pi_ref and NAME_minus_MODE: paired differences, with intervals, to pi_ref and extra modes."""
    mine, compared = statistics[method, number, eta], {}
    others = {} if method.startswith("pi_ref") else {"pi_ref": ("pi_ref", 0, None)}
    extra_modes = ALGORITHMS[method].extra_modes if method in ALGORITHMS else ()
    others |= {mode: (mode, number, eta) for mode in extra_modes}
    for other, place in others.items():
        theirs = statistics.get(place, {})
        for name in mine:
            if name in theirs and (name in ("reward", "kl") or name.startswith(("pass_", "majority_"))):
                both = [problem for problem in mine[name] if problem in theirs[name]]
                differences = [mine[name][problem] - theirs[name][problem] for problem in both]
                compared |= with_interval(f"{name}_minus_{other}", differences) if both else {}
    return compared
