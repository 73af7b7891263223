"""Checkpoints of training state through Orbax: atomic, resumable, readable parameters-only.

A folder holds the last steps of one training. It knows nothing about what is trained.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qsharp_jax.errors import UserError
from qsharp_jax.workdir import os_error_number

KEEP = 2  # the last, and the one before in case the last is damaged later


@contextlib.contextmanager
def _silent_log() -> Iterator[None]:
    """Orbax logs what goes wrong, with a traceback for each of its threads, before it raises it."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@dataclasses.dataclass(frozen=True)
class Best:
    """The parameters with the least held-out loss so far, on the host, and the step that they are of."""

    params: Any
    step: int
    loss: float


class Checkpoints:
    """The checkpoints in one folder."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=False)
        self._folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, state: Any, *, final: bool = False, best: Best | None = None) -> None:
        """Saves a state with `params` and `step`, with the best parameters so far if there are such.

        `final` marks the training as finished.

        Raises:
          OSError: naming the folder, if it cannot be written; the checkpoints before stay.
        """
        training = {"opt_state": state.opt_state, "step": state.step}
        # Orbax's writers, once they meet a full disk, go on complaining from threads of their own.
        if shutil.disk_usage(self._folder).free < sum(
            leaf.nbytes for leaf in jax.tree.leaves((state.params, training, best and best.params))
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
        items, progress = {}, {"final": final}
        if best:
            items["best"] = ocp.args.StandardSave(best.params)
            progress["best"] = {"step": best.step, "loss": best.loss}
        try:
            with _silent_log():
                self._manager.save(
                    int(state.step),
                    args=ocp.args.Composite(
                        params=ocp.args.StandardSave(state.params),
                        training=ocp.args.StandardSave(training),
                        progress=ocp.args.JsonSave(progress),
                        **items,
                    ),
                    force=True,
                )
        except Exception as error:  # TensorStore raises a ValueError for a full disk
            if (number := os_error_number(error)) is None:
                raise
            raise OSError(number, os.strerror(number), str(self._folder)) from error

    def finished(self) -> bool:
        """Whether a final state was saved."""
        if self._manager.latest_step() is None:
            return False
        return self._restore(progress=ocp.args.JsonRestore()).progress["final"]

    def restore(self, state: Any) -> Any:
        """The last saved state, shaped and placed like `state`; `state` itself if none was saved.

        Raises:
          UserError: if the checkpoint is damaged or of another shape.
        """
        if self._manager.latest_step() is None:
            return state
        training = {"opt_state": state.opt_state, "step": state.step}
        saved = self._restore(
            params=ocp.args.StandardRestore(_abstract(state.params)),
            training=ocp.args.StandardRestore(_abstract(training)),
        )
        return state.replace(params=saved.params, **saved.training)

    def restore_best(self, params: Any) -> Best | None:
        """The best parameters that the last checkpoint has beside its own, shaped like `params`; None without any.

        Raises:
          UserError: if they are damaged or of another shape.
        """
        if self._manager.latest_step() is None:
            return None
        found = self._restore(progress=ocp.args.JsonRestore()).progress.get("best")
        if found is None:
            return None
        best = self._restore(best=ocp.args.StandardRestore(_abstract(params))).best
        return Best(jax.tree.map(np.array, best), found["step"], found["loss"])

    def restore_params(self, params: Any) -> Any:
        """The last saved parameters, shaped like `params` (arrays or `jax.ShapeDtypeStruct`s).

        Raises:
          UserError: if there are none, or if they are damaged or of another shape.
        """
        if self._manager.latest_step() is None:
            raise UserError(f"there is no checkpoint in {self._folder}")
        return self._restore(params=ocp.args.StandardRestore(_abstract(params))).params

    def _restore(self, **items: Any) -> Any:
        step = self._manager.latest_step()
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        # Orbax and TensorStore report damage by exceptions of many types, a bare Exception among them.
        except Exception as error:
            what = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"the checkpoint {self._folder / str(step)} is damaged or of another model ({what}); delete that folder"
                " and run again to go on from the one before"
            ) from error


def _abstract(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
