"""The training loop: resume from the last checkpoint, update, log, save, evaluate, and return to the best parameters.

`fit` runs a whole training over existing batches. An algorithm that creates its batches while it learns writes its own
loop over the `Trainer` that `training` yields.
"""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
import optax

from qsharp_jax.data.batches import Batch
from qsharp_jax.models import sharding
from qsharp_jax.models.decoder import Params
from qsharp_jax.system import machine, multihost, sigterm
from qsharp_jax.system.errors import Stopped, UserError
from qsharp_jax.system.progress import Bar
from qsharp_jax.train.checkpoint import Best, Checkpoints
from qsharp_jax.train.optimizer import Schedule
from qsharp_jax.train.step import LossFn, TrainState, train_step
from qsharp_jax.train.throughput import Clock, Flops
from qsharp_jax.train.trace import Trace


class BatchSource(Protocol):
    """`data.batches.Batches`, or anything whose batch is a function of the step."""

    def __getitem__(self, step: int) -> Batch: ...


AGREE_EVERY = 8  # steps; agreeing makes the processes wait for the device
SAVE_SECONDS = 600.0  # after which a single process saves at its next log line; the clocks of several differ


def told_to_stop(step: int, every: int = AGREE_EVERY) -> bool:
    """Return true if a SIGTERM asks to save and stop after this step; several processes agree after `every` steps."""
    if jax.process_count() == 1:
        return sigterm.requested()
    return step % every == 0 and not multihost.everywhere(not sigterm.requested())


@dataclasses.dataclass(frozen=True)
class Loop:
    """Settings and actions of a training besides its updates; all intervals are in steps."""

    total_steps: int  # of the whole training, including those before a resume
    log_every: int
    save_every: int  # between checkpoints, rounded down to whole units; see `SAVE_SECONDS` as well
    name: str  # the phase's name, in metrics and progress bars
    log: Callable[[dict], None]  # writes a line of metrics
    # given the averages of each log line, returns true to end the training
    stop: Callable[[dict], bool] = lambda metrics: False
    # returns metrics of the model's parameters; called at the end and every `evaluate_every` steps (0: never); None for
    # none, with which a training that ends by `stop` cannot be stopped between that and its last checkpoint
    measure: Callable[[Params], dict] | None = None
    evaluate_every: int = 0
    # if not 0, training ends after this many evaluations without a lower `select_by`, one of `measure`'s metrics, and
    # returns to the parameters with the lowest
    patience: int = 0
    select_by: str = "nll"
    # checkpoint and stop only after multiples of this, so that a training whose batches depend on earlier parameters
    # resumes where it would create new ones
    save_unit: int = 1
    stop_requested: Callable[[int], bool] = told_to_stop  # called with the step after each step that ends a unit
    flops: Flops | None = None  # FLOPs of a step, for the logged speed
    profile: Path | None = None  # folder for a profiler trace of some steps; None for no trace


