r"""Multiple choice about long texts: QuALITY v1.0.1 (Pang et al. 2022, arXiv 2112.08608), files "htmlstripped".

A row is an article of about 5,000 tokens, `article`, with `questions`, each with `question`, four `options`, a
`gold_label` from 1 to 4 and a `question_unique_id`. The training problems are those of train, a tenth of its articles
for validation; the test problems are those of dev, since the test file has no labels. A response answers with a
letter, \boxed{B}.

config: as in finite.py
"""

import re
from typing import Any

from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import base, boxed, finite
from qsharp_jax.tasks.base import Problem

FINITE, SYMBOLIC = True, False
LETTERS = "ABCD"
_URL = "https://raw.githubusercontent.com/nyu-mll/quality/main/data/v1.0.1/"

_LETTER = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\(?\s*([A-Da-d])"
    r"(?:\s*(?:[\]).:;}$*]|\Z|,(?!\s*\(?[A-Da-d]\b)|[-\u2013\u2014]\s)|[ \t]*\n|(?<![Aa])\s)"
)

check = finite.check


def parse(response: str) -> str | None:
    """Return the letter in the answer's only box: B, b, (B), \\text{B}, or B followed by the option's text.

    A before a text must be written "A." or so: with a blank alone it is the article, as in "A sense of duty".
    """
    boxes = boxed.answers(response)
    if len(boxes) != 1:
        return None
    letter = _LETTER.match(boxes[0])
    return letter[1].upper() if letter else None


def reward(problem: Problem, response: str) -> float:
    return float(parse(response) == problem.answer)


def gold(answer: str) -> str:
    """Return the letter of a label from 1 to 4, or a letter itself; raises a ValueError for anything else."""
    label = answer.strip().upper()
    if re.fullmatch("[1-4]", label):
        return LETTERS[int(label) - 1]
    if not re.fullmatch("[A-D]", label):
        raise ValueError(f"the gold label is {answer!r}; it must be from 1 to 4, or a letter from A to D")
    return label


def to_problems(row: finite.Row) -> list[Problem]:
    article, questions = row.text("article"), row.fields.get("questions")
    if not isinstance(questions, list) or not all(isinstance(question, dict) for question in questions):
        raise UserError(f"{row.place}: the field 'questions' must be a list of objects; download the file again")
    return [
        _to_problem(finite.Row(f"{row.place}, question {number}", fields), article)
        for number, fields in enumerate(questions, start=1)
    ]


def _to_problem(row: finite.Row, article: str) -> Problem:
    question, options = row.text("question"), row.fields.get("options")
    name = row.fields.get("question_unique_id") or base.content_id(article + question)
    if not isinstance(options, list) or len(options) != len(LETTERS) or not all(isinstance(o, str) for o in options):
        raise UserError(
            f"{row.place}: the field 'options' must be a list of {len(LETTERS)} texts; download the file again"
        )
    choices = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    prompt = boxed.prompt(f"{article}\n\n{question}\n\n{choices}\n\n")
    return row.problem(f"{base.content_id(article)}/{name}", prompt, gold, str(row.fields.get("gold_label")))


def _article(problem: Problem) -> str:
    """The article of a problem; several rows may have questions about one article."""
    return problem.problem_id.partition("/")[0]


TRAIN, TEST = (
    finite.Source(f"quality/{name}", _URL + name, to_problems)
    for name in ("QuALITY.v1.0.1.htmlstripped.train", "QuALITY.v1.0.1.htmlstripped.dev")
)


def problems(config: Any, split: str, count: int, seed: int) -> list[Problem]:
    return finite.problems(config, split, count, seed, train=TRAIN, test=TEST, group=_article)


def every_problem(data: str) -> list[Problem]:
    return finite.read(TRAIN, data) + finite.read(TEST, data)
