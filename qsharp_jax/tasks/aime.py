r"""The 30 problems of AIME 2024, whose answers are whole numbers from 0 to 999, written with or without leading zeros.

The guide learns from MATH's training problems. A row has a `problem`, an `answer` and an `id`.

config: that of finite.py
"""

import re
from typing import Any

from qsharp_jax.tasks import base, boxed, finite, math
from qsharp_jax.tasks.base import Problem

FINITE = SYMBOLIC = True
TEST = finite.Source("aime24/test.jsonl", hub="HuggingFaceH4/aime_2024")

check = finite.check
parse = boxed.answer


def problems(config: Any, split: str, count: int, seed: int) -> list[Problem]:
    return finite.choose(config, split, count, seed, train=(math.TRAIN, math.of_row), test=(TEST, of_row))


def every_problem(data: str) -> list[Problem]:
    return finite.read(TEST, of_row, data)


def gold(answer: str) -> str:
    """The number, without leading zeros.

    Raises:
      ValueError: for anything else.
    """
    number = answer.strip()
    if not re.fullmatch(r"[0-9]{1,3}", number):
        raise ValueError(f"the answer {answer!r} is no whole number from 0 to 999")
    return str(int(number))


def of_row(row: finite.Row) -> list[Problem]:
    question = finite.text(row, "problem")
    name = str(row[1].get("id", base.content_id(question)))
    return [Problem(name, boxed.prompt(question), finite.gold(row, name, gold, finite.text(row, "answer")))]