class Trainer:
    """A training in progress; use `training` to create it.

    Attributes:
      state: after the last update; each update donates the previous state.
      step: number of updates, including those before a resume.
      finished: whether an earlier process finished this training: `state` is its result, with nothing left to do.
      done: whether no more updates are needed.
    """

    def __init__(
        self,
        state: TrainState,
        *,
        loss_fn: LossFn,
        optimizer: optax.GradientTransformation,
        checkpoints: Checkpoints,
        loop: Loop,
        schedule: Schedule,
        accumulate: int,
    ):
        self._loop, self._checkpoints, self._schedule = loop, checkpoints, schedule
        self._clock = Clock(loop.flops)
        self._save_every = max(loop.save_every // loop.save_unit, 1) * loop.save_unit
        self.state = checkpoints.restore(state)
        self.step = int(self.state.step)
        self.finished = self.done = checkpoints.finished()
        self._bar = Bar(None, loop.name, initial=self.step, total=loop.total_steps, disable=self.finished)
        if self.finished:
            return
        self.done = self.step >= loop.total_steps

        def step_fn(
            learned: TrainState, frozen: Params, batch: Batch, rate: jax.Array
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            state, metrics = train_step(
                learned.replace(frozen=frozen), batch, rate,
                loss_fn=loss_fn, optimizer=optimizer, accumulate=accumulate,
            )  # fmt: skip
            return state.replace(frozen={}), metrics

        # Fixed shardings: if the compiler chose others for the new state, the next step would compile again.
        on_mesh = not jax.sharding.get_mesh().empty
        learned = self.state.replace(frozen={})
        shardings = jax.tree.map(lambda leaf: leaf.sharding, learned) if on_mesh else None
        self._step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None))
        self._best, self._evaluated_at = checkpoints.best(), -1
        self._window: list[dict] = []  # metrics of the updates since the last log line
        self._metrics: dict[str, jax.Array] = {}  # of the last update
        self._unseen: collections.deque[dict] = collections.deque()  # metrics of updates that the bar has not counted
        self._loss = ""  # of the last update that the bar has counted
        self._trace = Trace(loop.profile)
        self._saved_at = time.monotonic()
        self._clock.start(self.state.params)
        self._tell_unsaved()
        self._bar.say("compiling")

    def update(self, batch: Batch) -> None:
        """Take one step on a batch, then write the log line and the checkpoint that are due.

        Raises:
          UserError: if the loss or its gradient is not finite.
          Stopped: if `Loop.stop_requested`; the state is saved.
        """
        loop = self._loop
        with self._clock.lost():
            self._trace.before_step(self.state, self._clock.warm)
        with self._clock.step(batch, self._metrics), jax.profiler.StepTraceAnnotation("train", step_num=self.step):
            rate = np.float32(self._schedule(self.step))
            frozen = self.state.frozen
            learned, self._metrics = self._step_fn(
                self.state.replace(frozen={}), frozen, sharding.place_rows(batch), rate
            )
            self.state = learned.replace(frozen=frozen)
        self._window.append(self._metrics)
        self._unseen.append(self._metrics)
        self.step += 1
        # The step before is waited for, so that the devices go on meanwhile; the very first one for its loss.
        self._show_done(running=1 if self._loss else 0)
        at_end, unit_ends = self.step >= loop.total_steps, self.step % loop.save_unit == 0
        logging = self.step % loop.log_every == 0
        # An overdue checkpoint waits for a log line: no line, and no end by `stop`, is to depend on the clock.
        saving = unit_ends and (self.step % self._save_every == 0 or (logging and self._is_overdue()))
        stopping = unit_ends and loop.stop_requested(self.step)
        self.done = at_end
        if at_end or saving or stopping or logging:
            self.done = loop.stop(self._log_averages()) or at_end
        if self.done and not at_end:
            return
        if stopping or (saving and not at_end):
            with self._clock.lost():
                self._save()
        if stopping:
            raise Stopped

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[Params]:
        """Yield the model's parameters for other work, whose time does not count as training.

        Raises:
          Stopped: at a SIGTERM or Ctrl-C inside, or if the work raises it; the state is saved.
        """
        jax.block_until_ready(self.state)
        with self._clock.lost():
            try:
                with sigterm.interruptible():
                    yield self.state.model
            except Stopped:
                self._save()
                raise

    def log(self, metrics: dict) -> None:
        """Write a line of metrics for the current step."""
        self._loop.log({"phase": self._loop.name, "step": self.step, **metrics})

    def evaluate(self) -> None:
        """Log what `Loop.measure` returns, save parameters that are the best so far, and stop when out of patience."""
        loop, best = self._loop, self._best
        self._show_done()
        self._bar.say("evaluating")
        with self.between_steps() as params:
            metrics = loop.measure(params)
        if self._loss:
            self._bar.set_postfix(loss=self._loss)
        self._evaluated_at = self.step
        if loop.patience and metrics[loop.select_by] < (best.loss if best else math.inf):
            self._best = Best(self.step, metrics[loop.select_by])
        if metrics:
            self.log(metrics | ({"best_step": self._best.step} if self._best else {}))
        if self._best is not best and not self.done:
            with self._clock.lost():
                self._checkpoints.save_best(self.state.params, self._best)
        since_best = self.step - (self._best.step if self._best else 0)
        if loop.patience and since_best >= loop.patience * loop.evaluate_every:
            self.done = True

    def finish(self) -> None:
        """Evaluate, return to the best parameters if there are any, and save the final checkpoint."""
        self._show_done()
        self._trace.end(self.state)
        if self._loop.measure and self._evaluated_at != self.step:
            self.evaluate()
        self._bar.close()
        if self._best and self._best.step < self.step:
            self.state = self.state.replace(params=self._checkpoints.restore_best(self._best, self.state.params))
        self._save(final=True)

    def close(self) -> None:
        """Wait until everything saved is on disk."""
        self._bar.close()
        self._checkpoints.wait()

    def _log_averages(self) -> dict[str, float]:
        """Log the averages over the updates since the last line, and the speed."""
        window = jax.device_get(self._window)
        means = {name: float(np.mean([metrics[name] for metrics in window])) for name in window[0]}
        # A non-finite gradient has already spoiled the parameters; the loss shows it one step later.
        if not np.isfinite([means["loss"], means["gradient_norm"]]).all():
            raise UserError(
                f"{self._loop.name}: the loss or its gradient is not finite by step {self.step}; the last good"
                " checkpoint is kept. Lower the learning rate"
            )
        speed = self._clock.lap()
        with self._clock.lost():
            self.log({**means, **speed, **device_memory()})
        self._window = []
        return means

    def _show_done(self, running: int = 0) -> None:
        """Move the bar to the last update that the devices have done, but for those `running`, and show its loss."""
        while len(self._unseen) > running:
            first, self._loss = not self._loss, f"{float(self._unseen.popleft()['loss']):.3f}"
            self._clock.busy()
            self._bar.set_postfix(loss=self._loss, refresh=False)
            self._bar.update()
            if first:
                self._bar.refresh()

    def _is_overdue(self) -> bool:
        return jax.process_count() == 1 and time.monotonic() - self._saved_at > SAVE_SECONDS

    def _save(self, *, final: bool = False) -> None:
        """Save a checkpoint, which may still be being written when this returns."""
        self._saved_at = time.monotonic()
        self._checkpoints.save(self.state, best=None if final else self._best, final=final)
        self._tell_unsaved(f", and the checkpoint of {self.step} if it is not whole yet")

    def _tell_unsaved(self, more: str = "") -> None:
        sigterm.unsaved(f"the steps of {self._loop.name!r} after {self.step}{more}")


