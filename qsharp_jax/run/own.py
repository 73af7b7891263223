"""The config of a run with the user's own model, prompts and reward, from a few arguments of `qsharp run`.

What depends on the model's size and on the device is chosen here, and the run prints it. A workdir keeps what was
chosen, so that a repeated command goes on with the same settings on another machine.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.decoding import cache_size, rows_that_fit
from qsharp_jax.models import decoder, hf, memory
from qsharp_jax.run import config as configs
from qsharp_jax.run import models
from qsharp_jax.run.workdir import stored_config
from qsharp_jax.system import files
from qsharp_jax.system.errors import UserError

RECIPE = "own"
PROMPT = 256  # tokens of a prompt for which the rows are counted
LEARNING_RATES = ((0.3e9, 1e-4), (1e9, 5e-5), (np.inf, 2e-5))  # of AdamW, up to so many weights


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
        rewards = [_absolute(*word.rpartition(":")) for word in self.rewards]
        given = {
            "ref": self.ref,
            "guide": self.guide,
            "task.prompts": self.prompts and _absolute(self.prompts),
            "task.file": self.task and _absolute(self.task),
            "task.rewards": ",".join(rewards) if rewards or self.task else None,
            "task.weights": ",".join("1" for _ in rewards) if rewards or self.task else None,
            "prompt_format": self.prompt_format,
        }
        return [f"--config.{key}={value}" for key, value in given.items() if value is not None]


def _absolute(path: str, *rest: str) -> str:
    """Make a path absolute if there is such a file; else it may be a module, or a name on the hub."""
    full = os.path.abspath(os.path.expanduser(path))
    return "".join([full if os.path.exists(full) and path else path, *rest])


def load(own: OwnRun, workdir: str, changes: list[str]) -> ConfigDict:
    """Return the config: the stored one of a workdir that holds a run, else the recipe `own` with `fitting` settings.

    Args:
      changes: `--config.KEY=VALUE`, which come last.

    Raises:
      UserError: if the model, the prompts or the reward are missing, and as `config.load`.
    """
    if (stored := stored_config(files.make_path(workdir))) is not None:
        with stored.unlocked():
            configs.override(stored, [*own.overrides(), *changes])
        return stored
    for value, words in (
        (own.ref, "the reference model, by --ref"),
        (own.prompts or own.task, "the prompts, by --prompts FILE, or by --task FILE.py"),
        (own.rewards or own.task, "the reward, by --reward FILE.py:NAME"),
    ):
        if not value:
            raise UserError(f"give {words}; see qsharp run --help")
    config = configs.load(RECIPE, [*own.overrides(), *changes])
    models.check_folders(config)
    chosen = fitting(config)
    configs.override(config, [f"--config.{key}={value}" for key, value in chosen.items()])
    configs.override(config, [*own.overrides(), *changes])
    print("Settings for this model and device (change them by --config.KEY=VALUE):")
    for key in chosen:
        print(f"  {key} = {functools.reduce(ConfigDict.get, key.split('.'), config)}")
    return config


def fitting(config: ConfigDict) -> dict[str, object]:
    """Return the settings that fit the reference's size and the default device, by key."""
    ref = models.folder(config, "ref")
    shape = hf.read_config(ref, "float32")
    on_cpu = memory.default_device().platform == "cpu"
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(decoder.abstract(shape)))
    rows = rows_that_fit([shape, shape], cache_size(PROMPT, config.generate.max_new_tokens, 32))
    chat = Tokenizer.load(ref).hf_tokenizer.chat_template
    return {
        "dtype": "float32" if on_cpu else "bfloat16",
        "prompt_format": "chat" if chat else "plain",
        "collect.batch_size": rows,
        "evaluate.batch_size": rows,
        "fit.accumulate": 4 if on_cpu else 1,
        "fit.optimizer.learning_rate": next(rate for most, rate in LEARNING_RATES if count < most),
        "generate.top_k_candidates": 20,
    }
