"""The config of a run with the user's own model, prompts and reward, from a few arguments of `qsharp run`.

What depends on the model's size and on the device is chosen by `fitting.py`, and the run prints it. A workdir keeps
what was chosen, so that a repeated command goes on with the same settings on another machine.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from qsharp_jax.run import config as configs
from qsharp_jax.run.workdir import stored_config
from qsharp_jax.system import files
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import own as tasks

RECIPE = "own"


@dataclasses.dataclass(frozen=True)
class OwnRun:
    """The arguments that name a run's model, prompts and reward. See `qsharp_jax/tasks/own.py`."""

    ref: str | None = None
    guide: str | None = None
    prompts: str | None = None
    task: str | None = None
    rewards: Sequence[str] = ()
    prompt_format: str | None = None

    def overrides(self) -> list[str]:
        """Return the settings that the arguments stand for, as `--config.KEY=VALUE`; paths are absolute."""
        rewards = [tasks.absolute_function(words) for words in self.rewards]
        given = {
            "ref": self.ref,
            "guide": self.guide,
            "task.prompts": self.prompts and tasks.absolute(self.prompts),
            "task.file": self.task and tasks.absolute(self.task),
            "task.rewards": json.dumps(rewards) if rewards or self.task else None,
            "task.weights": ",".join("1" for _ in rewards) if rewards or self.task else None,
            "prompt_format": self.prompt_format,
        }
        return [f"--config.{key}={value}" for key, value in given.items() if value is not None]


def load(
    own: OwnRun, workdir: str | os.PathLike, changes: list[str], *, change_by: str = "--config.KEY=VALUE"
) -> ConfigDict:
    """Return the config: the stored one of a workdir that holds a run, else the recipe `own` with `fitting` settings.

    Args:
      changes: `--config.KEY=VALUE`, which come last.
      change_by: how the user changes a setting, in what is printed.

    Raises:
      UserError: if the model, the prompts or the reward are missing, and as `config.load`.
    """
    if own.prompts and own.task:
        raise UserError("--task gives the prompts too; leave --prompts out, or --task")
    if (stored := stored_config(files.make_path(workdir))) is not None:
        with stored.unlocked():
            configs.override_stored(stored, [*own.overrides(), *changes])
        return stored
    for value, words in (
        (own.ref, "the reference model, by --ref"),
        (own.prompts or own.task, "the prompts, by --prompts FILE, or by --task FILE.py"),
        (own.rewards or own.task, "the reward, by --reward FILE.py:NAME"),
    ):
        if not value:
            raise UserError(f"give {words}; see qsharp run --help")
    config = configs.load(RECIPE, [*own.overrides(), *changes])
    configs.check(config)
    for model in filter(None, (own.ref, own.guide)):
        may_be_id = model.partition("@")[0].count("/") == 1  # on the hub, as OWNER/NAME@REVISION
        if not may_be_id and not Path(model).expanduser().exists():
            raise UserError(
                f"there is no model {model}; give a folder, a GGUF file, or an id on the Hugging Face hub (OWNER/NAME)"
            )
    tasks.check_files(config.task)

    from qsharp_jax.run import fitting, models  # after the checks above, since importing JAX takes seconds

    models.check_folders(config)
    chosen = fitting.fitting(config)
    configs.override(config, [f"--config.{key}={value}" for key, value in chosen.items()])
    configs.override_stored(config, [*own.overrides(), *changes])
    print(f"Settings for this model and device (change them by {change_by}):")
    for key in chosen:
        print(f"  {key} = {functools.reduce(ConfigDict.get, key.split('.'), config)}")
    return config
