"""The two compiled programs of decoding: `prefill` of the prompts, and `decode`, the loop over steps.

Shapes: B prompts, P their padded length, R rows (B times the samples of each prompt), N new tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from qsharp_jax.decoding.state import Controls, Guide, Record, Settings, State
from qsharp_jax.decoding.step import decode_one_token
from qsharp_jax.models import cpu_form, decoder, kv_cache, sharding
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import KVCache

BLOCK = 8  # steps between two checks whether every row has ended


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


@functools.partial(jax.jit, static_argnames=("settings", "block"), donate_argnames=("state",))
def decode(
    ref: LanguageModel,
    guide: Guide | None,
    state: State,
    controls: Controls,
    *,
    settings: Settings,
    block: int = BLOCK,
    enough: jax.Array | int | None = None,
    steps: jax.Array | int | None = None,
) -> State:
    """Decode until `enough` rows have ended (default: all of them), or `steps` steps are done. `state` is donated.

    The device has to wait for the loop's condition, so it is evaluated once per `block` steps, which are a scan.
    """
    rows, room = state.record.token.shape
    enough = rows if enough is None else enough
    last = state.step + (room if steps is None else steps)

    def unfinished(state: State) -> jax.Array:
        return (jnp.sum(~state.active(controls)) < enough) & (state.step < last)

    def one_block(state: State) -> State:
        begin = state.length
        state, new = jax.lax.scan(
            lambda state, _: decode_one_token(ref, guide, state, controls, settings), state, length=block
        )
        new = sharding.constrain_rows(jax.tree.map(jnp.transpose, new))  # [B, block]
        return sharding.constrain_rows(state.replace(record=written(state.record, new, begin, state.length)))

    def of_caches(change: Callable[[KVCache], KVCache], state: State) -> State:
        return state.replace(ref_cache=change(state.ref_cache), guide_cache=kv_cache.each(change, state.guide_cache))

    squeeze = rows == 1 and jax.sharding.get_abstract_mesh().empty  # the caches of a single row on one device
    state = of_caches(cpu_form.without_rows, state) if squeeze else state
    state = jax.lax.while_loop(unfinished, one_block, state)
    return of_caches(cpu_form.with_rows, state) if squeeze else state


def written(record: Record, new: Record, begin: jax.Array, end: jax.Array) -> Record:
    """Write a block's results [B, block] to the columns begin .. end - 1 [B] of each row's record [B, N].

    Rows of a continuous batch began at different steps, so each has columns of its own.
    """
    columns = jnp.arange(record.token.shape[1])
    step = jnp.clip(columns - begin[:, None], 0, new.token.shape[1] - 1)  # [B, N]
    of_block = (begin[:, None] <= columns) & (columns < end[:, None])
    return jax.tree.map(
        lambda kept, block: jnp.where(of_block, jnp.take_along_axis(block, step, axis=1), kept), record, new
    )
