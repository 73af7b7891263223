"""Rewards of responses, and which answers to a problem are the same: by strings where these decide, else by algebra.

A task whose answers are mathematics (`SYMBOLIC`) is judged by string equality, then without dress (`dress.py`) as
rational numbers, then by `math_verify` in worker processes, so that whoever generates responses need not wait. It knows
nothing about models.

The rules (units, decimals, bases, percent, sets and tuples) stand in README.md, "Data sets".
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import ModuleType

from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.judging import units
from qsharp_jax.tasks.judging.dress import Answer, undress
from qsharp_jax.tasks.judging.pool import Pool

__all__ = ["Judge", "Judgement", "Pool"]

LONGEST = 2000  # characters of an answer that is read as mathematics
_CHOICE = re.compile(r"(?:\(([A-J])\)[\s\\]|([A-J])[.:)]\s)\s*[^-+*/^=\s].*")  # with what it says
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z ]*[A-Za-z]{2}[A-Za-z ]*")
_BLANKS = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Attributes:
    reward: 1.0 if the response answers rightly, else 0.0.
    parsed: the answer that was found in it; None if there is none.
    """

    reward: float
    parsed: str | None


class Judge:
    """Of one task's responses."""

    def __init__(self, task: ModuleType, workers: int | None = None):
        """Args:
        workers: processes, by default one a core, at most 16; they are started once algebra is needed.
        """
        self._task = task
        self._pool = functools.cache(lambda: Pool(workers))
        self._same = functools.lru_cache(1 << 16)(self._compare)  # a problem's samples often agree

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        """The judgement of each response to the problem beside it."""
        pending = [self.submit(problem, response) for problem, response in zip(problems, responses, strict=True)]
        return [judgement() for judgement in pending]

    def submit(self, problem: Problem, response: str) -> Callable[[], Judgement]:
        """Has a response judged and returns at once; who calls the result waits for the judgement."""
        parsed = self._task.parse(response)
        if not self._task.SYMBOLIC:
            return functools.partial(Judgement, self._task.reward(problem, response), parsed)
        if parsed is None:
            return functools.partial(Judgement, 0.0, None)
        same = self._same(problem.answer, parsed)
        return lambda: Judgement(float(same.result()), parsed)

    def classes(self, problems: Sequence[Problem], answers: Sequence[Sequence[str | None]]) -> list[list[str | None]]:
        """The parsed answers of each problem's samples, with one spelling for all that are the same.

        Right answers are spelled as the problem's. Of the others, those that are the same as each other, be it by way
        of a third, are one class, spelled as the first that was given. None stays None.
        """
        if not self._task.SYMBOLIC:
            return [list(group) for group in answers]
        # Everything is asked before anything is waited for: first what is right, then what wrong ones are the same.
        groups = [list(dict.fromkeys(answer for answer in group if answer is not None)) for group in answers]
        asked = [[self._same(p.answer, answer) for answer in group] for p, group in zip(problems, groups, strict=True)]
        wrong = [
            [answer for answer, same in zip(group, sames, strict=True) if not same.result()]
            for group, sames in zip(groups, asked, strict=True)
        ]
        pairs = [{pair: self._same(*pair) for pair in itertools.combinations(group, 2)} for group in wrong]
        spelled = []
        for problem, group, others, same in zip(problems, groups, wrong, pairs, strict=True):
            spelling = dict.fromkeys(group, problem.answer) | {answer: answer for answer in others}
            for (first, second), verdict in same.items():
                if verdict.result():
                    kept, lost = sorted((spelling[first], spelling[second]), key=others.index)
                    spelling |= {answer: kept for answer in others if spelling[answer] == lost}
            spelled.append(spelling)
        return [
            [None if answer is None else spelling.get(answer) for answer in group]
            for spelling, group in zip(spelled, answers, strict=True)
        ]

    def close(self) -> None:
        """Ends the workers; they also end with this process."""
        self._pool().close()

    def _compare(self, gold: str, answer: str) -> Future[bool]:
        """Whether two answers are the same; what is plain to see is answered at once."""
        if gold.rstrip(". ") == answer.rstrip(". "):
            return _answered(True)
        if max(len(gold), len(answer)) > LONGEST:
            return _answered(False)
        bare_gold, bare_answer = _undressed(gold), undress(answer)
        verdict = _plain(bare_gold, bare_answer)
        return self._pool().same(bare_gold.text, bare_answer.text) if verdict is None else _answered(verdict)


_undressed = functools.lru_cache(1024)(undress)  # the samples of a problem have one gold answer


def _plain(gold: Answer, answer: Answer) -> bool | None:
    """Compare two answers as far as that is plain without algebra; None if it is not."""
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
    """The same for texts that differ in blanks, and of words in capitals."""
    words = _TEXT.sub(r" \1 ", text)
    if _WORDS.fullmatch(words):
        return "".join(words.split()).lower()
    return _BLANKS.sub("", text)


def _answered(verdict: bool) -> Future[bool]:
    future: Future[bool] = Future()
    future.set_result(verdict)
    return future
