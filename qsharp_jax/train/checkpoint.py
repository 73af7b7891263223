"""Checkpoints of training state through Orbax: asynchronous, atomic, resumable on any mesh.

A folder holds the last steps of one training as `STEP/`, and in `best/STEP/` the best parameters that they refer to.
With several processes, every process must call every method.
"""

import contextlib
import dataclasses
import errno
import gc
import json
import logging
import os
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from qsharp_jax.system import files, multihost
from qsharp_jax.system.errors import Stopped, UserError, os_error_number
from qsharp_jax.train.damage import DamagedError, is_damage, root_cause

KEEP = 2  # the last, and the one before in case the last is damaged later
PAUSES = (0, 1, 4, 15)  # seconds between failed reads; the first error may be transient


@dataclasses.dataclass(frozen=True)
class Best:
    """The lowest held-out loss so far, and the step whose parameters have it."""

    step: int
    loss: float


@dataclasses.dataclass(frozen=True)
class _ReferredTo:
    """Orbax's policy for `best/`: keep the newest, and those that a checkpoint refers to."""

    steps: Callable[[], set[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = self.steps() | {checkpoints[-1].step}
        return [checkpoint.step in steps for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints in one folder."""

    def __init__(self, folder: Path):
        self._folder = files.absolute(folder)
        with _silence():
            self._manager = ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=KEEP))
        self._best_manager: ocp.CheckpointManager | None = None

    @property
    def _best(self) -> ocp.CheckpointManager:
        """Created on first use: most trainings save no best parameters."""
        if self._best_manager is None:
            policy = _ReferredTo(lambda: {best.step for step in self._manager.all_steps() if (best := self.best(step))})
            options = ocp.CheckpointManagerOptions(preservation_policy=policy)
            self._best_manager = ocp.CheckpointManager(self._folder / "best", options=options)
        return self._best_manager

    # --- Writing ----------------------------------------------------------------------------------------------------

    def save(self, state: Any, *, final: bool = False, best: Best | None = None) -> None:
        """Save a state with `params` and `step`, once the previous save is on disk.

        Returns when the state is copied; `wait` raises errors of the write that follows.

        Args:
          final: whether the training is finished.
          best: refers to parameters passed to `save_best`.

        Raises:
          OSError: naming the folder, if it cannot be written; earlier checkpoints stay.
        """
        self.wait()
        number = int(state.step)
        if number in self._manager.all_steps():
            if not final:
                return  # a step has only one state within a training
            number += 1  # overwriting it would leave a moment without a whole checkpoint
        training = {"opt_state": state.opt_state, "step": state.step}
        progress = {"final": final, "best": best and dataclasses.asdict(best)}
        self._save(self._manager, number, progress, params=state.params, training=training)

    def save_best(self, params: Any, best: Best) -> None:
        """Save the best parameters so far, once the previous save is on disk; errors as in `save`."""
        self.wait()
        self._save(self._best, best.step, {"loss": best.loss}, params=params)

    def save_result(self, state: Any) -> None:
        """Save the final state of a training whose own checkpoints are elsewhere, and wait; errors as in `save`.

        One that is saved already stays. If it is damaged, it is reported and renamed, as by `restore`.
        """
        if (step := self._last()) is not None:
            try:
                if self._read(self._manager, step, params=state.params)["progress"]["final"]:
                    return
            except DamagedError as error:
                self._set_aside({step: str(error)}, "it is written again")
        self.save(state, final=True)
        self.wait()

    def wait(self) -> None:
        """Wait until everything saved is on disk; errors as in `save`."""
        with self._named_errors():
            for manager in (self._manager, self._best_manager):
                if manager is not None:
                    manager.wait_until_finished()

    def _save(self, manager: ocp.CheckpointManager, step: int, progress: dict, **trees: Any) -> None:
        # Checked first, because on a full disk Orbax's writer threads keep logging errors. A bucket is never full.
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        enough = files.is_remote(self._folder) or shutil.disk_usage(self._folder).free >= size
        if not multihost.everywhere(enough):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
        progress |= {"sums": {name: int(_sum_of_bits(tree)) for name, tree in trees.items()}}
        progress |= {"crc32": _crc32(progress)}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        with self._named_errors():
            manager.save(step, args=ocp.args.Composite(progress=ocp.args.JsonSave(progress), **items), force=True)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Raise errors of the operating system, whatever their type, as OSErrors that name the folder."""
        try:
            with _silence():
                yield
        except Exception as error:  # TensorStore raises a ValueError for a full disk
            if (number := os_error_number(error)) is None:
                raise
            raise OSError(number, os.strerror(number), str(self._folder)) from error

    # --- Reading ----------------------------------------------------------------------------------------------------

    def finished(self) -> bool:
        """Return true if the last checkpoint is of a finished training; raises a DamagedError if it is unreadable."""
        return (step := self._last()) is not None and self._read_last(step)["progress"]["final"]

    def best(self, step: int | None = None) -> Best | None:
        """Return the best parameters' record in the checkpoint of a step, by default the last; errors as above."""
        step = self._last() if step is None else step
        best = None if step is None else self._read(self._manager, step)["progress"]["best"]
        return best and Best(**best)

    def restore(self, state: Any) -> Any:
        """Return the last readable state, shaped and placed like `state`; `state` itself without checkpoints.

        Later checkpoints that are damaged or of another model are reported on standard error and renamed, and best
        parameters of later steps are deleted: training will write those steps again.

        Raises:
          UserError: if there are checkpoints but none is readable.
          OSError: if damaged ones cannot be renamed.
        """
        unreadable: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                if (best := self.best(step)) and best.step not in self._best.all_steps():
                    raise DamagedError(f"the checkpoint {self._folder / str(step)} lacks its best parameters")
                training = {"opt_state": state.opt_state, "step": state.step}
                saved = self._read(self._manager, step, params=state.params, training=training)
            except DamagedError as error:
                unreadable[step] = str(error)
                continue
            self._set_aside(unreadable, f"training resumes from step {step}")
            self._forget_best_from(step)
            return state.replace(params=saved["params"], **saved["training"])
        if unreadable:
            newest, *others = unreadable.values()
            before = "none of those before it can be read" if others else "there is none before it"
            raise UserError(f"{newest}, and {before}; delete {self._folder} to train anew")
        self._forget_best_from(int(state.step))
        return state

    def restore_params(self, params: Any) -> Any:
        """Return the last saved parameters, shaped and placed like `params`: arrays, or `jax.ShapeDtypeStruct`s.

        Those without a sharding are placed on this process's first device.

        Raises:
          DamagedError: if they are damaged or of another model.
          UserError: if there are none.
        """
        if (step := self._last()) is None:
            raise UserError(f"there is no checkpoint in {self._folder}")
        return self._read_last(step, params=params)["params"]

    def restore_best(self, best: Best, params: Any) -> Any:
        """Return the parameters passed to `save_best`, like `params`; raises a DamagedError if they are damaged."""
        self.wait()
        try:
            return self._read(self._best, best.step, params=params)["params"]
        except DamagedError as error:
            raise DamagedError(f"{error}; delete {self._folder} to train anew") from None

    def _last(self) -> int | None:
        self.wait()
        return self._manager.latest_step()

    def _read_last(self, step: int, **trees: Any) -> dict[str, Any]:
        """`_read`, with the remedy for a damaged last checkpoint."""
        try:
            return self._read(self._manager, step, **trees)
        except DamagedError as error:
            raise DamagedError(f"{error}; run its training again, which resumes from the one before") from None

    def _read(self, manager: ocp.CheckpointManager, step: int, **trees: Any) -> dict[str, Any]:
        """Read one checkpoint's items, shaped and placed like the trees, and "progress".

        A checkpoint counts as damaged if two reads find damage. Other errors are retried after each of `PAUSES`, and
        the last one is raised.
        """
        path = files.make_path(manager.directory) / str(step)
        for attempt, pause in enumerate((*PAUSES, None)):
            error = None
            try:
                with _silence():
                    items = _read_items(manager, path, trees)
            except Stopped:
                raise
            except Exception as caught:  # of many types; `is_damage` recognizes those that mean damage
                error = caught
            if multihost.everywhere(error is None):
                return items
            damaged = multihost.everywhere(error is None or is_damage(error))
            if pause is None or (damaged and attempt > 0):
                break
            if error is not None and not damaged:
                print(f"{path} could not be read ({_first_line(error)}); trying again in {pause} s", file=sys.stderr)
            error = None
            _forget_reads()
            time.sleep(pause)
        if not damaged:
            raise error or RuntimeError(f"{path} could not be read by another process")
        if error is None:
            problem = "cannot be read by another process"
        else:
            problem = str(error) if isinstance(error, DamagedError) else f"is damaged ({_first_line(error)})"
        error = None
        _forget_reads()
        raise DamagedError(f"the checkpoint {path} {problem}")

    def _set_aside(self, unreadable: dict[int, str], then: str) -> None:
        """Rename unreadable checkpoints, and print a line about each, which says what happens then."""
        if not unreadable:
            return
        for number, problem in unreadable.items() if multihost.is_first() else ():
            path = self._folder / str(number)
            aside = path.with_name(f"{number}.damaged")
            tries = 1
            while aside.exists():
                tries += 1
                aside = path.with_name(f"{number}.damaged-{tries}")
            files.rename_folder(path, aside)
            print(f"{problem}; it is kept as {aside}, and {then}", file=sys.stderr)
        multihost.wait_for_all("damaged checkpoints are renamed")
        self._manager.reload()

    def _forget_best_from(self, step: int) -> None:
        """Delete best parameters of a step's own evaluation, which comes after its checkpoint, and of later ones.

        Training will save them again.
        """
        if (self._folder / "best").exists():
            for number in self._best.all_steps():
                if number >= step:
                    self._best.delete(number)


# --- Helpers --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep Orbax quiet: it logs errors before it raises them, with a traceback per thread, and abandoned reads complain
    when they end or are collected.
    """
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [log.level for log in logs], sys.unraisablehook
    for log in logs:
        log.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _forget_reads() -> None:
    """Free what was still being read when a read failed; coroutines that never started emit warnings."""
    with _silence(), warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        gc.collect()


def _read_items(manager: ocp.CheckpointManager, path: Path, trees: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint once; raises a DamagedError if shapes, sums or the progress differ from what was written."""
    step = int(path.name)
    progress = manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress
    if progress.pop("crc32", None) != _crc32(progress):
        raise DamagedError("is damaged (its progress is not what was written)")
    differences = [line for name, tree in trees.items() for line in _differences(path / name, tree)]
    if differences:
        raise DamagedError(f"is of another model ({differences[0]})")
    items = {"progress": progress}
    if trees:
        restores = {name: ocp.args.StandardRestore(_abstract(tree)) for name, tree in trees.items()}
        items |= dict(manager.restore(step, args=ocp.args.Composite(**restores)))
        if any(int(_sum_of_bits(items[name])) != progress["sums"][name] for name in trees):
            raise DamagedError("is damaged (its numbers are not those that were written)")
    return items


def _first_line(error: Exception) -> str:
    error = root_cause(error)
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _abstract(tree: Any) -> Any:
    """Return the shape, dtype and sharding of every leaf."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here),
        tree,
    )


def _differences(path: Path, tree: Any) -> list[str]:
    """Describe the leaves in which a saved tree differs from another."""

    def leaves(tree: Any) -> dict[str, str]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
            for path, leaf in jax.tree.leaves_with_path(tree)
        }

    saved, wanted = leaves(ocp.StandardCheckpointHandler().metadata(path).tree), leaves(tree)
    return [
        f"{name} is {saved.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]


def _crc32(progress: dict) -> int:
    return zlib.crc32(json.dumps(progress, sort_keys=True).encode())


@jax.jit
def _sum_of_bits(tree: Any) -> jax.Array:
    """Sum the leaves' bits, as unsigned integers, modulo 2^32: the same for every sharding.

    TensorStore's own checksums do not cover everything that it stores.
    """

    def of_leaf(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        return bits.sum(dtype=jnp.uint32)

    return sum(map(of_leaf, jax.tree.leaves(tree)), jnp.uint32(0))