@contextlib.contextmanager
def training(
    state: TrainState,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    loop: Loop,
    schedule: Schedule = lambda step: 1.0,
    accumulate: int = 1,
) -> Iterator[Trainer]:
    """Yield the trainer of a training, resumed from its last checkpoint; everything is on disk when the block ends.

    Inside, a SIGTERM or Ctrl-C takes effect at the end of a unit of steps (`Loop.save_unit`), or in `between_steps`.
    `accumulate` is as in `train_step`.

    Raises:
      Stopped: at the end, after a signal.
      OSError: naming the folder, if a checkpoint cannot be written.
    """
    with sigterm.deferred():
        trainer = Trainer(
            state, loss_fn=loss_fn, optimizer=optimizer, checkpoints=checkpoints, loop=loop, schedule=schedule,
            accumulate=accumulate,
        )  # fmt: skip
        try:
            yield trainer
        finally:
            trainer.close()


def fit(
    state: TrainState,
    batches: BatchSource,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    loop: Loop,
    schedule: Schedule = lambda step: 1.0,
    accumulate: int = 1,
) -> TrainState:
    """Train on `batches[step]` to `loop.total_steps`; arguments and errors as in `training` and `Trainer.update`.

    A finished training returns at once. With `loop.patience` the returned and final parameters are the best evaluated.
    """
    with training(
        state, loss_fn=loss_fn, optimizer=optimizer, checkpoints=checkpoints, loop=loop, schedule=schedule,
        accumulate=accumulate,
    ) as trainer:  # fmt: skip
        while not trainer.done:
            if loop.evaluate_every and trainer.step > 0 and trainer.step % loop.evaluate_every == 0:
                trainer.evaluate()
            if not trainer.done:
                trainer.update(batches[trainer.step])
        if not trainer.finished:
            trainer.finish()
    return trainer.state


def device_memory() -> dict[str, int]:
    """Return the peak bytes in use: on the first device, or by this process if the device is the host."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:
        return {"peak_bytes": machine.peak_memory()}
    return {"peak_bytes": stats["peak_bytes_in_use"]}
