"""One update: the gradient of a batch, whole or in parts, and the optimizer's step. Shapes: B rows, T tokens."""

from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qsharp_jax.data.batches import Batch
from qsharp_jax.models import lora
from qsharp_jax.models.decoder import Params

LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]  # (params, batch) or (params, part, whole batch)


@flax.struct.dataclass
class TrainState:
    """The state of a training; with the data's seed, `step` is also the position in the data.

    `frozen` are model parameters that are not learned: they have no gradient or moments and are not in checkpoints.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    frozen: Params = flax.struct.field(default_factory=dict)

    @property
    def model(self) -> Params:
        """All of the model's parameters, in the form that is trained."""
        return lora.join(self.params, self.frozen)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, frozen: Params | None = None, *, donate: bool = False
) -> TrainState:
    """Step 0, on a copy of the parameters, since each step donates its state; moments as in `state_shardings`.

    Args:
      frozen: model parameters that are not learned; they are neither copied nor donated.
      donate: let the first step donate `params` themselves instead of a copy.
    """
    shardings = state_shardings(params, optimizer)
    params, frozen = params if donate else jax.tree.map(jnp.copy, params), frozen or {}
    if shardings is None:
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), frozen)
    make = jax.jit(lambda params: (optimizer.init(params), jnp.zeros((), jnp.int32)), out_shardings=(
        shardings.opt_state, shardings.step
    ))  # fmt: skip
    return TrainState(params, *make(params), frozen)


def state_shardings(params: Params, optimizer: optax.GradientTransformation) -> TrainState | None:
    """Shardings of a sharded model's training state, a tree like it; None for parameters without a mesh.

    Optimizer state with a parameter's shape has the parameter's sharding. The rest, which is small (counts, Adafactor's
    rows and columns), is replicated.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct`s with shardings.
    """
    flat = jax.tree.leaves_with_path(params)
    places = [getattr(leaf, "sharding", None) for _, leaf in flat]  # traced leaves have none
    meshes = [place.mesh for place in places if isinstance(place, NamedSharding)]
    if not meshes:
        return None
    whole = NamedSharding(meshes[0], PartitionSpec())
    of = {jax.tree_util.keystr(path): leaf for path, leaf in flat}

    def where(path: Any, leaf: Any) -> NamedSharding:
        tails = (jax.tree_util.keystr(path[first:]) for first in range(len(path)))
        parameter = next((of[tail] for tail in tails if tail in of), None)
        return parameter.sharding if parameter is not None and parameter.shape == leaf.shape else whole

    opt_state = jax.tree.map_with_path(where, jax.eval_shape(optimizer.init, params))
    return TrainState(jax.tree.map(lambda leaf: leaf.sharding, params), opt_state, whole)


def train_step(
    state: TrainState,
    batch: Batch,
    rate: jax.Array,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update scaled by the schedule's `rate`; metrics are scalars on the device.

    The rate is an argument, so that one program serves trainings of any length.

    Args:
      accumulate: number of sequential parts of the batch's rows, which it divides; the update is the whole batch's.
    """

    def loss_of_learned(params: Params, *batches: Batch) -> tuple[jax.Array, dict]:
        return loss_fn(lora.join(params, state.frozen), *batches)

    gradient_fn = jax.value_and_grad(loss_of_learned, has_aux=True)
    if accumulate == 1:
        (loss, metrics), gradients = gradient_fn(state.params, batch)
    else:
        (loss, metrics), gradients = _accumulated(gradient_fn, state.params, batch, accumulate)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda update: rate * update, updates))
    metrics |= {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
    return state.replace(params=params, opt_state=opt_state, step=state.step + 1), metrics


def _accumulated(gradient_fn: Callable, params: Params, batch: Batch, parts: int) -> tuple:
    """Compute `gradient_fn` of the batch as the sum over its parts, with the activations of one part at a time."""
    chex.assert_is_divisible(len(batch.tokens), parts)

    # Every part has rows from all over the batch: from each device's share, where devices divide the rows.
    def split(x: jax.Array) -> jax.Array:
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient_fn(params, part, batch)), None

    split_batch = jax.tree.map(split, batch)
    shapes = jax.eval_shape(gradient_fn, params, jax.tree.map(lambda x: x[0], split_batch), batch)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, split_batch)[0]
