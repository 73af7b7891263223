"""Checks of a config before its run is opened, for the command line and for notebooks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from qsharp_jax import plan
from qsharp_jax.run import checks, sources
from qsharp_jax.run import config as configs
from qsharp_jax.run.workdir import stored_config
from qsharp_jax.system import files


def check(config: ConfigDict, workdir: Path, recipe: str, rewards: Sequence[Callable[..., Any]] = ()) -> None:
    """Check a config, and complete its models' names in place: ids get their commits, paths become absolute.

    Args:
      recipe: the path or name of the config's file, beside which the presets of its mesh are.
      rewards: the reward functions, where the config names Python objects.

    Raises:
      UserError: for everything that can be refused before anything is computed.
    """
    checks.check_settings(config)
    sources.pin(config, stored_config(workdir))
    if "mesh" in config and config.mesh.name != "single":  # this machine's; divides models and rows; has the memory
        plan.check(plan.make(config), config.mesh, configs.presets(recipe), jax.devices())
    checks.check(config)
    sources.make_absolute(config)
    if not files.is_file(workdir / "config.json"):
        checks.check_problems(config, rewards)
