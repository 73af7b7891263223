"""How good a policy is on held-out problems: reward, KL to `pi_ref`, and what reranking makes of `pi_ref`'s samples.

Every method's samples are kept in the workdir as JSON lines, and every figure is computed from them: an evaluation
that was stopped goes on with the method it was at. Several processes share the problems. Intervals are 95%, by
bootstrap over problems.
It knows nothing about training.
"""

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qsharp_jax import processes, rollouts, score
from qsharp_jax.dataset import Example
from qsharp_jax.errors import UserError
from qsharp_jax.figures import bootstrap, by_problem, majority
from qsharp_jax.files import read_text, write_atomic
from qsharp_jax.generate import Guide
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueModel
from qsharp_jax.session import Session

# --- Samples --------------------------------------------------------------------------------------------------------


def sample_method(
    session: Session,
    method: str,
    ref: LanguageModel,
    guide: Guide | None,
    *,
    number: int,
    etas: Sequence[float] = (float("inf"),),
    samples: int = 1,
    **changes: Any,
) -> list[dict]:
    """Responses to every test problem, `samples` for each of `etas`, all of them in the same batches.

    They are read from the workdir if they are there, for the same etas.

    Args:
      method: "pi_ref", "pi_ref_greedy", or an algorithm; names the file.
      guide: a policy is sampled in the guide's place.
      number: of the round that fitted the guide; 0 for pi_ref.
      changes: to the config's settings of `generate`.
    """
    path = samples_path(session, method, number)
    text, problems = session.text, session.test_problems()
    plan = list(itertools.product(problems, etas, range(samples)))
    if path.exists():
        rows = read_samples(path)
        if [row["eta"] for row in rows] == [_finite(eta) for _, eta, _ in plan]:
            return rows
    each = len(etas) * samples
    seeds = np.random.SeedSequence(session.seed(f"evaluate {method} {number}")).generate_state(len(plan))
    mine = processes.share(range(len(problems)))
    problems, part = problems[mine.start : mine.stop], slice(mine.start * each, mine.stop * each)
    began, asked = time.monotonic(), len(plan)
    plan = plan[part]
    if not problems:  # there are more processes than problems
        return _keep(session, path, [])
    with session.decoding():
        generation = rollouts.sample(
            ref,
            guide,
            [text.encode_prompt(problem.prompt) for problem in problems],
            samples=each,
            seeds=seeds[part],
            batch_size=session.config.evaluate.batch_size,
            name=f"evaluate {method}" + (f", round {number}" if number else ""),
            eta=np.asarray([eta for _, eta, _ in plan], np.float32),
            record=("kl",),
            **(session.generation_settings() | changes),
        )
    seconds = time.monotonic() - began
    responses = [text.decode(generation.response(row)) for row in range(len(plan))]
    judgements = session.judge([problem for problem, _, _ in plan], responses)
    rows = []
    for row, (problem, eta, _) in enumerate(plan):
        rows.append(
            {
                "problem_id": problem.problem_id,
                "prompt": problem.prompt,
                "answer": problem.answer,
                "response": responses[row],
                "parsed": judgements[row].parsed,
                "reward": judgements[row].reward,
                "finished": bool(generation.finished[row]),
                "eta": _finite(eta),
                "tokens": generation.response(row),
                "kl": float(generation.kl[row].sum()),
                "kl_truncated": float(generation.kl_truncated[row].sum()),
                "seconds": seconds / asked,
            }
        )
    return _keep(session, path, rows)


def score_samples(session: Session, guide: ValueModel, samples: list[dict], *, number: int) -> list[dict]:
    """`pi_ref`'s samples with the guide's value at every response token, kept like samples are."""
    path = samples_path(session, "pi_ref_values", number)
    if path.exists():
        return read_samples(path)
    began, asked = time.monotonic(), len(samples)
    samples = processes.share(samples)
    examples = [Example(session.text.encode_prompt(sample["prompt"]), sample["tokens"]) for sample in samples]
    with session.decoding():
        scores = score.score(
            guide, examples, rows=session.config.evaluate.batch_size, bucket=session.config.fit.length_bucket
        )
    seconds = (time.monotonic() - began) / asked
    rows = [
        {key: sample[key] for key in ("problem_id", "parsed", "reward")}
        | {"values": np.round(values, 4).tolist(), "seconds": sample["seconds"] + seconds}
        for sample, values in zip(samples, scores, strict=True)
    ]
    return _keep(session, path, rows)


def _keep(session: Session, path: Path, rows: list[dict]) -> list[dict]:
    """The rows of all processes, which the first writes."""
    rows = processes.gather(rows)
    if session.workdir.writes:
        write_samples(path, rows)
    return rows


def _finite(eta: float) -> float | None:
    return eta if np.isfinite(eta) else None  # JSON knows no infinity


