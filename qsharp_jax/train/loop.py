"""The training loop: from the last checkpoint to the end, with metrics, evaluations and the best parameters kept.

It knows nothing about tasks, sampling or where the batches come from.
"""

import dataclasses
import functools
import math
import resource
import time
from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np
import optax

from qsharp_jax import sharding
from qsharp_jax.checkpoint import Best, Checkpoints
from qsharp_jax.dataset import Batch
from qsharp_jax.errors import UserError
from qsharp_jax.models import lora
from qsharp_jax.models.decoder import Params
from qsharp_jax.progress import Bar
from qsharp_jax.train.optimizer import Schedule
from qsharp_jax.train.step import LossFn, TrainState, train_step


class BatchSource(Protocol):
    """`dataset.Batches`, or anything whose batch is a function of the step."""

    def __getitem__(self, step: int) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class Loop:
    """How often the loop looks up, in steps, and where it writes.

    `measure` is asked at the end, and every `evaluate_every` steps if that is not 0; its numbers are logged. With
    `patience` they have an "nll": after so many evaluations since the one with the least, training ends.
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

    What is returned and saved at the end is the whole model in its ordinary form, with nothing frozen.

    Returns at once if the last checkpoint is a final one. With `loop.patience`, the parameters that are returned, and
    lie in the final checkpoint, are those of the best evaluation.

    Args:
      accumulate: as in `train_step`.

    Raises:
      UserError: if the loss or its gradient is not finite; the last good checkpoint stays.
    """
    if checkpoints.finished():
        return state.replace(params=checkpoints.restore_params(lora.without(state.model)), frozen={})
    state = checkpoints.restore(state)
    step_fn = functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, accumulate=accumulate)
    # On a mesh the new state's place is said: the compiler may find another, and the next step were another program.
    places = None if jax.sharding.get_mesh().empty else jax.tree.map(lambda leaf: leaf.sharding, state)
    step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(places, None))
    best = checkpoints.restore_best(state.params)
    first, evaluated = int(state.step), False
    window: list[dict] = []
    tokens, since = 0, time.monotonic()
    for step in (bar := Bar(range(first, loop.total_steps), loop.name, initial=first, total=loop.total_steps)):
        batch, evaluated = batches[step], False
        state, metrics = step_fn(state, sharding.place_rows(batch), np.float32(schedule(step)))
        window.append(metrics)
        tokens += int(batch.segments.astype(bool).sum())
        last, saving = step + 1 == loop.total_steps, (step + 1) % loop.save_every == 0
        if last or saving or (step + 1) % loop.log_every == 0:
            means = {name: float(np.mean([m[name] for m in jax.device_get(window)])) for name in metrics}
            # A gradient that is not finite has spoilt the parameters, though their loss comes with the next step only.
            if not np.isfinite([means["loss"], means["gradient_norm"]]).all():
                raise UserError(
                    f"{loop.name}: the loss or its gradient is not finite by step {step + 1}; the last good checkpoint"
                    " is kept. Lower the learning rate"
                )
            rate = tokens / (time.monotonic() - since)
            loop.log({"phase": loop.name, "step": step + 1, **means, "tokens_per_second": rate, **device_memory()})
            bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
            window, tokens, since = [], 0, time.monotonic()
            if loop.stop(means):
                break
        if evaluated := loop.evaluate_every > 0 and (step + 1) % loop.evaluate_every == 0:
            began = time.monotonic()
            best = _evaluate(state, loop, best)
            since += time.monotonic() - began
            if loop.patience and step + 1 - (best.step if best else 0) >= loop.patience * loop.evaluate_every:
                break
        if saving and not last:
            checkpoints.save(state, best=best)
    bar.close()
    if not evaluated:
        best = _evaluate(state, loop, best)
    if best:
        params = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), best.params, state.params)
        state = state.replace(params=params)
    state = state.replace(params=lora.merged(state.model), frozen={})
    checkpoints.save(state, final=True)
    return state


def _evaluate(state: TrainState, loop: Loop, best: Best | None) -> Best | None:
    """Logs what is measured of the parameters; the best so far, which with `loop.patience` these may now be."""
    measures, step = loop.measure(state.model), int(state.step)
    if loop.patience and measures["nll"] < (best.loss if best else math.inf):
        # Copied: the next step donates these.
        best = Best(jax.tree.map(np.array, state.params), step, measures["nll"])
    if measures:
        loop.log({"phase": loop.name, "step": step, **measures, **({"best_step": best.step} if best else {})})
    return best


def device_memory() -> dict[str, int]:
    """Peak bytes in use on the first device; where the device is the host, those of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux counts in KiB
    return {"peak_bytes": stats["peak_bytes_in_use"]}
