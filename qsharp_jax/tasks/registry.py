"""The tasks by name. To add one, put its module into this package and its name into `_NAMES`."""

import difflib
import importlib
from types import ModuleType

_NAMES = ("arithmetic", "star_graph", "gsm8k", "math", "aime", "quality")
TASKS: dict[str, ModuleType] = {name: importlib.import_module(f"qsharp_jax.tasks.{name}") for name in _NAMES}


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
