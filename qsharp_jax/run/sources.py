"""The sources of a run's models: the folders, GGUF files and ids on the hub that its config names.

`models.py` says what `config.ref` and `config.guide` may be, and loads them.
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from qsharp_jax.models.hf import hub
from qsharp_jax.tasks import registry

NOT_FOLDERS = {"ref": ("pretrain",), "guide": ("ref", "scratch")}


def folder(config: ConfigDict, name: str) -> Path | None:
    """Return the folder, or GGUF file, of "ref" or "guide"; None if the config names no model."""
    return None if config[name] in NOT_FOLDERS[name] else hub.find(config[name])


def pin(config: ConfigDict, stored: ConfigDict | None) -> None:
    """Append the commit to ids on the Hugging Face hub, in place, so that a repeated run has the same weights.

    Args:
      stored: the settings of the run so far, whose commits are kept.

    Raises:
      UserError: for a model that cannot be downloaded.
    """
    for name, words in NOT_FOLDERS.items():
        if config[name] not in words:
            config[name] = hub.pin(config[name], stored and stored[name])


def make_absolute(config: ConfigDict) -> None:
    """Make the paths of folders and of the task's files absolute, in place, as workdirs store them."""
    for name, words in NOT_FOLDERS.items():
        if config[name] not in words and not hub.is_id(config[name]):
            config[name] = os.path.abspath(os.path.expanduser(config[name]))
    registry.make_absolute(config.task)