def samples_path(session: Session, method: str, number: int) -> Path:
    return session.workdir.samples / (f"{method}_round_{number}.jsonl" if number else f"{method}.jsonl")


def write_samples(path: Path, rows: list[dict]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_samples(path: Path) -> list[dict]:
    """The rows of a samples file.

    Raises:
      UserError: naming the damaged line.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}, line {number}, is damaged; delete the file and evaluate again") from None
    return rows


# --- The evaluation of a run ----------------------------------------------------------------------------------------


def evaluate(
    session: Session, ref: LanguageModel, guides: dict[int, Guide], *, full: bool, mode: str | None = "qsharp"
) -> list[dict]:
    """All rows of `results.json`, which it writes, for the guides of some rounds.

    pi_ref sampled and greedy, and the run's algorithm after each round at the eta of collection. With `full` the last
    round's guide is also measured at every eta of the config, Q#'s as CD at the same, and as the judge of pi_ref's
    samples. A method that trains the policy itself is measured after each round as it is; the row's eta is that of its
    objective.

    Args:
      mode: how the guides tilt the reference, of `guidance.MODES`; None for policies.
    """
    config, last = session.config.evaluate, max(guides, default=0)
    samples = sample_method(session, "pi_ref", ref, None, number=0, samples=config.samples)
    greedy = sample_method(session, "pi_ref_greedy", ref, None, number=0, temperature=0.0)
    rows = policy_rows("pi_ref", 0, samples) + policy_rows("pi_ref_greedy", 0, greedy)
    method, changes = session.algorithm, {} if session.trains_policy else {"mode": mode}
    for number, guide in guides.items():
        every = full and number == last and not session.trains_policy
        etas = list(config.etas) if every else [session.eta]
        made = sample_method(session, method, ref, guide, number=number, etas=etas, **changes)
        rows += policy_rows(method, number, made)
    if full and guides and method == "qsharp":
        cd = sample_method(session, "cd", ref, guides[last], number=last, etas=list(config.etas), mode="cd")
        rows += policy_rows("cd", last, cd)
    if full and guides and not session.trains_policy:
        rows += rerank_rows(last, samples, score_samples(session, guides[last], samples, number=last))
    if session.workdir.writes:
        write_atomic(session.workdir.results, json.dumps(rows, indent=1) + "\n")
    return rows


# --- Figures --------------------------------------------------------------------------------------------------------


def policy_rows(method: str, number: int, samples: list[dict]) -> list[dict]:
    """One row for each eta among the samples."""
    by_eta = defaultdict(list)
    for sample in samples:
        by_eta[sample["eta"]].append(sample)
    return [
        _row(
            method,
            number,
            by_problem(part, "reward"),
            eta=eta,
            kl=_mean(part, "kl"),
            kl_truncated=_mean(part, "kl_truncated"),
            response_tokens=float(np.mean([len(sample["tokens"]) for sample in part])),
            finished=_mean(part, "finished"),
            samples=len(part),
            seconds=sum(sample["seconds"] for sample in part),
        )
        for eta, part in by_eta.items()
    ]


def rerank_rows(number: int, samples: list[dict], scored: list[dict]) -> list[dict]:
    """pass@k, majority, best of k and weighted majority, with k the samples that each problem has."""
    groups = defaultdict(list)
    for sample in scored:
        groups[sample["problem_id"]].append(sample)
    k = len(next(iter(groups.values())))
    tokens = float(np.mean([len(sample["tokens"]) for sample in samples])) * k
    rewards = [np.asarray([sample["reward"] for sample in group]) for group in groups.values()]
    answers = [[sample["parsed"] for sample in group] for group in groups.values()]
    values = [np.asarray([sample["values"][-1] for sample in group]) for group in groups.values()]
    rerankers = {
        f"pass_{k}": [float(r.max()) for r in rewards],
        f"majority_{k}": [majority(a, r, np.ones(k)) for a, r in zip(answers, rewards, strict=True)],
        f"best_of_{k}": [float(r[v.argmax()]) for v, r in zip(values, rewards, strict=True)],
        f"weighted_majority_{k}": [majority(a, r, v) for a, r, v in zip(answers, rewards, values, strict=True)],
    }
    seconds = sum(sample["seconds"] for sample in scored)
    return [
        _row(method, number, rewards, samples=len(scored), response_tokens=tokens, seconds=seconds)
        for method, rewards in rerankers.items()
    ]


def _row(method: str, number: int, per_problem: Sequence[float], **figures: Any) -> dict:
    low, high = bootstrap(np.asarray(per_problem))
    return {
        "method": method,
        "eta": None,
        "round": number,
        "n": len(per_problem),
        "reward": float(np.mean(per_problem)),
        "reward_low": low,
        "reward_high": high,
        "kl": None,
        "kl_truncated": None,
    } | figures


def _mean(samples: list[dict], key: str) -> float:
    return float(np.mean([sample[key] for sample in samples]))
