r"""Competition problems: MATH (Hendrycks et al. 2021, arXiv 2103.03874), in the paper's splits and prompt.

7,500 training problems, 750 of them for validation and 6,750 to learn from; the test problems are the 500 of MATH-500
(Lightman et al. 2023, arXiv 2305.20050). A row has a `problem`, a worked `solution`, and an `answer`, or it stands in
the solution's boxes (`boxed.py`).

config: that of finite.py
"""

from typing import Any

from qsharp_jax.tasks import base, boxed, finite
from qsharp_jax.tasks.base import Problem

FINITE = SYMBOLIC = True
SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip
TRAIN = finite.Source("math/train.jsonl", hub="EleutherAI/hendrycks_math", parts=SUBJECTS)
TEST = finite.Source("math500/test.jsonl", hub="HuggingFaceH4/MATH-500", split="test")

check = finite.check
parse = boxed.answer


def problems(config: Any, split: str, count: int, seed: int) -> list[Problem]:
    return finite.choose(config, split, count, seed, train=(TRAIN, of_row), test=(TEST, of_row))


def every_problem(data: str) -> list[Problem]:
    return finite.read(TRAIN, of_row, data) + finite.read(TEST, of_row, data)


def gold(answer: str) -> str:
    """The answer itself.

    Raises:
      ValueError: if it is empty, or its braces do not match.
    """
    text = answer.strip()
    if not text:
        raise ValueError("the answer is empty")
    if boxed.last_box(rf"\boxed{{{text}}}") != text:
        raise ValueError(f"the answer {answer[-60:]!r} has braces that do not match")
    return text


def of_row(row: finite.Row) -> list[Problem]:
    """One row's; `aime` learns from the same."""
    fields = row[1]
    question = finite.text(row, "problem")
    name = fields.get("unique_id") or base.content_id(question)
    parse_, answer = (gold, "answer") if "answer" in fields else (_boxed_gold, "solution")
    return [Problem(name, boxed.prompt(question), finite.gold(row, name, parse_, finite.text(row, answer)))]


def _boxed_gold(solution: str) -> str:
    answer = boxed.answer(solution)
    if answer is None:
        raise ValueError(f"the solution that ends in {solution[-40:]!r} has no answer in a box")
    return answer
