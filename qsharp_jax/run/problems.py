"""The problems of a run and the judge of the responses to them."""

import functools
import json
from types import ModuleType

from ml_collections import ConfigDict

from qsharp_jax.run import models
from qsharp_jax.run.session import Session
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import registry
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.judging import Judge
from qsharp_jax.tasks.rewards import AnyJudge


def task(session: Session) -> ModuleType:
    return registry.get(session.config.task.name)


def judge(session: Session) -> AnyJudge:
    """Return the judge of the run's task; runs of one process with the same task share it and its workers."""
    if session.rewards:
        return _judge_by_objects(session)
    return _judge(json.dumps(session.config.task.to_dict(), sort_keys=True))


@functools.cache
def _judge(section: str) -> AnyJudge:
    config = ConfigDict(json.loads(section))
    task = registry.get(config.name)
    return task.judge(config) if hasattr(task, "judge") else Judge(task)


@functools.lru_cache(maxsize=1)
def _judge_by_objects(session: Session) -> AnyJudge:
    return task(session).judge(session.config.task, session.rewards)


def train_problems(session: Session, number: int) -> list[Problem]:
    """Return the problems of a round: new ones in each, or all of a finite data set, as in the paper."""
    if task(session).FINITE:
        return all_train_problems(session)
    count = session.config.collect.prompts
    return all_train_problems(session)[count * (number - 1) : count * number]


@functools.lru_cache(maxsize=1)  # read or drawn once per run
def all_train_problems(session: Session) -> list[Problem]:
    rounds = 1 if task(session).FINITE else session.config.rounds
    return _problems(session, "train", session.config.collect.prompts * rounds)


@functools.lru_cache(maxsize=1)
def test_problems(session: Session) -> list[Problem]:
    return _problems(session, "test", session.config.evaluate.problems)


@functools.lru_cache(maxsize=1)
def longest_prompt(session: Session) -> int:
    """Return the tokens of the longest prompt of a run: with caches of one size, all its phases share programs."""
    tokenizer = models.tokenizer(session)
    problems = [*all_train_problems(session), *test_problems(session)]
    return max(len(tokenizer.encode_prompt(problem.prompt)) for problem in problems)


def _problems(session: Session, split: str, count: int) -> list[Problem]:
    try:
        return task(session).problems(session.config.task, split, count, session.seed(split))
    except ValueError as error:
        raise UserError(f"{session.config.task.name}: {error}") from None
