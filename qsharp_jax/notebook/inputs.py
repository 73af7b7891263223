"""Prompts and rewards as Python objects, in the forms that a task of the user's own has in files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qsharp_jax.system.chat import Prompt, check_messages
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import own
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.finite import Row, json_row
from qsharp_jax.tasks.rewards import RewardJudge

# Texts, chats (lists of messages), or dicts with a "prompt" and other columns, which the rewards are given; or a file.
Prompts = str | Path | Iterable[Prompt | Mapping[str, Any]]
# `reward(prompts, completions, **columns) -> list[float]`, as in TRL; see `qsharp_jax/tasks/rewards.py`.
Reward = Callable[..., Sequence[float | None]]


def to_rows(prompts: Prompts) -> list[dict[str, Any]]:
    """Return the prompts as dicts that JSON can hold; a UserError for a row or a file that cannot be read."""
    if isinstance(prompts, str | Path):
        return [row.fields for row in own.read_rows(str(prompts))]
    rows = (dict(item) if isinstance(item, Mapping) else {"prompt": item} for item in _items(prompts))
    return [json_row(f"prompt {number}", row).fields for number, row in enumerate(rows, start=1)]


def to_prompts(prompts: Iterable[Prompt | Mapping[str, Any]]) -> list[Prompt]:
    """Return the prompts without their other columns; a UserError for what is none."""
    if isinstance(prompts, str | Path):
        raise UserError(f"prompts is one text, {str(prompts)[:60]!r}; give a list of prompts")
    return [to_prompt(item, f"prompt {number}") for number, item in enumerate(_items(prompts), start=1)]


def to_prompt(item: Prompt | Mapping[str, Any], place: str) -> Prompt:
    """Return the prompt of a text, a chat or a dict; a UserError, beginning with the place, for anything else."""
    prompt = item.get("prompt") if isinstance(item, Mapping) else item
    if isinstance(prompt, list):
        check_messages(prompt, place)
    elif not isinstance(prompt, str):
        raise UserError(f"{place} is {str(item)[:60]}; give a text, a list of messages, or a dict with a prompt")
    return prompt


def _items(prompts: Iterable[Any]) -> list[Any]:
    """Return the prompts as a list; a UserError for one chat in their place, and for what is read by its keys."""
    if isinstance(prompts, Mapping) or type(prompts).__name__ == "DataFrame":
        raise UserError(
            f"prompts is a {type(prompts).__name__}, whose keys are no prompts; give a list of prompts, or of dicts"
            " with a prompt, such as one split of a data set or a data frame's to_dict('records')"
        )
    items = list(prompts)
    for number, item in enumerate(items, start=1):
        if isinstance(item, Mapping) and "role" in item and "prompt" not in item:
            raise UserError(
                f"prompt {number} is one message of a chat; give each chat as a list of its messages, one chat as"
                " [[{'role': 'user', 'content': ...}]]"
            )
    return items


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
    """Return the judge by the weighted sum of the rewards, by default each times 1; `evaluate` counts failures."""
    functions = to_functions(reward)
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions):
        raise UserError(f"there are {len(functions)} rewards and {len(weights)} weights; give one weight for each")
    return RewardJudge(functions, weights, seconds=float("inf"), most_failures=1.0)
