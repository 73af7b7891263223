"""The rows of a continuous batch on the devices: how they begin with a prompt, and go on from an earlier place.

Shapes: R rows, U prompts.
"""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.decoding.state import Settings, State, first_state
from qsharp_jax.models import kv_cache, sharding
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.kv_cache import KVCache, Sizes


@flax.struct.dataclass
class Waiting:
    """Prompts that have been prefilled, [U]: the caches end at the last position but one."""

    ref_cache: KVCache
    guide_cache: Any  # as of `State`


class First(NamedTuple):
    """The last two tokens of the prompts that rows begin with, [R]."""

    pending: jax.Array  # -1: the row goes on
    previous: jax.Array

    @property
    def begins(self) -> jax.Array:
        """[R] bool."""
        return self.pending >= 0

    @classmethod
    def none(cls, rows: int) -> "First":
        """Arrays of the host for rows of which none begins."""
        return cls(*np.full((2, rows), -1, np.int32))

    def set(self, row: int, tokens: Any) -> None:
        """Let a row begin after these tokens, of which the last is pending."""
        self.pending[row], self.previous[row] = tokens[-1], tokens[-2] if len(tokens) > 1 else -1


@functools.partial(jax.jit, static_argnames=("ref", "guide", "sizes", "steps", "settings", "on_cpu"))
def empty_state(
    ref: DecoderConfig, guide: Any, sizes: Sizes, steps: int, settings: Settings, *, on_cpu: bool
) -> State:
    """The loop's carry before any row has a prompt: rings, and room for `steps` new tokens per row.

    Args:
      guide: the shape of its trunk, a tuple of them for several, or None.
      on_cpu: the weights are in the form for a CPU.
    """

    def empty(config: DecoderConfig) -> KVCache:
        int8 = kv_cache.is_int8(config, on_cpu=on_cpu)
        return kv_cache.empty(config, sizes, positions_last=on_cpu and sizes.rows > 1, int8=int8).replace(ring=True)

    ref_ring, guide_ring = (jax.tree.map(empty, shapes) for shapes in (ref, guide))
    nothing = np.zeros((sizes.rows, 1), np.int32)
    return sharding.constrain_rows(first_state(ref_ring, guide_ring, nothing, nothing[:, 0], steps, settings))


@functools.partial(jax.jit, donate_argnames=("state",))
def refill(state: State, waiting: Waiting, source: jax.Array, first: First) -> State:
    """Give rows to waiting prompts.

    Args:
      source: [R], which of them the row gets; or which is shared in each place, if rows share prompts; -1: none.
      first: of the rows that begin.
    """

    def refilled(ring: KVCache, prompts: KVCache) -> KVCache:
        return kv_cache.refill(ring, prompts, source, first.begins)

    return _begun(
        state.replace(
            ref_cache=refilled(state.ref_cache, waiting.ref_cache),
            guide_cache=kv_cache.each(refilled, state.guide_cache, waiting.guide_cache),
        ),
        first,
    )


@functools.partial(jax.jit, donate_argnames=("state",))
def rewind(state: State, kept: jax.Array, first: First) -> State:
    """Let rows go on, as other responses, from an earlier place in their own caches.

    Args:
      kept: [R], positions before the pending token that the row keeps; -1: the row stays.
      first: of the rows that begin there.
    """

    def shortened(ring: KVCache) -> KVCache:
        return kv_cache.rewind(ring, kept)

    caches = (kv_cache.each(shortened, caches) for caches in (state.ref_cache, state.guide_cache))
    ref_cache, guide_cache = caches
    return _begun(state.replace(ref_cache=ref_cache, guide_cache=guide_cache), first)


def _begun(state: State, first: First) -> State:
    begins = first.begins
    return sharding.constrain_rows(
        state.replace(
            pending=jnp.where(begins, first.pending, state.pending),
            previous=jnp.where(begins, first.previous, state.previous),
            length=jnp.where(begins, 0, state.length),
            stopped=state.stopped & ~begins,
            dropped=jnp.where(begins, 0, state.dropped),
        )
    )
