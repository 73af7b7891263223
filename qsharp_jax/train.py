"""Maximum-likelihood training: one state, one jitted step, one loop, for the language model and for the guide.

The guide's loss is the negative log-likelihood of the observed reward-to-go at every labelled token (arXiv 2502.20548,
Algorithm 1). Shapes: B rows, T tokens, D embed, V vocabulary, F offsets of the future-token loss.
It knows nothing about tasks, sampling or where the batches come from.
"""

import dataclasses
import functools
import math
import resource
import time
from collections.abc import Callable
from typing import Any, Protocol

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from qsharp_jax import values
from qsharp_jax.checkpoint import Best, Checkpoints
from qsharp_jax.dataset import Batch
from qsharp_jax.errors import UserError
from qsharp_jax.models import decoder, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.progress import Bar

Params = Any
LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]  # of (params, batch), or (params, part, whole batch)
Schedule = Callable[[int], float]  # step -> learning rate, relative to its peak


@flax.struct.dataclass
class TrainState:
    """All that training depends on: with the data's seed, `step` is also the position in the data."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array


# --- Optimiser ------------------------------------------------------------------------------------------------------


def make_schedule(config: Any, total_steps: int) -> Schedule:
    """The learning rate's course relative to its peak: linear warm-up, then constant or cosine to `end_fraction`.

    Args:
      config: warmup_steps, schedule, end_fraction.
      total_steps: of the whole training, where a cosine ends.
    """
    rest = max(total_steps - config.warmup_steps, 1)

    def rate(step: int) -> float:
        if step < config.warmup_steps:
            return step / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        done = min((step - config.warmup_steps) / rest, 1)
        return config.end_fraction + (1 - config.end_fraction) * (1 + math.cos(math.pi * done)) / 2

    return rate


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW, Adafactor, or Muon on the blocks' matrices (AdamW elsewhere), at the peak rate.

    Weight decay is on matrices only: not on norms, biases and the like. Adafactor (Shazeer and Stern, arXiv 1804.04235)
    keeps a row and a column of second moments of a matrix in place of AdamW's two numbers a weight.

    Args:
      config: name, learning_rate, adam_learning_rate (Muon's AdamW), weight_decay, b2 (of AdamW), clip.
    """
    if config.name == "adamw":
        rule = optax.adamw(config.learning_rate, b2=config.b2, weight_decay=config.weight_decay, mask=_is_matrix)
    elif config.name == "adafactor":
        # A rate relative to a parameter's size would hold the guide's head, which begins at zero, where it is.
        rule = optax.adafactor(
            config.learning_rate,
            multiply_by_parameter_scale=False,
            weight_decay_rate=config.learning_rate * config.weight_decay,
            weight_decay_mask=_is_matrix,
        )
    else:
        # Muon's own AdamW for the rest would decay every leaf: it knows no mask.
        muon = optax.contrib.muon(
            config.learning_rate, weight_decay=config.weight_decay, muon_weight_dimension_numbers=_muon_matrices
        )
        adam = optax.adamw(
            config.adam_learning_rate,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
            nesterov=True,
        )
        rule = optax.partition({True: muon, False: adam}, _is_block_matrix)
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def _is_matrix(params: Params) -> Params:
    names = ("kernel", "embedding", "positions", "head", "future")
    return jax.tree.map_with_path(lambda path, _: path[-1].key in names, params)


def _is_block_matrix(params: Params) -> Params:
    def which(path: Any, _: Any) -> bool:
        keys = [entry.key for entry in path]
        return "layers" in keys and keys[-1] == "kernel"

    return jax.tree.map_with_path(which, params)


