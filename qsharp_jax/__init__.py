"""Q# in JAX: a small value model, learned from rollouts, that steers a frozen language model while it decodes.

The names below are imported when they are first used, so that `import qsharp_jax` loads neither JAX nor models.
`__init__.pyi` names them for IDEs and type checkers.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {  # where each public name is defined; None: a module of its own
    "values": None,
    "guidance": None,
    "Sampling": "sampling",
    "ContinuousBatch": "decoding",
    "load": "run.folders",
    "load_guide": "notebook.guides",
    "train_guide": "notebook.training",
    "generate": "notebook.generating",
    "stream": "notebook.generating",
    "evaluate": "notebook.evaluating",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if (module := _MODULES[name]) is None:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
