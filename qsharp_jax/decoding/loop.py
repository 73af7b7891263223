"""The two compiled programs of decoding: `prefill` of the prompts, and `decode`, the loop over steps.

Shapes: B prompts, P their padded length, R rows (B times the samples of each prompt), N new tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from qsharp_jax.decoding.checks import members
from qsharp_jax.decoding.state import Controls, Guide, Record, Settings, State
from qsharp_jax.decoding.step import decode_one_token
from qsharp_jax.models import attention, cpu_form, decoder, kv_cache, precision, sharding, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import KVCache, Sizes

BLOCK = 8  # steps between two checks whether every row has ended


@functools.partial(jax.jit, static_argnames=("config", "size", "samples", "chunk"))
def prefill(
    params: Any,
    config: DecoderConfig,
    tokens: jax.Array,
    start: jax.Array,
    *,
    size: int,
    samples: int = 1,
    chunk: int = attention.CHUNK,
) -> KVCache:
    """Fill a cache with left-padded prompts, whose last tokens are the loop's first pending ones: no logits are needed.

    Prompts longer than `chunk` go through the model in chunks, each attending to the cache so far: beside the cache,
    memory does not depend on their length. Chunks in which no prompt has begun are left out.

    Args:
      params: a decoder's parameters, in either form.
      config: its `DecoderConfig`.
      tokens: [B, P - 1], the prompts without their last token.
      start: [B], position of each prompt's first token.
      size: positions of the cache.
      samples: rows of the cache for each prompt; a prompt goes through the model once for all of them.
      chunk: tokens of each prompt that go through the model at once.
    """
    chex.assert_rank(tokens, 2)
    chex.assert_shape(start, (tokens.shape[0],))
    positions = jnp.arange(tokens.shape[1]) - start[:, None]
    segments, positions = (positions >= 0).astype(jnp.int32), jnp.maximum(positions, 0)
    last = cpu_form.positions_last(params, len(start) * samples)
    if tokens.shape[1] > chunk:
        with precision.of(config.dtype):
            keys, values = _in_chunks(params, config, tokens, segments, positions, size, chunk, jnp.min(start))
        keys = [key.swapaxes(-1, -2) for key in keys] if last else keys
        keys, values, start = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), (keys, values, start))
        cache = KVCache(keys, values, start, index=jnp.asarray(tokens.shape[1], jnp.int32), positions_last=last)
        return sharding.constrain_rows(cache)
    with precision.of(config.dtype):
        _, kept = decoder.forward(params, config, tokens, segments, positions, keep_kv=True)
    if not isinstance(kept, list):
        kept = [(kept[0][layer], kept[1][layer]) for layer in range(config.layers)]
    kept, start = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), (kept, start))
    cache = kv_cache.from_prefill(kept, start, size, positions_last=last, int8=_is_int8(params, config))
    return sharding.constrain_rows(cache)


def _in_chunks(
    params: Any,
    config: DecoderConfig,
    tokens: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    size: int,
    chunk: int,
    first: jax.Array,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Buffers of keys and of values [B, G, S, E] per layer, filled by one program that all chunks run through."""
    params = params if isinstance(params["layers"], list) else decoder.unstack(params)
    cache = kv_cache.empty(config, Sizes(len(tokens), size), int8=_is_int8(params, config))
    cache = sharding.constrain_rows(cache)
    before = decoder.previous_tokens(tokens, segments)
    segments_of_buffer = jnp.pad(segments, ((0, 0), (0, size - segments.shape[1])))

    def step(begin: jax.Array, count: int, buffers: list) -> list:
        tokens_, before_, positions_ = (
            jax.lax.dynamic_slice_in_dim(x, begin, count, 1) for x in (tokens, before, positions)
        )
        return _chunk(params, config, buffers, tokens_, before_, positions_, segments_of_buffer, begin, first)

    buffers = list(zip(cache.keys, cache.values, strict=True))
    buffers = attention.over_chunks(tokens.shape[1], chunk, step, buffers, first)
    keys, values = map(list, zip(*buffers, strict=True))
    return keys, values


def _is_int8(params: Any, config: DecoderConfig) -> bool:
    return kv_cache.is_int8(config, on_cpu=cpu_form.is_transposed(params))


