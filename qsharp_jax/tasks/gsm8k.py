r"""Grade-school word problems: GSM8K (Cobbe et al. 2021, arXiv 2110.14168), in the paper's splits and prompt.

7,473 training problems, 747 of them for validation and 6,726 to learn from, and 1,319 test problems. A row has a
`question` and a worked `answer` that ends in "#### 72"; a response answers in \boxed{72}.

config: as in finite.py
"""

import re
from typing import Any

from qsharp_jax.tasks import base, boxed, finite
from qsharp_jax.tasks.base import Problem

FINITE = SYMBOLIC = True

check = finite.check
parse = boxed.answer


def gold(answer: str) -> str:
    """Return the number after the last "####", or the text itself, without commas; raises a ValueError otherwise."""
    number = answer.rpartition("####")[2].strip().replace(",", "")
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number):
        raise ValueError(f"the answer {answer[-40:]!r} does not end in a number like '#### 72'")
    return number


def to_problems(row: finite.Row) -> list[Problem]:
    question = row.text("question")
    return [row.problem(base.content_id(question), boxed.prompt(question), gold, row.text("answer"))]


TRAIN, TEST = (
    finite.Source(f"gsm8k/{split}.jsonl", "openai/gsm8k", to_problems, split, parts=("main",))
    for split in ("train", "test")
)


def problems(config: Any, split: str, count: int, seed: int) -> list[Problem]:
    return finite.problems(config, split, count, seed, train=TRAIN, test=TEST)


def every_problem(data: str) -> list[Problem]:
    return finite.read(TRAIN, data) + finite.read(TEST, data)
