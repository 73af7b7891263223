r"""Multiple choice about long texts: QuALITY v1.0.1 (Pang et al. 2022, arXiv 2112.08608), files "htmlstripped".

A row is an article of some 5,000 tokens, `article`, with `questions`, each with `question`, four `options`, a
`gold_label` from 1 to 4 and a `question_unique_id`. To learn from: train, a tenth of its articles for validation;
test: dev, since the test file has no labels. A response answers by a letter, \boxed{B}.

config: that of finite.py
"""

import re
from typing import Any

from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import base, boxed, finite
from qsharp_jax.tasks.base import Problem

FINITE, SYMBOLIC = True, False
LETTERS = "ABCD"
_ADDRESS = "https://raw.githubusercontent.com/nyu-mll/quality/main/data/v1.0.1/"
TRAIN, TEST = (
    finite.Source(f"quality/{name}", hub=_ADDRESS + name)
    for name in ("QuALITY.v1.0.1.htmlstripped.train", "QuALITY.v1.0.1.htmlstripped.dev")
)

check = finite.check


def problems(config: Any, split: str, count: int, seed: int) -> list[Problem]:
    return finite.choose(config, split, count, seed, train=(TRAIN, of_row), test=(TEST, of_row), group=_article)


def every_problem(data: str) -> list[Problem]:
    return finite.read(TRAIN, of_row, data) + finite.read(TEST, of_row, data)


def parse(response: str) -> str | None:
    """The letter in the answer's one box: B, b, (B), \\text{B}, or B followed by the option's text; else None."""
    boxes = boxed.answers(response)
    if len(boxes) != 1:
        return None
    letter = re.match(r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\(?\s*([A-Da-d])(?![A-Za-z])", boxes[0])
    return letter[1].upper() if letter else None


def reward(problem: Problem, response: str) -> float:
    return float(parse(response) == problem.answer)


def gold(answer: str) -> str:
    """The letter of a label from 1 to 4, or a letter itself.

    Raises:
      ValueError: for anything else.
    """
    label = answer.strip().upper()
    if re.fullmatch("[1-4]", label):
        return LETTERS[int(label) - 1]
    if not re.fullmatch("[A-D]", label):
        raise ValueError(f"the gold label is {answer!r}; it must be from 1 to 4, or a letter from A to D")
    return label


def of_row(row: finite.Row) -> list[Problem]:
    where, fields = row
    article, questions = finite.text(row, "article"), fields.get("questions")
    if not isinstance(questions, list) or not all(isinstance(question, dict) for question in questions):
        raise UserError(f"{where}: the field 'questions' must be a list of objects; put the file there anew")
    return [_problem((f"{where}, question {number}", asked), article) for number, asked in enumerate(questions, 1)]


def _problem(row: finite.Row, article: str) -> Problem:
    where, fields = row
    question, options = finite.text(row, "question"), fields.get("options")
    name = fields.get("question_unique_id") or base.content_id(article + question)
    if not isinstance(options, list) or len(options) != len(LETTERS) or not all(isinstance(o, str) for o in options):
        raise UserError(f"{where}: the field 'options' must be a list of {len(LETTERS)} texts; put the file there anew")
    choices = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    prompt = boxed.prompt(f"{article}\n\n{question}\n\n{choices}\n\n")
    label = finite.gold(row, name, gold, str(fields.get("gold_label")))
    return Problem(f"{base.content_id(article)}/{name}", prompt, label)


def _article(problem: Problem) -> str:
    """Two writers' questions on one article are in different rows."""
    return problem.problem_id.partition("/")[0]
