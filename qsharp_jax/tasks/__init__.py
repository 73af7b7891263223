"""The tasks by name. A task is one file here and one line in `TASKS`; each such module has

  check(config) -> None                    ValueError, in one sentence, for a setting out of range
  make_tokenizer(config) -> tokenizer      built offline; lossless on the task's texts; adds no special tokens
  problems(config, split, count, seed)     -> list[Problem], distinct; split is "train" or "test"
  pretraining_texts(config, count, seed)   -> list[(prompt, response)] of train problems, for the reference model
  parse(response) -> str | None            the final answer in one canonical form, None if there is none
  reward(problem, response) -> float       the verified reward, 0.0 or 1.0

where `config` is anything with the attributes that the head of the task's file lists.
"""

import difflib
from types import ModuleType

from qsharp_jax.tasks import arithmetic, star_graph
from qsharp_jax.tasks.base import Problem

__all__ = ["Problem", "TASKS", "get"]

TASKS = {
    "arithmetic": arithmetic,
    "star_graph": star_graph,
}


def get(name: str) -> ModuleType:
    """The task's module; an unknown name is an error that says which names there are."""
    if name in TASKS:
        return TASKS[name]
    nearest = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}{hint}")
