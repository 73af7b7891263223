"""Samples of every method on the test problems: JSON lines in the workdir, one file per method.

Until a method is finished, its samples are stored in shards, from which a stopped evaluation resumes. Several processes
share the shards.
"""

import dataclasses
import itertools
import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qsharp_jax import rollouts
from qsharp_jax.data.batches import Example, length_batches
from qsharp_jax.decoding import ContinuousBatch, Generation, Guide
from qsharp_jax.evaluation import score
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueModel
from qsharp_jax.run import models
from qsharp_jax.run.problems import judge, longest_prompt, test_problems
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.sampling import Sampling
from qsharp_jax.system import multihost, stop_strings
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.files import is_remote, read_text, remove_folder, write_atomic
from qsharp_jax.system.progress import Bar
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.rewards import AnyJudge

SAMPLE = (  # keys of a sample; a guide's samples also have "values", one per token, None for a token it did not score
    "problem_id", "prompt", "answer", "response", "parsed", "reward", "finished", "eta", "tokens", "kl", "kl_truncated",
    "seconds",
)  # fmt: skip

# Waits for the judgment of a response, and returns its row and the time at which the response was computed.
PendingRow = Callable[[], tuple[dict, float]]


def sample_method(
    session: Session,
    method: str,
    ref: LanguageModel,
    guide: Guide | None,
    sampling: Sampling,
    *,
    number: int,
    etas: Sequence[float] = (math.inf,),
    samples: int = 1,
) -> list[dict]:
    """Return `samples` responses to every test problem for each of `etas`; those in the workdir are read from it.

    Args:
      method: "pi_ref", "pi_ref_greedy", "pi_ref_top_k", an algorithm's name, or that with "_greedy"; names the file.
      guide: the guide, or a policy to sample in its place.
      sampling: its eta is ignored.
      number: the round that fitted the guide; 0 for pi_ref.
    """
    tokenizer, problems = models.tokenizer(session), test_problems(session)
    each = len(etas) * samples
    plan = list(itertools.product(problems, etas, range(samples)))
    prompts = [tokenizer.encode_prompt(problem.prompt) for problem in problems]
    rows = session.config.evaluate.batch_size
    size = max(1, rows // each) * each  # of a shard: whole problems, about as many responses as are decoded at once

    def compute(shards: Sequence[Sequence[int]]) -> Iterator[tuple[int, PendingRow]]:
        # All prompts and seeds are passed, whatever is missing, so that the compiled programs are the same.
        order = [place for shard in shards for place in sorted(shard, key=lambda place: len(prompts[place // each]))]
        batch = ContinuousBatch(
            ref,
            guide,
            prompts,
            dataclasses.replace(sampling, eta=np.asarray([eta for _, eta, _ in plan], np.float32)),
            samples=each,
            rows=rows,
            longest=longest_prompt(session),
            rng=np.random.SeedSequence(session.seed(f"evaluate {method} {number}")).generate_state(len(plan)),
            order=order,
            record=rollouts.recorded(guide),
            tokenizer=tokenizer,
        )
        name = f"evaluate {method}" + (f", round {number}" if number else "")
        with Bar(None, name, total=len(order), before="compiling") as bar:
            for places, part in batch:
                now = time.monotonic()
                if multihost.leads(session.hosts_per_group):
                    for row, place in enumerate(places.tolist()):
                        problem, eta, _ = plan[place]
                        text = stop_strings.cut(tokenizer.decode(part.response(row)), sampling.stop)
                        yield place, judged(text, judge(session), problem, eta, part, row, now)
                bar.update(len(places))

    return _in_shards(
        samples_path(session.workdir, method, number),
        [{"problem_id": problem.problem_id, "eta": _finite(eta)} for problem, eta, _ in plan],
        [range(begin, min(begin + size, len(plan))) for begin in range(0, len(plan), size)],
        compute,
        decoding=session.decoding,
        hosts_per_group=session.hosts_per_group,
        writes=session.workdir.writes,
    )


def judged(
    response: str, judge: AnyJudge, problem: Problem, eta: float, part: Generation, row: int, now: float
) -> PendingRow:
    """Start to judge the response in a row of `part`, with this text; `now` is returned beside the sample."""
    judgement = judge.submit(problem, response, tokens=part.response(row), finished=bool(part.finished[row]))
    numbers = {
        "finished": bool(part.finished[row]),
        "eta": _finite(eta),
        "tokens": part.response(row),
        "kl": float(part.kl[row].sum()),
        "kl_truncated": float(part.kl_truncated[row].sum()),
        "seconds": 0.0,
    }
    if part.values is not None:
        numbers["values"] = _rounded(part.values[row, : part.lengths[row]])

    def result() -> tuple[dict, float]:
        verdict = judgement()
        texts = {"prompt": problem.prompt, "answer": problem.answer, "response": response}
        texts |= {"columns": dict(problem.columns)} if problem.columns else {}
        texts |= {"parsed": verdict.parsed, "reward": verdict.reward}
        return {"problem_id": problem.problem_id} | texts | numbers, now

    return result


def score_samples(session: Session, guide: ValueModel, samples: list[dict], *, number: int) -> list[dict]:
    """Return the guide's values at every response token of `pi_ref`'s samples, stored in the workdir like samples."""
    rows, bucket = session.config.evaluate.batch_size, session.config.fit.length_bucket
    tokenizer = models.tokenizer(session)
    examples = [Example(tokenizer.encode_prompt(sample["prompt"]), sample["tokens"]) for sample in samples]
    keys = [
        {"problem_id": sample["problem_id"], "tokens_crc32": zlib.crc32(np.asarray(sample["tokens"], "<i4").tobytes())}
        for sample in samples
    ]
    shards: list[list[int]] = []  # whole batches, so that they are those of scoring everything at once
    for _, indices in length_batches([len(example) for example in examples], rows=rows, bucket=bucket):
        if not shards or len(shards[-1]) >= rows:
            shards.append([])
        shards[-1] += indices.tolist()

    def compute(shards: Sequence[Sequence[int]]) -> Iterator[tuple[int, PendingRow]]:
        for shard in Bar(shards, f"score pi_ref, round {number}"):
            scores = score.score(guide, [examples[place] for place in shard], rows=rows, bucket=bucket)
            now = time.monotonic()
            if multihost.leads(session.hosts_per_group):
                for place, values in zip(shard, scores, strict=True):
                    fields = {key: samples[place][key] for key in ("parsed", "reward")}
                    row = keys[place] | fields | {"values": _rounded(values), "seconds": samples[place]["seconds"]}
                    yield place, lambda row=row, now=now: (row, now)

    return _in_shards(
        samples_path(session.workdir, "pi_ref_values", number),
        keys,
        shards,
        compute,
        decoding=session.decoding,
        hosts_per_group=session.hosts_per_group,
        writes=session.workdir.writes,
    )


# --- Files ----------------------------------------------------------------------------------------------------------


def samples_path(workdir: Workdir, method: str, number: int) -> Path:
    return workdir.samples / (f"{method}_round_{number}.jsonl" if number else f"{method}.jsonl")


def write_samples(path: Path, rows: list[dict]) -> None:
    """Write a samples file, whole or not at all; raises a UserError for NaN and infinity, which JSON does not have."""
    try:
        write_atomic(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    except ValueError as error:
        raise UserError(
            f"{path} was not written: a sample's reward or KL is not a finite number ({error}); check the reward"
            " function and the models' weights"
        ) from None


def read_samples(path: Path) -> list[dict]:
    """Read the rows of a samples file; raises a UserError that names a damaged line."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}, line {number}, is damaged; delete the file and evaluate again") from None
    return rows


def _in_shards(
    path: Path,
    keys: Sequence[Mapping[str, Any]],
    shards: Sequence[Sequence[int]],
    compute: Callable[[Sequence[Sequence[int]]], Iterable[tuple[int, PendingRow]]],
    *,
    decoding: Callable[[], AbstractContextManager],
    hosts_per_group: int,
    writes: bool,
) -> list[dict]:
    """Return the rows of a samples file, in every process; missing rows are computed and stored shard by shard.

    A row's share of the time since the previous shard's end is added to its seconds.

    Args:
      keys: items that each row must have; a file or shard with other rows belongs to another evaluation.
      shards: the places of the rows in each.
      compute: yields the places and rows of some shards as they are computed, in the processes that lead.
      decoding: returns the context to compute in.
      hosts_per_group: processes that compute as one.
      writes: whether this process writes `path`.
    """
    # What the first process reads decides, since the processes of a group must do the same.
    if (rows := multihost.gather([_read_matching(path, keys)])[0]) is not None:
        if writes:
            remove_folder(path.with_suffix(""))  # left by a kill after the file was written
        return rows
    folder = path.with_suffix("")
    paths = [folder / f"shard-{index:05d}.jsonl" for index in range(len(shards))]
    stored = [
        _read_matching(shard_path, [keys[place] for place in shard])
        for shard_path, shard in zip(paths, shards, strict=True)
    ]
    missing = multihost.gather([[index for index, rows in enumerate(stored) if rows is None]])[0]
    groups = jax.process_count() // hosts_per_group
    mine = missing[jax.process_index() // hosts_per_group :: groups]
    previous_end = time.monotonic()

    def write(index: int, computed: list[tuple[dict, float]]) -> None:
        nonlocal previous_end
        end = max(moment for _, moment in computed)
        each = (end - previous_end) / len(computed) / groups
        previous_end = end
        if not is_remote(path):
            folder.mkdir(parents=True, exist_ok=True)
        write_samples(paths[index], [row | {"seconds": row["seconds"] + each} for row, _ in computed])

    if mine:
        with decoding():
            rollouts.write_shards(compute([shards[i] for i in mine]), {i: shards[i] for i in mine}, write)
    multihost.wait_for_all(f"the samples in {path.name}")
    rows = _merged(paths, shards) if multihost.is_first() else []
    rows = multihost.gather(rows, hosts_per_group)
    if writes:
        write_samples(path, rows)
        remove_folder(folder)
    return rows


def _read_matching(path: Path, keys: Sequence[Mapping[str, Any]]) -> list[dict] | None:
    """Read the rows of a file; None if it does not exist, or its rows do not have the items of `keys`."""
    if not path.exists():
        return None
    rows = read_samples(path)
    same = len(rows) == len(keys) and all(key.items() <= row.items() for key, row in zip(keys, rows, strict=True))
    return rows if same else None


def _merged(paths: Sequence[Path], shards: Sequence[Sequence[int]]) -> list[dict]:
    rows = {}
    for path, shard in zip(paths, shards, strict=True):
        rows |= dict(zip(shard, read_samples(path), strict=True))
    return [rows[place] for place in sorted(rows)]


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON has no infinity


def _rounded(values: np.ndarray) -> list[float | None]:
    """Round to four digits; None where no value is known."""
    return [_finite(value) for value in np.round(values.astype(float), 4).tolist()]
