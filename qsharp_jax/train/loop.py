"""The training loop: from the last checkpoint to the end, with metrics, evaluations and the best parameters kept.

It knows nothing about tasks, sampling or where the batches come from.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
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
    """`dataset.Batches`, or anything whose batch is a function of the step."""

    def __getitem__(self, step: int) -> Batch: ...


AGREE_EVERY = 8  # steps: to ask the other processes is to wait for the device


def told_to_stop(step: int) -> bool:
    """Whether a SIGTERM asks to save and stop after this step; several processes agree, once in so many steps."""
    if jax.process_count() == 1:
        return sigterm.requested()
    return step % AGREE_EVERY == 0 and not multihost.everywhere(not sigterm.requested())


@dataclasses.dataclass(frozen=True)
class Loop:
    """How often the loop looks up, in steps, and where it writes.

    `measure` is asked at the end, and every `evaluate_every` steps if that is not 0; its numbers are logged. With
    `patience` they have an "nll": after so many evaluations since the one with the least, training ends.

    `sample`, for batches that the model itself makes as it learns, is told before the first step and then every
    `sample_every` steps how many times it has been told before, and the parameters of that step; its numbers are
    logged. Checkpoints are then of steps that a sample follows alone, so that a training that goes on makes the samples
    that one that never stopped would have made.
    """

    total_steps: int
    log_every: int
    save_every: int
    name: str  # of the phase, in metrics and progress bars
    log: Callable[[dict], None]
    stop: Callable[[dict], bool] = lambda metrics: False  # asked with the averages at each log line
    measure: Callable[[Params], dict] = lambda params: {}
    evaluate_every: int = 0
    patience: int = 0  # 0: off
    sample: Callable[[int, Params], dict] | None = None
    sample_every: int = 1
    stop_requested: Callable[[int], bool] = told_to_stop  # asked after each step
    flops: Flops | None = None  # of a step, for the speed in the log
    profile: Path | None = None  # folder for a trace of some steps; None: no trace


@sigterm.deferred()
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
    """Trains to `loop.total_steps`, from the last checkpoint if there is one, and saves at the end.

    Returns at once if the last checkpoint is a final one. With `loop.patience`, the parameters that are returned, and
    lie in the final checkpoint, are those of the best evaluation. All that was saved is on disk at the end, whatever
    the end is.

    Args:
      accumulate: as in `train_step`.

    Raises:
      UserError: if the loss or its gradient is not finite; the last good checkpoint stays.
      Stopped: if `loop.stop_requested`, or at SIGTERM or Ctrl-C in an evaluation or while sampling; the present step is
        saved.
      OSError: naming the folder, if a checkpoint cannot be written.
    """
    clock = Clock(loop.flops)
    state = checkpoints.restore(state)
    if checkpoints.finished():
        return state
    step_fn = functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, accumulate=accumulate)
    # On a mesh the new state's place is said: the compiler may find another, and the next step were another program.
    places = None if jax.sharding.get_mesh().empty else jax.tree.map(lambda leaf: leaf.sharding, state)
    step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(places, None))
    try:
        return _train(state, batches, step_fn, checkpoints, loop, schedule, clock)
    finally:
        checkpoints.wait()


def _train(
    state: TrainState,
    batches: BatchSource,
    step_fn: Callable[..., tuple[TrainState, dict]],
    checkpoints: Checkpoints,
    loop: Loop,
    schedule: Schedule,
    clock: Clock,
) -> TrainState:
    """`fit`, from the state on. A checkpoint is of the moment before the evaluation that its step may have."""
    best = checkpoints.best()
    first, evaluated = int(state.step), False
    window: list[dict] = []
    metrics: dict[str, jax.Array] = {}
    trace = Trace(loop.profile)
    clock.start(state.params)
    sigterm.unsaved(f"the steps of {loop.name!r} after {first}")
    for step in (bar := Bar(range(first, loop.total_steps), loop.name, initial=first, total=loop.total_steps)):
        if step > 0 and loop.evaluate_every > 0 and step % loop.evaluate_every == 0:
            best_before, evaluated = best, True
            jax.block_until_ready(state)
            with clock.lost():
                best = _evaluate(state, loop, checkpoints, best)
                if best is not best_before:
                    checkpoints.save_best(state.params, best)
            if loop.patience and step - (best.step if best else 0) >= loop.patience * loop.evaluate_every:
                break
        if loop.sample is not None and step % loop.sample_every == 0:
            jax.block_until_ready(state)
            with clock.lost():
                sample = functools.partial(loop.sample, step // loop.sample_every)
                loop.log({"phase": loop.name, "step": step, **_ask(sample, state, loop, checkpoints, best)})
        batch, evaluated = clock.fetch(batches, step, metrics), False
        with clock.lost():
            trace.before_step(state, clock.warm)
        with clock.step(batch), jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = step_fn(state, sharding.place_rows(batch), np.float32(schedule(step)))
        window.append(metrics)
        last, between = step + 1 == loop.total_steps, (step + 1) % loop.sample_every == 0
        saving = between and (step + 1) % loop.save_every == 0
        stopping = between and loop.stop_requested(step + 1)
        if last or saving or stopping or (step + 1) % loop.log_every == 0:
            means = {name: float(np.mean([m[name] for m in jax.device_get(window)])) for name in metrics}
            # A gradient that is not finite has spoilt the parameters, though their loss comes with the next step only.
            if not np.isfinite([means["loss"], means["gradient_norm"]]).all():
                raise UserError(
                    f"{loop.name}: the loss or its gradient is not finite by step {step + 1}; the last good checkpoint"
                    " is kept. Lower the learning rate"
                )
            speed = clock.lap()
            with clock.lost():
                loop.log({"phase": loop.name, "step": step + 1, **means, **speed, **device_memory()})
            bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
            window = []
            if loop.stop(means):
                break
        if stopping or (saving and not last):
            with clock.lost():
                _save(state, loop, checkpoints, best=best)
        if stopping:
            raise Stopped
    bar.close()
    trace.end(state)
    if not evaluated:
        best = _evaluate(state, loop, checkpoints, best)
    if best and best.step < int(state.step):
        state = state.replace(params=checkpoints.restore_best(best, state.params))
    _save(state, loop, checkpoints, final=True)
    return state


def _save(
    state: TrainState, loop: Loop, checkpoints: Checkpoints, *, best: Best | None = None, final: bool = False
) -> None:
    """`Checkpoints.save`; the checkpoint may still be being written when this returns."""
    checkpoints.save(state, best=best, final=final)
    step = int(state.step)
    sigterm.unsaved(f"the steps of {loop.name!r} after {step}, and the checkpoint of {step} if it is not whole yet")


def _evaluate(state: TrainState, loop: Loop, checkpoints: Checkpoints, best: Best | None) -> Best | None:
    """Logs what is measured of the parameters; the best so far, which with `loop.patience` these may now be."""
    step, measures = int(state.step), _ask(loop.measure, state, loop, checkpoints, best)
    if loop.patience and measures["nll"] < (best.loss if best else math.inf):
        best = Best(step, measures["nll"])
    if measures:
        loop.log({"phase": loop.name, "step": step, **measures, **({"best_step": best.step} if best else {})})
    return best


def _ask(
    what: Callable[[Params], dict], state: TrainState, loop: Loop, checkpoints: Checkpoints, best: Best | None
) -> dict:
    """What is made of the parameters, which may take long: a SIGTERM meanwhile saves them and ends the training."""
    try:
        with sigterm.interruptible():
            return what(state.model)
    except Stopped:
        _save(state, loop, checkpoints, best=best)
        raise


def device_memory() -> dict[str, int]:
    """Peak bytes in use on the first device; where the device is the host, those of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:
        return {"peak_bytes": machine.peak_memory()}
    return {"peak_bytes": stats["peak_bytes_in_use"]}
