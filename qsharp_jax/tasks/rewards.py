"""Rewards by Python functions of TRL's signature: `reward(prompts, completions, **columns) -> list[float]`.

A function is called for one response at a time, so each list has one entry. `prompts` are texts, or lists of messages;
`completions` are texts, or lists of one message of the assistant where prompts are messages. Further columns of the
prompts come by name, as do `completion_ids`, lists of the responses' token ids, and `finished`, whether the response
ended by itself. A function may be asynchronous, and may return None for a response that it does not apply to.
https://huggingface.co/docs/trl, "Using a custom reward function".

Functions of files run in worker processes with a time limit, or in this process, as Python objects do. A response whose
function raises, takes too long, or returns anything but one finite number has no reward: None.
"""

import functools
import hashlib
import inspect
import json
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from qsharp_jax.system.chat import as_text
from qsharp_jax.system.errors import UserError, warn
from qsharp_jax.tasks import reward_worker
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.judging import Judge, Judgement
from qsharp_jax.tasks.workers import Workers

FEWEST = 20  # responses before the share of those without a reward can stop a run
WARNINGS = 3  # that are printed

Function = tuple[str, str]  # a file or a module, and a name in it
# What a reward function is given beside the columns of the prompts.
ARGUMENTS = ("prompts", "completions", "completion_ids", "finished")
OBJECT = "<python>"  # in place of the file of a function that was given as a Python object


def parse_function(words: str) -> Function:
    """Split FILE:NAME, or MODULE:NAME; raises a UserError for another form."""
    source, colon, name = words.rpartition(":")
    if source == OBJECT:
        return source, name
    if not colon or not name.isidentifier() or not source:
        raise UserError(f"the reward is {words!r}; write it as FILE.py:NAME, such as rewards.py:short")
    return source, name


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a Python object that is called as a reward."""
    return getattr(function, "__name__", type(function).__name__)


def source_hash(function: Callable[..., Any]) -> str | None:
    """Return the SHA-256 of what a function is; None if Python does not have its source, as for what is compiled.

    This is its source, of a lambda that of the whole lines that it stands in; of a `functools.partial` also its
    arguments; of an instance or its method also the instance's attributes. What a function finds elsewhere, such as
    globals or the variables of a function around it, does not count.
    """
    try:
        text = _describe_function(function, frozenset())
    except (OSError, TypeError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _describe_function(function: Callable[..., Any], within: frozenset[int]) -> str:
    """Return the text that is hashed; raises what `inspect.getsource` does. `within` as in `_describe`."""
    if isinstance(function, functools.partial):
        parts = (_describe(part, within) for part in (function.args, function.keywords))
        return "\n".join([_describe_function(function.func, within), *parts])
    if inspect.isroutine(function):
        source, owner = inspect.getsource(function), getattr(function, "__self__", None)
    else:
        source, owner = _class_source(function), function
    if owner is None or isinstance(owner, type | ModuleType) or id(owner) in within:
        return source
    attributes = getattr(owner, "__dict__", {})
    return "\n".join([source, _describe(attributes, within | {id(owner)})]) if attributes else source


def _class_source(function: Callable[..., Any]) -> str:
    """Return the source of an instance's class, or of its `__call__` in a notebook, where Python has no more."""
    try:
        return inspect.getsource(type(function))
    except (OSError, TypeError):
        return inspect.getsource(type(function).__call__)


def _describe(value: Any, within: frozenset[int]) -> str:
    """Return the same text for the same value in every process: `repr` has addresses, and sets in any order.

    Args:
      within: ids of the objects that are being described, in which this one is; they are not described again.
    """
    if id(value) in within:
        return "..."
    inside = within | {id(value)}
    if isinstance(value, Mapping):
        entries = sorted(f"{_describe(name, inside)}: {_describe(entry, inside)}" for name, entry in value.items())
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(_describe(entry, inside) for entry in value))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_describe(entry, inside) for entry in value)}]"
    if isinstance(value, functools.partial) or inspect.isroutine(value):
        try:
            return _describe_function(value, within)
        except (OSError, TypeError):
            return name_of(value)
    if hasattr(value, "tobytes") and hasattr(value, "dtype") and not value.dtype.hasobject:
        # The `repr` of a large array leaves most of it out.
        return f"{value.dtype}{value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


