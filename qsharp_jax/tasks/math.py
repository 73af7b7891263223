r"""Competition problems: MATH (Hendrycks et al. 2021, arXiv 2103.03874), in the paper's splits and prompt.

7,500 training problems, 750 of them for validation and 6,750 to learn from; the test problems are the 500 of MATH-500
(Lightman et al. 2023, arXiv 2305.20050). A row has a `problem`, a worked `solution`, and either an `answer` or the
answer in the solution's boxes (`boxed.py`).

config: as in finite.py
"""

from typing import Any

from qsharp_jax.tasks import base, boxed, finite
from qsharp_jax.tasks.base import Problem

FINITE = SYMBOLIC = True
SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip

check = finite.check
parse = boxed.answer


def gold(answer: str) -> str:
    """Return the answer itself, stripped; raises a ValueError if it is empty, or its braces do not match."""
    text = answer.strip()
    if not text:
        raise ValueError("the answer is empty")
    if boxed.last_box(rf"\boxed{{{text}}}") != text:
        raise ValueError(f"the answer {answer[-60:]!r} has braces that do not match")
    return text


def _boxed_gold(solution: str) -> str:
    answer = boxed.answer(solution)
    if answer is None:
        raise ValueError(f"the solution that ends in {solution[-40:]!r} has no answer in a box")
    return answer


def to_problems(row: finite.Row) -> list[Problem]:
    question = row.text("problem")
    problem_id = row.fields.get("unique_id") or base.content_id(question)
    parse_gold, field = (gold, "answer") if "answer" in row.fields else (_boxed_gold, "solution")
    return [row.problem(problem_id, boxed.prompt(question), parse_gold, row.text(field))]


TRAIN = finite.Source("math/train.jsonl", "EleutherAI/hendrycks_math", to_problems, parts=SUBJECTS)
TEST = finite.Source("math500/test.jsonl", "HuggingFaceH4/MATH-500", to_problems, "test")


def problems(config: Any, split: str, count: int, seed: int) -> list[Problem]:
    return finite.problems(config, split, count, seed, train=TRAIN, test=TEST)


def every_problem(data: str) -> list[Problem]:
    return finite.read(TRAIN, data) + finite.read(TEST, data)