def _muon_matrices(params: Params) -> Params:
    """Kernels inside the blocks are [L, in, out]: each layer's matrix is orthogonalised on its own."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), params)


# --- Losses ---------------------------------------------------------------------------------------------------------


# A loss and its metrics are means over a batch. Where `whole` is given, `batch` is a part of its rows, and the sums are
# divided by the whole's counts: the parts' losses, metrics and gradients then add up to the whole's.


def language_model_loss(
    params: Params, batch: Batch, whole: Batch | None = None, *, config: DecoderConfig
) -> tuple[jax.Array, dict]:
    """Mean cross-entropy of the next token, in nats, over response tokens."""
    whole = batch if whole is None else whole
    hidden, _ = decoder.forward(params, config, batch.tokens, batch.segments, batch.positions)
    logits = decoder.logits(params, config, hidden[:, :-1])
    targets, mask, of = batch.tokens[:, 1:], _has_context(batch), _has_context(whole)
    loss = masked_mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets), mask, of)
    return loss, {"accuracy": masked_mean(logits.argmax(-1) == targets, mask, of)}


def _has_context(batch: Batch) -> jax.Array:
    """[B, T - 1]: whether the token one place later is one of a response, with a token of its own segment before it."""
    return batch.response_mask[:, 1:] & (batch.segments[:, 1:] == batch.segments[:, :-1])


def value_loss(
    params: Params,
    batch: Batch,
    whole: Batch | None = None,
    *,
    config: ValueConfig,
    projection: values.Projection = "two_hot",
    clip: bool = False,
    future_weight: float = 0.0,
    remat: decoder.Remat = "dots",
) -> tuple[jax.Array, dict]:
    """Mean negative log-likelihood of the reward-to-go over all labelled tokens of the batch.

    With "future" heads in `params`, `future_weight` times the loss of predicting the later tokens of successful
    rollouts is added, from the same forward pass: a value that depends on tokens several steps ahead is otherwise
    found only after a long plateau.

    Args:
      params: a value model's parameters, with "future" [F, D, V] or without.
      projection, clip: how a categorical puts rewards on its atoms, see `values.project`.
      remat: of the trunk, see `decoder.forward`.
    """
    whole = batch if whole is None else whole
    outputs, hidden = value.forward(params, config, batch.tokens, batch.segments, batch.positions, remat=remat)
    distribution = values.from_outputs(config.distribution, outputs, config.atoms)
    mask, of = batch.label_mask, whole.label_mask
    nll = masked_mean(values.nll(distribution, batch.reward_to_go, projection=projection, clip=clip), mask, of)
    metrics = {"nll": nll, "brier": masked_mean((distribution.mean() - batch.reward_to_go) ** 2, mask, of)}
    if "future" not in params:
        return nll, metrics
    future = future_token_loss(params["future"], hidden, batch, whole)
    return nll + future_weight * future, metrics | {"future_nll": future}


def check_rewards(rewards: np.ndarray, config: ValueConfig, *, clip: bool) -> None:
    """Refuses rewards that the guide's distribution does not cover, before they enter a jitted step.

    Raises:
      UserError: naming the reward and the range.
    """
    ranges = {"bernoulli": (0.0, 1.0), "categorical": config.atoms[:1] + config.atoms[-1:]}
    if config.distribution in ranges and not (clip and config.distribution == "categorical"):
        try:
            values.check_rewards(rewards, *ranges[config.distribution])
        except ValueError as error:
            raise UserError(f"a {config.distribution} guide cannot learn these rewards: {error}") from None


def future_token_loss(heads: jax.Array, hidden: jax.Array, batch: Batch, whole: Batch | None = None) -> jax.Array:
    """Mean cross-entropy of the tokens 1, 2, ... F places later, by linear heads [F, D, V] on hidden [B, T, D].

    Only responses with a positive reward are learned from. Multi-token prediction: Gloeckle et al., arXiv 2404.19737.
    """
    total, count = 0.0, 0.0
    for offset in range(1, len(heads) + 1):
        logits = hidden[:, :-offset] @ heads[offset - 1]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, offset:])
        total += (loss * _has_future(batch, offset)).sum()
        count += _has_future(batch if whole is None else whole, offset).sum()
    return total / jnp.maximum(count, 1)


def _has_future(batch: Batch, offset: int) -> jax.Array:
    """[B, T - offset]: whether the token `offset` places later is to be predicted."""
    both = batch.response_mask[:, :-offset] & batch.response_mask[:, offset:]
    same = batch.segments[:, :-offset] == batch.segments[:, offset:]
    return both & same & (batch.reward_to_go[:, :-offset] > 0)


def init_future(key: jax.Array, offsets: int, config: DecoderConfig) -> jax.Array:
    """Heads of the future-token loss, [F, D, V]."""
    return jax.random.normal(key, (offsets, config.embed, config.vocab_size)) * config.embed**-0.5


def masked_mean(x: jax.Array, mask: jax.Array, whole: jax.Array | None = None) -> jax.Array:
    """Mean of x over the true entries of mask; 0 if there are none. With `whole`, its count is what is divided by."""
    return jnp.where(mask, x, 0).sum() / jnp.maximum((mask if whole is None else whole).sum(), 1)


# --- Step and loop --------------------------------------------------------------------------------------------------


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0, on a copy of the parameters: each step donates its state, and the caller's may be another model's too."""
    params = jax.tree.map(jnp.copy, params)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def train_step(
    state: TrainState,
    batch: Batch,
    rate: jax.Array,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update, times `rate`, the schedule's; metrics are scalars on the device.

    The rate is an argument, so that one program serves trainings of any length.

    Args:
      accumulate: parts that the batch's rows are taken in, one after the other; it divides the rows. The update is
        that of the whole batch.
    """
    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (loss, metrics), gradients = gradient_fn(state.params, batch)
    else:
        (loss, metrics), gradients = _accumulated(gradient_fn, state.params, batch, accumulate)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda update: rate * update, updates))
    metrics |= {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
    return TrainState(params, opt_state, state.step + 1), metrics


def _accumulated(gradient_fn: Callable, params: Params, batch: Batch, parts: int) -> tuple:
    """What `gradient_fn` gives for the batch, as the sum over its parts: the activations of one exist at a time."""
    chex.assert_is_divisible(len(batch.tokens), parts)

    # Every part takes rows from all over the batch: from each device's share of them, where devices divide the rows.
    def split(x: jax.Array) -> jax.Array:
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient_fn(params, part, batch)), None

    split_batch = jax.tree.map(split, batch)
    shapes = jax.eval_shape(gradient_fn, params, jax.tree.map(lambda x: x[0], split_batch), batch)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, split_batch)[0]


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

    Returns at once if the last checkpoint is a final one. With `loop.patience`, the parameters that are returned, and
    lie in the final checkpoint, are those of the best evaluation.

    Args:
      accumulate: as in `train_step`.

    Raises:
      UserError: if the loss or its gradient is not finite; the last good checkpoint stays.
    """
    state = checkpoints.restore(state)
    if checkpoints.finished():
        return state
    step_fn = functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, accumulate=accumulate)
    step_fn = jax.jit(step_fn, donate_argnums=0)
    best = checkpoints.restore_best(state.params)
    first, evaluated = int(state.step), False
    window: list[dict] = []
    tokens, since = 0, time.monotonic()
    for step in (bar := Bar(range(first, loop.total_steps), loop.name, initial=first, total=loop.total_steps)):
        batch, evaluated = batches[step], False
        state, metrics = step_fn(state, batch, np.float32(schedule(step)))
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
    checkpoints.save(state, final=True)
    return state


def _evaluate(state: TrainState, loop: Loop, best: Best | None) -> Best | None:
    """Logs what is measured of the parameters; the best so far, which with `loop.patience` these may now be."""
    measures, step = loop.measure(state.params), int(state.step)
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