class RewardJudge:
    """Judge of responses by the weighted sum of reward functions; the members are those of `judging.Judge`."""

    has_answers = False

    def __init__(
        self,
        functions: Sequence[Function | Callable[..., Any]],
        weights: Sequence[float],
        *,
        workers: int | None = None,
        seconds: float,
        most_failures: float,
    ):
        """Args:
        functions: by their files and names, or all as Python objects, which are called in this process.
        workers: processes, by default one per core up to 16; 0: call the functions in this process.
        seconds: wall time of one response in a worker.
        most_failures: share of responses without a reward above which `UserError` is raised.
        """
        self._weights, self._seconds, self._most_failures = weights, seconds, most_failures
        self._lock = threading.Lock()
        self._judged = self._failed = 0
        self._workers: Workers | None = None
        self._functions = [function for function in functions if not isinstance(function, tuple)]
        named = [function for function in functions if isinstance(function, tuple)]
        self._names = ", ".join([*map(name_of, self._functions), *(name for _, name in named)])
        for source, _ in named:
            if source.endswith(".py") and not Path(source).is_file():
                raise UserError(f"there is no file {source}; give the reward function's Python file, as FILE.py:NAME")
            if os.sep in source and not source.endswith(".py"):
                raise UserError(f"{source} is no Python file, whose name ends in .py; give the reward as FILE.py:NAME")
        if named and workers == 0:
            try:
                self._functions = [reward_worker.load(*function) for function in named]
            except Exception as error:
                raise UserError(_refusal(self._names, reward_worker.explain(error))) from error
        elif named:
            script = Path(reward_worker.__file__)
            self._workers = Workers(
                script, [json.dumps(named)], seconds=seconds, count=workers,
                refusal=_refusal(self._names, "{reason}"),
            )  # fmt: skip

    def check(self) -> None:
        """Load the functions in one worker; raises a UserError if they cannot be loaded."""
        if self._workers:
            self._workers.start()

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        """Judge each response to the problem at the same position."""
        pending = [self.submit(problem, response) for problem, response in zip(problems, responses, strict=True)]
        return [judgement() for judgement in pending]

    def submit(
        self, problem: Problem, response: str, *, tokens: Sequence[int] = (), finished: bool = True
    ) -> Callable[[], Judgement]:
        """Start to judge a response; calling the result waits for the judgement.

        The result raises a UserError once too many responses have no reward.
        """
        chat = not isinstance(problem.prompt, str)
        completion = [{"role": "assistant", "content": response}] if chat else response
        columns = {name: [entry] for name, entry in problem.columns.items()}
        columns |= {"prompts": [problem.prompt], "completions": [completion]}
        columns |= {"completion_ids": [[*tokens]], "finished": [finished]}
        if self._workers is None:
            reward = self._here(columns)
            return lambda: self._judgement(problem, reward)
        future = self._workers.ask(columns, self._read)
        return lambda: self._judgement(problem, future.result())

    def classes(self, problems: Sequence[Problem], answers: Sequence[Sequence[str | None]]) -> list[list[str | None]]:
        return [list(group) for group in answers]

    def close(self) -> None:
        """End the workers; they also end with this process."""
        if self._workers:
            self._workers.close()

    def _here(self, columns: dict[str, list]) -> float | str:
        try:
            return self._total([reward_worker.call(function, columns) for function in self._functions])
        except Exception as error:
            return reward_worker.explain(error)

    def _read(self, reply: str) -> float | str:
        if not reply:
            return f"it took more than {self._seconds:g} s, or ended its process"
        record = json.loads(reply)
        return record["error"] if "error" in record else self._total(record["rewards"])

    def _total(self, rewards: Sequence[float | None]) -> float | str:
        """Return the weighted sum of the rewards that are not None; or why there is none."""
        pairs = [(weight, x) for weight, x in zip(self._weights, rewards, strict=True) if x is not None]
        if not pairs:
            return "it returned None"
        if not all(math.isfinite(x) for _, x in pairs):
            return f"it returned {', '.join(f'{x:g}' for _, x in pairs)}"
        return sum(weight * x for weight, x in pairs)

    def _judgement(self, problem: Problem, reward: float | str) -> Judgement:
        if not isinstance(reward, str):
            with self._lock:
                self._judged += 1
            return Judgement(reward, None)
        with self._lock:
            self._judged, self._failed = self._judged + 1, self._failed + 1
            judged, failed = self._judged, self._failed
        where = f"the prompt {as_text(problem.prompt)[:60]!r} ({self._names}: {reward})"
        if judged >= FEWEST and failed > self._most_failures * judged:
            raise UserError(
                f"{failed} of {judged} responses have no reward, which is more than task.most_failures ="
                f" {self._most_failures:g}; the last one is to {where}; fix the function and run the command again"
            )
        if failed <= WARNINGS:
            warn(f"no reward for a response to {where}")
        return Judgement(None, None)


AnyJudge = Judge | RewardJudge


def _refusal(names: str, reason: str) -> str:
    return f"cannot load the reward function {names} ({reason}); fix its file"
