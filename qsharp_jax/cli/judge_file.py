"""A file of responses, judged: JSON lines in, the same lines with `reward` and `parsed` out.

It knows nothing about models or runs.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from qsharp_jax.evaluation import statistics
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.files import write_atomic
from qsharp_jax.system.progress import Bar
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.judging import Judge, Judgement


def read(path: str | Path, task: ModuleType, data: str) -> tuple[list[dict], list[Problem]]:
    """The file's records, and the problem that each responds to.

    A record has a text `response`, and an `answer`, as the task's data set has it, or else a `problem_id`.

    Args:
      data: where a finite task's problems are looked up, as in the task's config.

    Raises:
      UserError: if there is no such file or it holds no records, and naming a line that is none, or whose answer or
        problem the task does not know.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # not `splitlines`: JSON has some inside strings
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no file {path}; give --input the path of a file of JSON lines") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError(f"{path} is no text in UTF-8; give --input a file of JSON lines") from None
    places = [f"{path}, line {number}" for number, line in enumerate(lines, start=1) if line.strip()]
    records = [_parse(place, line) for place, line in zip(places, filter(str.strip, lines), strict=True)]
    if not records:
        raise UserError(f"{path} holds no responses; write them as JSON lines")
    known = {}
    if not all("answer" in record for record in records):
        if not task.FINITE:
            raise UserError(f"{path}: this task has no fixed set of problems to find a problem_id in; add each answer")
        known = {problem.problem_id: problem for problem in task.every_problem(data)}
    return records, [_problem(place, record, task, known) for place, record in zip(places, records, strict=True)]


def _parse(place: str, line: str) -> dict:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is in no text
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("response"), str):
        raise UserError(f'{place}: expected a JSON object with a text "response"')
    answered = isinstance(record.get("answer"), str | int | float) and not isinstance(record["answer"], bool)
    if not answered and ("answer" in record or not isinstance(record.get("problem_id"), str)):
        raise UserError(f'{place}: expected an "answer", a text or a number, or else a text "problem_id"')
    return record


def _problem(place: str, record: dict, task: ModuleType, known: dict[str, Problem]) -> Problem:
    if "answer" not in record:
        if record["problem_id"] not in known:
            raise UserError(f"{place}: there is no problem {record['problem_id']!r} in the task's data; add the answer")
        return known[record["problem_id"]]
    answer = str(record["answer"])
    if task.FINITE:
        try:
            answer = task.gold(answer)
        except ValueError as error:
            raise UserError(f"{place}: {error}; mend it") from None
    return Problem(str(record.get("problem_id", place)), "", answer)


def judge(task: ModuleType, records: Sequence[dict], problems: Sequence[Problem]) -> list[Judgement]:
    """The judgement of each record's response."""
    ask = Judge(task).submit
    pending = [ask(problem, record["response"]) for problem, record in zip(problems, records, strict=True)]
    return [judgement() for judgement in Bar(pending, "judge")]


def write(path: str | Path, records: Sequence[dict], judgements: Sequence[Judgement]) -> None:
    """Writes the records with what was found, the whole file or nothing."""
    judged = [record | vars(judgement) for record, judgement in zip(records, judgements, strict=True)]
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in judged))


def summary(problems: Sequence[Problem], judgements: Sequence[Judgement]) -> str:
    """The mean reward, and how many responses had no answer."""
    samples = [
        {"problem_id": problem.problem_id, "reward": judgement.reward}
        for problem, judgement in zip(problems, judgements, strict=True)
    ]
    rewards = np.asarray(statistics.by_problem(samples, "reward"))
    low, high = statistics.bootstrap(rewards)
    without = sum(judgement.parsed is None for judgement in judgements)
    return (
        f"{len(judgements)} responses to {len(rewards)} problems: mean reward over problems {rewards.mean():.4f}, 95%"
        f" bootstrap interval {low:.4f} .. {high:.4f}; {without} without an answer, at reward 0"
    )