def prefill_rows(params: Any, config: DecoderConfig, tokens: jax.Array, start: jax.Array, sizes: Sizes) -> KVCache:
    """`prefill` into a cache of these sizes, whose rows are the prompts' samples, next to each other."""
    if not sizes.prompts:
        return prefill(params, config, tokens, start, size=sizes.positions, samples=sizes.rows // len(tokens))
    prompts = prefill(params, config, tokens, start, size=sizes.shared, samples=sizes.prompts // len(tokens))
    return _sharing(prompts, sizes, cpu_form.positions_last(params, sizes.rows))


@functools.partial(jax.jit, static_argnames=("sizes", "positions_last"))
def _sharing(prompts: KVCache, sizes: Sizes, positions_last: bool) -> KVCache:
    return sharding.constrain_rows(
        kv_cache.sharing(prompts, sizes.rows, sizes.positions, positions_last=positions_last)
    )


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def prefill_chunk(
    params: Any, config: DecoderConfig, cache: KVCache, tokens: jax.Array, previous: jax.Array
) -> KVCache:
    """Go on with prompts whose beginnings are in a cache: prefill that the host can interrupt.

    Args:
      params: a decoder's parameters, layers as a list.
      cache: with the positions of keys and values in the same place, not a ring.
      tokens: [B, C], for the positions from `cache.index` on; those before a row's start are padding.
      previous: [B], the tokens before them, read by models with `token_shift` only.
    """
    chex.assert_rank([tokens, previous], [2, 1])
    chex.assert_equal_shape_prefix([tokens, previous, cache.start], 1)
    places = cache.index + jnp.arange(tokens.shape[1]) - cache.start[:, None]
    before = jnp.concatenate([previous[:, None], tokens[:, :-1]], axis=1)
    before = jnp.where(places > 0, before, -1)
    segments = (jnp.arange(cache.size) >= cache.start[:, None]).astype(jnp.int32)
    buffers = list(zip(cache.keys, cache.values, strict=True))
    with precision.of(config.dtype):
        buffers = _chunk(params, config, buffers, tokens, before, jnp.maximum(places, 0), segments, cache.index, 0)
    keys, values = map(list, zip(*buffers, strict=True))
    return sharding.constrain_rows(cache.replace(keys=keys, values=values, index=cache.index + tokens.shape[1]))


def _chunk(
    params: Any,
    config: DecoderConfig,
    buffers: list,
    tokens: jax.Array,
    before: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    begin: jax.Array,
    start: Any,
) -> list:
    """Write keys and values of a chunk [B, C] to each layer's pair of buffers [B, G, S, E], at positions `begin` on.

    Args:
      before: [B, C], the token before each; -1 for none.
      positions: [B, C], of the tokens in their own prompts.
      segments: [B, S], 0 at the buffers' padding.
      start: as in `attention.of_chunk`.
    """
    x = decoder.embed(params, config, tokens, before, positions)
    turns, written = decoder.rotations(positions, config), []
    for layer, kind, pair in zip(params["layers"], config.kinds, buffers, strict=True):

        def attend(query, key, value, pair=pair, window=kind.window):
            pair = kv_cache.write_pair(pair, (key, value), begin)
            return attention.of_chunk(query, *pair, segments, begin, window, start=start), pair

        x = sharding.constrain(x, "stream", None, None)
        x, pair = decoder.block(layer, config, x, turns[kind.rope], attend)
        written.append(pair)
    return written


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
        new = sharding.constrain_rows(jax.tree.map(lambda x: x.swapaxes(0, 1), new))  # [B, block, ...]
        return sharding.constrain_rows(state.replace(record=written(state.record, new, begin, state.length)))

    def of_caches(change: Callable[[KVCache], KVCache], state: State) -> State:
        return state.replace(ref_cache=change(state.ref_cache), guide_cache=kv_cache.each(change, state.guide_cache))

    squeeze = rows == 1 and jax.sharding.get_abstract_mesh().empty  # the caches of a single row on one device
    state = of_caches(cpu_form.without_rows, state) if squeeze else state
    with precision.of(*(value.trunk(model).config.dtype for model in (ref, *members(guide)))):
        state = jax.lax.while_loop(unfinished, one_block, state)
    return of_caches(cpu_form.with_rows, state) if squeeze else state


def written(record: Record, new: Record, begin: jax.Array, end: jax.Array) -> Record:
    """Write a block's results [B, block, ...] to the columns begin .. end - 1 [B] of each row's record [B, N, ...].

    Rows of a continuous batch began at different steps, so each has columns of its own.
    """
    columns = jnp.arange(record.token.shape[1])
    step = jnp.clip(columns - begin[:, None], 0, new.token.shape[1] - 1)  # [B, N]
    of_block = (begin[:, None] <= columns) & (columns < end[:, None])

    def write(kept: jax.Array, block: jax.Array) -> jax.Array:
        inner = (1,) * (kept.ndim - 2)
        moved = jnp.take_along_axis(block, step.reshape(*step.shape, *inner), axis=1)
        return jnp.where(of_block.reshape(*step.shape, *inner), moved, kept)

    return jax.tree.map(write, record, new)
