"""Rewards of responses, and equivalence of answers to a problem.

Mathematical answers (of `SYMBOLIC` tasks) are compared as strings, then as rational numbers in a normal form
(`dress.py`), then by `math_verify` in worker processes, so that generation does not wait for them. The rules (units,
decimals, bases, percent, sets and tuples) are described in docs/tasks.md.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import ModuleType

import qsharp_jax.tasks.judging.units as units
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.judging.dress import Answer, undress
from qsharp_jax.tasks.judging.pool import Pool

__all__ = ["Judge", "Judgement", "Pool"]

LONGEST = 2000  # characters; longer answers are not read as mathematics
_CHOICE = re.compile(r"(?:\(([A-J])\)[\s\\]|([A-J])[.:)]\s)\s*[^-+*/^=\s].*")  # with what it says
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z ]*[A-Za-z]{2}[A-Za-z ]*")
_BLANKS = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The reward of a response, 1.0 for a correct mathematical answer, and its answer; None if there is none.

    A response for which a reward function failed has no reward, None.
    """

    reward: float | None
    parsed: str | None


class Judge:
    """Judge of the responses to one task's problems."""

    has_answers = True

    def __init__(self, task: ModuleType, workers: int | None = None):
        """Create a judge; its `workers`, by default one per core up to 16, start when algebra is needed."""
        self._task = task
        self._pool = functools.cache(lambda: Pool(workers))
        self._same = functools.lru_cache(1 << 16)(self._compare)  # a problem's samples often agree

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        """Judge each response to the problem at the same position."""
        pending = [self.submit(problem, response) for problem, response in zip(problems, responses, strict=True)]
        return [judgement() for judgement in pending]

    def submit(
        self, problem: Problem, response: str, *, tokens: Sequence[int] = (), finished: bool = True
    ) -> Callable[[], Judgement]:
        """Start to judge a response; calling the result waits for the judgment.

        Its `tokens`, and whether it `finished`, do not matter: an answer counts wherever it is.
        """
        parsed = self._task.parse(response)
        if not self._task.SYMBOLIC:
            return functools.partial(Judgement, self._task.reward(problem, response), parsed)
        if parsed is None:
            return functools.partial(Judgement, 0.0, None)
        same = self._same(problem.answer, parsed)
        return lambda: Judgement(float(same.result()), parsed)

    def classes(self, problems: Sequence[Problem], answers: Sequence[Sequence[str | None]]) -> list[list[str | None]]:
        """Give all equivalent answers to a problem one spelling.

        Correct answers are spelled like the problem's. Other answers that are equivalent, directly or through further
        ones, are spelled like the first of them. None stays None.

        Args:
          problems: [n].
          answers: per problem, the parsed answers of its samples.
        """
        if not self._task.SYMBOLIC:
            return [list(group) for group in answers]
        # Submit everything before waiting: first to find the correct answers, then which wrong ones are equivalent.
        groups = [list(dict.fromkeys(answer for answer in group if answer is not None)) for group in answers]
        correct = [
            [self._same(p.answer, answer) for answer in group] for p, group in zip(problems, groups, strict=True)
        ]
        wrong = [
            [answer for answer, same in zip(group, sames, strict=True) if not same.result()]
            for group, sames in zip(groups, correct, strict=True)
        ]
        pairs = [{pair: self._same(*pair) for pair in itertools.combinations(group, 2)} for group in wrong]
        spelled = []
        for problem, group, others, same in zip(problems, groups, wrong, pairs, strict=True):
            spelling = dict.fromkeys(group, problem.answer) | {answer: answer for answer in others}
            for (first, second), verdict in same.items():
                if verdict.result():
                    first_spelling, second_spelling = sorted((spelling[first], spelling[second]), key=others.index)
                    spelling |= {answer: first_spelling for answer in others if spelling[answer] == second_spelling}
            spelled.append(spelling)
        return [
            [None if answer is None else spelling.get(answer) for answer in group]
            for spelling, group in zip(spelled, answers, strict=True)
        ]

    def close(self) -> None:
        """End the workers; they also end with this process."""
        self._pool().close()

    def _compare(self, gold: str, answer: str) -> Future[bool]:
        """Start to compare two answers; the verdict is immediate unless it takes algebra."""
        if gold.rstrip(". ") == answer.rstrip(". "):
            return _answered(True)
        if max(len(gold), len(answer)) > LONGEST:
            return _answered(False)
        bare_gold, bare_answer = _undressed(gold), undress(answer)
        verdict = _plain(bare_gold, bare_answer)
        return self._pool().same(bare_gold.text, bare_answer.text) if verdict is None else _answered(verdict)


_undressed = functools.lru_cache(1024)(undress)  # the samples of a problem have one gold answer


def _plain(gold: Answer, answer: Answer) -> bool | None:
    """Compare two answers without algebra; None if that does not decide."""
    if units.conflict(gold.unit, answer.unit):
        return False
    if (choice := _CHOICE.fullmatch(answer.text)) and re.fullmatch("[A-J]", gold.text):
        return gold.text in choice.groups()
    if gold.value is None or answer.value is None or (gold.name and answer.name and gold.name != answer.name):
        return _spelling(gold.text) == _spelling(answer.text) or None
    if gold.unit in units.LETTERS and gold.text.endswith(gold.unit) and not answer.unit:
        return False  # 5m may be five times m
    if gold.value == answer.value and (gold.percent or not answer.percent or abs(gold.value) >= 1):
        return True
    if answer.percent and not gold.percent and answer.value / 100 == gold.value:
        return True
    return None if gold.rounded or answer.rounded else False


def _spelling(text: str) -> str:
    """Return a form that is the same for texts that differ in blanks, or in the case of words."""
    words = _TEXT.sub(r" \1 ", text)
    if _WORDS.fullmatch(words):
        return "".join(words.split()).lower()
    return _BLANKS.sub("", text)


def _answered(verdict: bool) -> Future[bool]:
    future: Future[bool] = Future()
    future.set_result(verdict)
    return future
