"""The two compiled programs of decoding: `prefill` of the prompts, and `decode`, the loop over steps.

Shapes: B prompts, P their padded length, R rows (B times the samples of each prompt), N new tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from qsharp_jax.generate.state import Controls, Guide, Settings, State
from qsharp_jax.generate.step import decode_one_token
from qsharp_jax.models import cpu_form, decoder, kv_cache, sharding
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import KVCache

BLOCK = 8  # steps between two looks at whether every row has ended


@functools.partial(jax.jit, static_argnames=("config", "size", "samples"))
def prefill(params: Any, config: Any, tokens: jax.Array, start: jax.Array, *, size: int, samples: int = 1) -> KVCache:
    """Fill a cache with left-padded prompts, whose last tokens are the loop's first pending ones: no logits are needed.

    Args:
      params: a decoder's parameters, in either form.
      config: its `DecoderConfig`.
      tokens: [B, P - 1], the prompts without their last token.
      start: [B], position of each prompt's first token.
      size: positions of the cache.
      samples: rows of the cache for each prompt; a prompt goes through the model once for all of them.
    """
    chex.assert_rank(tokens, 2)
    chex.assert_shape(start, (tokens.shape[0],))
    positions = jnp.arange(tokens.shape[1]) - start[:, None]
    segments = (positions >= 0).astype(jnp.int32)
    _, kept = decoder.forward(params, config, tokens, segments, jnp.maximum(positions, 0), keep_kv=True)
    if not isinstance(kept, list):
        kept = [(kept[0][layer], kept[1][layer]) for layer in range(config.layers)]
    kept, start = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), (kept, start))
    cache = kv_cache.from_prefill(kept, start, size, positions_last=cpu_form.positions_last(params, len(start)))
    return sharding.constrain_rows(cache)


@functools.partial(jax.jit, static_argnames=("settings",), donate_argnames=("state",))
def decode(
    ref: LanguageModel,
    guide: Guide | None,
    state: State,
    controls: Controls,
    *,
    settings: Settings,
    until: jax.Array | int | None = None,
) -> State:
    """Decode until every row has ended, or `until` steps are done. The carry is updated in place.

    A block is a scan: the loop's condition, which a device has to wait for, is looked at once a block.
    """
    room = state.record.token.shape[1]
    last = room if until is None else jnp.minimum(until, room)

    def going_on(state: State) -> jax.Array:
        return state.active(controls).any() & (state.step < last)

    def block(state: State) -> State:
        first = state.step
        state, new = jax.lax.scan(
            lambda state, _: decode_one_token(ref, guide, state, controls, settings), state, None, length=BLOCK
        )
        new = sharding.constrain_rows(jax.tree.map(jnp.transpose, new))  # [B, BLOCK]
        record = jax.tree.map(
            lambda kept, block: jax.lax.dynamic_update_slice(kept, block, (jnp.int32(0), first)), state.record, new
        )
        return sharding.constrain_rows(state.replace(record=record))

    return while_loop(going_on, block, state)


def while_loop(going_on: Callable[[State], jax.Array], block: Callable[[State], State], state: State) -> State:
    """Repeat `block` while `going_on`. The cache of a single row on one device goes without its axis of rows."""

    def of_caches(change: Callable[[KVCache], KVCache], state: State) -> State:
        return state.replace(ref_cache=change(state.ref_cache), guide_cache=kv_cache.each(change, state.guide_cache))

    if len(state.pending) > 1 or not jax.sharding.get_abstract_mesh().empty:
        return jax.lax.while_loop(going_on, block, state)
    state = jax.lax.while_loop(going_on, block, of_caches(cpu_form.without_rows, state))
    return of_caches(cpu_form.with_rows, state)
