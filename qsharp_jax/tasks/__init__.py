"""The tasks by name. A task is one file here and one line in `TASKS`; each such module has

  check(config) -> None                    ValueError, in one sentence, for a setting out of range
  problems(config, split, count, seed)     -> list[Problem], distinct; split is "train" or "test"
  parse(response) -> str | None            the final answer, None if there is none
  SYMBOLIC: bool                           answers are mathematics, the same in more ways than as texts; if not,
  reward(problem, response) -> float       the verified reward, 0.0 or 1.0; else `qsharp_jax.tasks.judging` gives it
  FINITE: bool                             a fixed data set, whose training problems every round uses all of

and one whose reference model can be made on the spot, which is every one that is not finite,

  make_tokenizer(config) -> tokenizer      built offline; lossless on the task's texts; adds no special tokens
  pretraining_texts(config, count, seed)   -> list[(prompt, response)] of train problems, for the reference model

and one that is finite

  every_problem(data) -> list[Problem]     of all files; `data` is as in the config
  gold(answer) -> str                      a data set's answer as a problem has it; ValueError if it cannot be one

where `config` is anything with the attributes that the head of the task's file lists.
"""

import difflib
from types import ModuleType

from qsharp_jax.tasks import aime, arithmetic, gsm8k, math, quality, star_graph
from qsharp_jax.tasks.base import Problem

__all__ = ["Problem", "TASKS", "get"]

TASKS = {
    "arithmetic": arithmetic,
    "star_graph": star_graph,
    "gsm8k": gsm8k,
    "math": math,
    "aime": aime,
    "quality": quality,
}


def get(name: str) -> ModuleType:
    """The task's module; an unknown name is an error that says which names there are."""
    if name in TASKS:
        return TASKS[name]
    nearest = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}{hint}")
