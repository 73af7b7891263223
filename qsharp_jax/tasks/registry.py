"""The tasks by name: adding one takes its import and its entry in `TASKS`."""

import difflib
from types import ModuleType

from qsharp_jax.tasks import aime, arithmetic, gsm8k, math, quality, star_graph

TASKS: dict[str, ModuleType] = {
    "arithmetic": arithmetic,
    "star_graph": star_graph,
    "gsm8k": gsm8k,
    "math": math,
    "aime": aime,
    "quality": quality,
}


def get(name: str) -> ModuleType:
    """Return the task's module.

    Raises:
      ValueError: for an unknown name, naming the tasks and the nearest one.
    """
    if name in TASKS:
        return TASKS[name]
    nearest = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}{hint}")
