"""`qsharp judge`: rewards of given responses, without a model."""

import argparse
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from qsharp_jax.cli import json_lines
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.files import write_atomic

if TYPE_CHECKING:  # importing the tasks takes a second
    from qsharp_jax.tasks.base import Problem
    from qsharp_jax.tasks.judging import Judgement

SUMMARY = "rewards of given responses, without a model; JSON lines"
EPILOG = """\
A line of the input is a JSON object with a text "response", and an "answer", the right one as the task's data set has
it, or else the "problem_id" of one of its problems. The output has the same lines and fields, with

  reward  1.0 for a right answer, else 0.0
  parsed  the answer read from the response, null if there is none

Mathematical answers are equal if they are equal as texts, as rational numbers, or by `math_verify`, which runs in
worker processes with bounded time and memory. The file is written whole, at the end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(workdir=None)
    parser.add_argument("--task", metavar="NAME", required=True, help="the task that they respond to, such as gsm8k")
    parser.add_argument("--input", metavar="FILE", required=True, help="JSON lines, as described below")
    parser.add_argument("--output", metavar="FILE", required=True, help="where the JSON lines go")
    parser.add_argument(
        "--data", metavar="DIR", default="",
        help="where a problem_id is looked up: a folder of the data set's files, or hub (default: the folder that"
        " QSHARP_DATA names, else the hub)",
    )  # fmt: skip


def run(workdir: None, options: argparse.Namespace) -> None:
    """Judge the responses of a file, and write them with rewards and parsed answers."""
    from qsharp_jax.system.progress import Bar
    from qsharp_jax.tasks import registry
    from qsharp_jax.tasks.judging import Judge

    try:
        task = registry.get(options.task)
    except ValueError as error:
        raise UserError(str(error)) from None
    if hasattr(task, "judge"):
        raise UserError(f"the task {options.task} has no answers to judge by; its runs call their reward functions")
    records, problems = read(options.input, task, options.data)
    json_lines.check_other_file(options.output, options.input)
    json_lines.check_output(options.output)
    submit = Judge(task).submit
    pending = [submit(problem, record["response"]) for problem, record in zip(problems, records, strict=True)]
    judgements = [judgement() for judgement in Bar(pending, "judge")]
    judged = [record | vars(judgement) for record, judgement in zip(records, judgements, strict=True)]
    write_atomic(options.output, "".join(json_lines.dump(record) + "\n" for record in judged))
    print(f"{options.output}: {summary(problems, judgements)}", file=sys.stderr)


def read(path: str, task: ModuleType, data: str) -> tuple[list[dict], list["Problem"]]:
    """Read the records of a file, and the problem that each responds to; a UserError names the line.

    Args:
      data: where a finite task's problems are looked up, as in the task's config.
    """
    lines = json_lines.read_lines(path, "responses as JSON lines")
    records = [(place, _parse(place, line)) for place, line in lines]
    known = {}
    if not all("answer" in record for _, record in records):
        if not task.FINITE:
            raise UserError(f"{path}: this task has no fixed set of problems to find a problem_id in; add each answer")
        known = {problem.problem_id: problem for problem in task.every_problem(data)}
    return [record for _, record in records], [_problem(place, record, task, known) for place, record in records]


def _parse(place: str, line: str) -> dict:
    record = json_lines.parse(line)
    if record is None or not isinstance(record.get("response"), str):
        raise UserError(f'{place}: expected a JSON object with a text "response"')
    answered = isinstance(record.get("answer"), str | int | float) and not isinstance(record["answer"], bool)
    if not answered and ("answer" in record or not isinstance(record.get("problem_id"), str)):
        raise UserError(f'{place}: expected an "answer", a text or a number, or else a text "problem_id"')
    return record


def _problem(place: str, record: dict, task: ModuleType, known: dict[str, "Problem"]) -> "Problem":
    from qsharp_jax.tasks.base import Problem

    if "answer" not in record:
        if record["problem_id"] not in known:
            raise UserError(f"{place}: there is no problem {record['problem_id']!r} in the task's data; add the answer")
        return known[record["problem_id"]]
    answer = str(record["answer"])
    if task.FINITE:
        try:
            answer = task.gold(answer)
        except ValueError as error:
            raise UserError(f"{place}: {error}; correct it") from None
    return Problem(str(record.get("problem_id", place)), "", answer)


def summary(problems: list["Problem"], judgements: list["Judgement"]) -> str:
    """Return a line with the mean reward over problems, its interval, and the number of responses without an answer."""
    import numpy as np

    from qsharp_jax.evaluation import statistics

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
