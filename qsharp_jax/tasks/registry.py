"""The tasks by name. To add one, put its module into this package and its name into `_NAMES`.

"own" is the user's own: prompts and reward functions from outside the package.
"""

import difflib
import importlib
import os
from types import ModuleType
from typing import Any

from qsharp_jax.tasks import own

_NAMES = ("arithmetic", "star_graph", "gsm8k", "math", "aime", "quality")
TASKS: dict[str, ModuleType] = {name: importlib.import_module(f"qsharp_jax.tasks.{name}") for name in _NAMES}


def get(name: str) -> ModuleType:
    """Return the task's module; raises a ValueError, with the known tasks, for an unknown name."""
    if name == "own":
        return own
    if name in TASKS:
        return TASKS[name]
    nearest = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}{hint}")


def make_absolute(section: Any) -> None:
    """Make the paths in a config's section `task` absolute, in place: the folder `data`, and the files of "own"."""
    if section.get("data", "") not in ("", "hub"):
        section.data = os.path.abspath(os.path.expanduser(section.data))
    if section.name == "own":
        own.make_absolute(section)
