"""Prompts and rewards as Python objects, in the forms that a task of the user's own has in files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qsharp_jax.system.chat import Prompt
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import own
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.finite import Row, json_row
from qsharp_jax.tasks.rewards import RewardJudge

# Texts, chats (lists of messages), or dicts with a "prompt" and other columns, which the rewards are given; or a file.
Prompts = str | Path | Iterable[Prompt | Mapping[str, Any]]
# `reward(prompts, completions, **columns) -> list[float]`, as in TRL; see `qsharp_jax/tasks/rewards.py`.
Reward = Callable[..., Sequence[float | None]]

MOST_FAILURES = 0.1  # share of an evaluation's responses without a reward, above which it stops


def to_rows(prompts: Prompts) -> list[dict[str, Any]]:
    """Return the prompts as dicts that JSON can hold; a UserError for a row or a file that cannot be read."""
    if isinstance(prompts, str | Path):
        return [row.fields for row in own.read_rows(str(Path(prompts).expanduser()))]
    rows = (dict(item) if isinstance(item, Mapping) else {"prompt": item} for item in prompts)
    return [json_row(f"prompt {number}", row).fields for number, row in enumerate(rows, start=1)]


def to_problems(prompts: Prompts) -> list[Problem]:
    """Return the prompts as problems; errors as in `to_rows`, and a UserError for a row without a prompt."""
    return own.to_problems(Row(f"prompt {number}", row) for number, row in enumerate(to_rows(prompts), start=1))


def to_functions(reward: Reward | Sequence[Reward]) -> list[Reward]:
    """Return the reward functions as a list; raises a UserError for what cannot be called."""
    functions = [reward] if callable(reward) else list(reward)
    if not functions or not all(map(callable, functions)):
        raise UserError("the reward must be a function reward(prompts, completions, **columns), or a list of them")
    return functions


def judge(reward: Reward | Sequence[Reward], weights: Sequence[float] | None) -> RewardJudge:
    """Return the judge by the weighted sum of the rewards, by default each times 1."""
    functions = to_functions(reward)
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions):
        raise UserError(f"there are {len(functions)} rewards and {len(weights)} weights; give one weight for each")
    return RewardJudge(functions, weights, seconds=float("inf"), most_failures=MOST_FAILURES)
