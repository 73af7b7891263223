r"""The 30 problems of AIME 2024, whose answers are integers from 0 to 999, with or without leading zeros.

The guide learns from MATH's training problems. A row has a `problem`, an `answer` and an `id`.

config: as in finite.py
"""

import re
from typing import Any

from qsharp_jax.tasks import base, boxed, finite, math
from qsharp_jax.tasks.base import Problem

FINITE = SYMBOLIC = True

check = finite.check
parse = boxed.answer


def gold(answer: str) -> str:
    """Return the number without leading zeros; raises a ValueError for anything else."""
    number = answer.strip()
    if not re.fullmatch(r"[0-9]{1,3}", number):
        raise ValueError(f"the answer {answer!r} is not an integer from 0 to 999")
    return str(int(number))


def to_problems(row: finite.Row) -> list[Problem]:
    question = row.text("problem")
    problem_id = str(row.fields.get("id", base.content_id(question)))
    return [row.problem(problem_id, boxed.prompt(question), gold, row.text("answer"))]


TRAIN = math.TRAIN
TEST = finite.Source("aime24/test.jsonl", "HuggingFaceH4/aime_2024", to_problems)


def problems(config: Any, split: str, count: int, seed: int) -> list[Problem]:
    return finite.problems(config, split, count, seed, train=TRAIN, test=TEST)


def every_problem(data: str) -> list[Problem]:
    return finite.read(TEST, data)
