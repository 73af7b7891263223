r"""Grade-school word problems: GSM8K (Cobbe et al. 2021, arXiv 2110.14168), in the paper's splits and prompt.

7,473 training problems, 747 of them for validation and 6,726 to learn from, and 1,319 test problems. A row has a
`question` and a worked `answer` that ends in "#### 72"; a response answers in \boxed{72}.

config: that of finite.py
"""

import re
from typing import Any

from qsharp_jax.tasks import base, boxed, finite
from qsharp_jax.tasks.base import Problem

FINITE = SYMBOLIC = True
TRAIN, TEST = (
    finite.Source(f"gsm8k/{split}.jsonl", hub="openai/gsm8k", parts=("main",), split=split)
    for split in ("train", "test")
)

check = finite.check
parse = boxed.answer


def problems(config: Any, split: str, count: int, seed: int) -> list[Problem]:
    return finite.choose(config, split, count, seed, train=(TRAIN, of_row), test=(TEST, of_row))


def every_problem(data: str) -> list[Problem]:
    return finite.read(TRAIN, of_row, data) + finite.read(TEST, of_row, data)


def gold(answer: str) -> str:
    """The number after the last "####", or the text itself, without the commas between thousands.

    Raises:
      ValueError: if that is no number.
    """
    number = answer.rpartition("####")[2].strip().replace(",", "")
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number):
        raise ValueError(f"the answer {answer[-40:]!r} does not end in a number, as in '#### 72'")
    return number


def of_row(row: finite.Row) -> list[Problem]:
    question = finite.text(row, "question")
    name = base.content_id(question)
    return [Problem(name, boxed.prompt(question), finite.gold(row, name, gold, finite.text(row, "answer")))]
