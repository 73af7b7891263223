"""The static key-value cache of decoding: one buffer per layer, one write index for all rows.

Shapes: B batch, S positions of the buffer, Q tokens of a step, H heads, G kv heads, E head_dim; U prompts that rows
share, W positions of these.
A row's sequence is at positions `start[row] .. index - 1`. All prompts end at the same position, so every row writes at
the same index, and a step's write is one `dynamic_update_slice`. In a ring, position p is in slot p % S: the index
grows without end, and `refill` gives a row to another prompt.
Buffers are arrays, or of a model with quantized weights `Quantized`, but on a CPU, which would convert them as a whole.
Rows that continue one prompt may share its keys and values, which a step then reads once for all of them (Juravsky et
al., "Hydragen", arXiv 2402.05099): the first positions of a row's sequence are in `prefix`, the others in its ring.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp

from qsharp_jax.models import cpu_form, quantized, sharding
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.quantized import Weight

VALUE_AXIS = -2  # of the positions in a buffer of values


class Sizes(NamedTuple):
    """Numbers of rows and positions of a cache."""

    rows: int
    positions: int  # of each row's own buffers
    prompts: int = 0  # that rows share, B / U rows each; 0: a row has its prompt in its own buffers
    shared: int = 0  # positions of each of these


class Part(NamedTuple):
    """Attention of N queries of each kv head over some of the positions, before the division by the sum of weights."""

    mixed: jax.Array  # [B, G, N, E], values summed with the weights exp(score - largest)
    total: jax.Array  # [B, G, N] float32, sum of the weights
    largest: jax.Array  # [B, G, N] float32, the largest score


class KVCache(flax.struct.PyTreeNode):
    """Buffers of keys and values, and the positions that they hold."""

    # keys, values: one [B, G, S, E] buffer per layer; [G, S, E] in a loop over one row, see `cpu_form.without_rows`
    keys: list[Any]
    values: list[Any]
    start: Any  # [B] int32, position of each row's first token
    index: Any  # int32 scalar, the next position to write
    # The prompts that rows share, a cache of U rows, whose row u is of the rows u * B / U and following; or None.
    prefix: Any = None
    # positions wrap around at S, the longest a row may be
    ring: bool = flax.struct.field(pytree_node=False, default=False)
    # the buffers of keys are [B, G, E, S], see `cpu_form.positions_last`
    positions_last: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def slot(self) -> jax.Array:
        """The place of position `index` in the buffers."""
        return self.index % self.size if self.ring else self.index

    @property
    def size(self) -> int:
        """Positions of the buffers."""
        return self.values[0].shape[VALUE_AXIS]

    @property
    def layers(self) -> list[tuple[Any, Any]]:
        """Each layer's buffers of keys and values."""
        return list(zip(self.keys, self.values, strict=True))

    @property
    def prefix_layers(self) -> list[Any]:
        """Each layer's buffers of `prefix`; None where there is none."""
        return [None] * len(self.keys) if self.prefix is None else self.prefix.layers

    @property
    def own(self) -> jax.Array:
        """[B], the first position of each row that is in its own buffers."""
        if self.prefix is None:
            return self.start
        lengths = self.prefix.index - self.prefix.start
        return self.start + jnp.repeat(lengths, len(self.start) // len(lengths))

    @property
    def axes(self) -> tuple[int, int]:
        """The axis of the positions in the buffers of keys, and in those of values."""
        return -1 if self.positions_last else VALUE_AXIS, VALUE_AXIS


def is_int8(config: DecoderConfig, *, on_cpu: bool) -> bool:
    """Return true if a model's keys and values are stored in 8 bits: where they are rounded, but on a CPU."""
    return config.quantize != "none" and not on_cpu


def from_prefill(
    prompt_kv: list[tuple[jax.Array, jax.Array]],
    start: jax.Array,
    size: int,
    *,
    positions_last: bool = False,
    int8: bool = False,
) -> KVCache:
    """A cache of `size` positions from the prompts' keys and values, a ([B, T, G, E], [B, T, G, E]) pair per layer."""
    keys, values = zip(*prompt_kv, strict=True)
    length = keys[0].shape[1]
    cache = KVCache(
        keys=[], values=[], start=start, index=jnp.asarray(length, jnp.int32), positions_last=positions_last
    )

    def buffer(prompt: jax.Array, axis: int) -> Weight:
        stored = quantized.in_8_bits(prompt) if int8 else prompt
        return jax.tree.map(lambda x: _pad(jnp.moveaxis(x, 1, axis), 0, size - length, axis), stored)

    key_axis, value_axis = cache.axes
    return cache.replace(
        keys=[buffer(key, key_axis) for key in keys], values=[buffer(value, value_axis) for value in values]
    )


def _pad(x: jax.Array, before: int, after: int, axis: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return jnp.pad(x, widths)


def abstract(config: DecoderConfig, sizes: Sizes, *, positions_last: bool = False, int8: bool = False) -> KVCache:
    """The cache of a decoder as `jax.ShapeDtypeStruct`s; a ring if rows share prompts.

    Args:
      int8: store keys and values in 8 bits; never with the positions of keys last.
    """
    shape = (sizes.rows, config.kv_heads, sizes.positions, config.head_dim)
    value: Any = jax.ShapeDtypeStruct(shape, config.compute_dtype)
    key = jax.ShapeDtypeStruct((*shape[:2], *shape[:1:-1]), config.compute_dtype) if positions_last else value
    if int8:
        key = value = jax.eval_shape(quantized.in_8_bits, value)
    of_prompts = Sizes(sizes.prompts, sizes.shared)
    return KVCache(
        keys=[key] * config.layers,
        values=[value] * config.layers,
        start=jax.ShapeDtypeStruct((sizes.rows,), jnp.int32),
        index=jax.ShapeDtypeStruct((), jnp.int32),
        prefix=abstract(config, of_prompts, positions_last=positions_last, int8=int8) if sizes.prompts else None,
        ring=sizes.prompts > 0,
        positions_last=positions_last,
    )


def empty(config: DecoderConfig, sizes: Sizes, *, positions_last: bool = False, int8: bool = False) -> KVCache:
    """A cache in which no row has a sequence yet; prompts that are to be shared end at the end of their buffers."""
    shapes = abstract(config, sizes, positions_last=positions_last, int8=int8)
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    if cache.prefix is None:
        return cache
    end = jnp.full_like(cache.index, sizes.shared)
    return cache.replace(prefix=cache.prefix.replace(index=end, start=jnp.full_like(cache.prefix.start, end)))


def sharing(prompts: KVCache, rows: int, size: int, *, positions_last: bool) -> KVCache:
    """A ring of `rows` rows with `size` positions of their own, which share the prompts of a cache, next to each other.

    `positions_last` is of their own buffers.
    """
    values = jax.tree.map(
        lambda leaf: jnp.zeros((rows, *leaf.shape[1:-2], size, leaf.shape[-1]), leaf.dtype), prompts.values
    )
    return prompts.replace(
        keys=[value.swapaxes(-1, -2) for value in values] if positions_last else values,
        values=values,
        start=jnp.repeat(prompts.start, rows // len(prompts.start)),
        prefix=prompts,
        ring=True,
        positions_last=positions_last,
    )


def refill(cache: KVCache, prompts: KVCache, source: jax.Array, begins: jax.Array) -> KVCache:
    """Give some rows of a ring new prompts, which end at the current position.

    A row is written as a whole; what it holds besides the prompt is never read. Where rows share prompts, it is these
    that are replaced, and rows that begin have nothing of their own.

    Args:
      cache: the ring, of S positions.
      prompts: a cache of prompts and W positions, of which those before the last S are not read.
      source: [B], the index of the row's new prompt, or [U] of the shared ones'; -1 for one that stays.
      begins: [B] bool, the rows that begin with their prompt.
    """
    chex.assert_shape(begins, cache.start.shape)
    if cache.prefix is not None:
        prefix = refill(cache.prefix, prompts, source, source >= 0)
        cache = cache.replace(prefix=prefix)
        start = cache.index - (cache.own - cache.start)
        return cache.replace(start=jnp.where(begins, start, cache.start))
    size, width = cache.size, prompts.size
    first = max(width - size, 0)  # position of the prompts' that is read first
    axes_of_prompts = prompts.axes
    chex.assert_shape(source, cache.start.shape)

    def write_rows(buffers, prompts, source, offset):
        rows = jnp.argsort(source < 0)  # rows with a new prompt come first

        def write_row(count, buffers):
            row = rows[count]

            def write(buffer, prompts, axis, axis_of_prompts):
                new = jax.lax.dynamic_slice_in_dim(prompts, source[row], 1)
                new = jnp.moveaxis(new, axis_of_prompts, axis)
                new = jax.lax.slice_in_dim(new, first, width, axis=axis)
                new = jnp.roll(_pad(new, 0, max(size - width, 0), axis), offset, axis)
                return jax.lax.dynamic_update_slice_in_dim(buffer, new, row, 0)

            return tuple(
                jax.tree.map(lambda *pair, axes=axes: write(*pair, *axes), old, new)
                for old, new, *axes in zip(buffers, prompts, cache.axes, axes_of_prompts, strict=True)
            )

        return jax.lax.fori_loop(0, jnp.sum(source >= 0), write_row, buffers)

    # Each device writes its own rows; devices differ in how many they write.
    write_rows = sharding.on_each_device(
        write_rows, sharding.CACHE, (None, *sharding.CACHE[1:]), sharding.CACHE[:1], ()
    )
    offset = (cache.index - prompts.index + first) % size
    keys, values = write_rows((cache.keys, cache.values), (prompts.keys, prompts.values), source, offset)
    start = cache.index - (prompts.index - prompts.start[source])
    return cache.replace(keys=keys, values=values, start=jnp.where(begins, start, cache.start))


def rewind(cache: KVCache, kept: jax.Array) -> KVCache:
    """Shorten some rows of a ring: what is kept ends at the current position.

    Args:
      kept: [B], the number of positions that a row keeps from its start on; -1 for a row that stays.
    """
    chex.assert_shape(kept, cache.start.shape)
    by = jnp.where(kept < 0, 0, cache.index - cache.start - kept)

    def move_rows(buffers: tuple, by: jax.Array) -> tuple:
        rows = jnp.argsort(by == 0)  # rows that move come first

        def move_row(count: jax.Array, buffers: tuple) -> tuple:
            row = rows[count]

            def move(buffer: jax.Array, axis: int) -> jax.Array:
                old = jax.lax.dynamic_slice_in_dim(buffer, row, 1)
                return jax.lax.dynamic_update_slice_in_dim(buffer, jnp.roll(old, by[row], axis), row, 0)

            return tuple(
                jax.tree.map(lambda buffer, axis=axis: move(buffer, axis), old)
                for old, axis in zip(buffers, cache.axes, strict=True)
            )

        return jax.lax.fori_loop(0, jnp.sum(by > 0), move_row, buffers)

    # Each device moves its own rows; devices differ in how many they move.
    move_rows = sharding.on_each_device(move_rows, sharding.CACHE, sharding.CACHE[:1])
    keys, values = move_rows((cache.keys, cache.values), by)
    return cache.replace(keys=keys, values=values, start=cache.start + by)


def without_ended(cache: KVCache, active: jax.Array) -> KVCache:
    """The cache in which rows that are not active, [B] bool, hold no positions: none are read for them.

    Nor are prompts that no active row shares.
    """
    cache = cache.replace(start=jnp.where(active, cache.start, cache.index))
    if cache.prefix is None:
        return cache
    of_prompts = active.reshape(len(cache.prefix.start), -1).any(1)
    return cache.replace(prefix=without_ended(cache.prefix, of_prompts))


def with_starts(cache: KVCache, before: KVCache) -> KVCache:
    """The cache after a step in which some rows had none, with all rows' positions again."""
    return cache.replace(start=before.start, prefix=before.prefix)


def each(change: Callable[..., Any], *caches: Any) -> Any:
    """Apply `change` to a cache, to each of a tuple of caches, or to none (None)."""
    return jax.tree.map(change, *caches, is_leaf=lambda x: isinstance(x, KVCache))


def write_pair(
    buffers: tuple[Weight, Weight],
    new: tuple[jax.Array, jax.Array],
    index: jax.Array,
    axes: tuple[int, int] = (VALUE_AXIS, VALUE_AXIS),
) -> tuple[Weight, Weight]:
    """Write [B, T, G, E] keys and values at positions `index` .. of every row; axes as in `KVCache.axes`."""
    if quantized.is_quantized(buffers[0]):
        stored = quantized.in_8_bits(jnp.stack(new))
        new = stored[0], stored[1]
    keys, values = (write(buffer, pair, index, axis) for buffer, pair, axis in zip(buffers, new, axes, strict=True))
    return keys, values


def write(buffer: Weight, new: Weight, index: jax.Array, axis: int = VALUE_AXIS) -> Weight:
    """Write `new` [B, T, G, E] at positions `index` .. of every row; the buffer may lack the dimension of rows."""

    def write_leaf(leaf: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.moveaxis(new, 1, axis).astype(leaf.dtype)
        return jax.lax.dynamic_update_slice_in_dim(leaf, new.reshape(new.shape[-leaf.ndim :]), index, axis)

    return jax.tree.map(write_leaf, buffer, new)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: Weight,
    values: Weight,
    start: jax.Array,
    index: jax.Array,
    ring: bool = False,
    positions_last: bool = False,
    window: int = 0,
    prefix: Part | None = None,
) -> jax.Array:
    """Attention of one step's tokens over the cache, under the tree mask of guided decoding.

    Token 0 is the pending one; the buffers may or may not hold its key and value already. Tokens 1.. are candidates for
    the position after it: each sees the cache, the pending token and itself, but no other candidate.

    Args:
      query: [B, Q, H, E].
      key, value: [B, Q, G, E] of the step's tokens.
      keys, values: the buffers, as in `KVCache`; their positions before `index` are read.
      start: [B], first position of each row in the buffers.
      index: scalar, the pending token's position.
      window: the number of tokens that each sees, its own included; 0: all.
      prefix: attention over what comes before, of the queries in the order of N = H/G * Q.

    Returns:
      [B, Q, H, E] in the query's dtype; scores and weights are float32.
    """
    batch, tokens, heads, width = query.shape
    dtype = query.dtype
    if keys.ndim == 3:
        keys, values = keys[None], values[None]
    groups, size = values.shape[1], values.shape[2]
    chex.assert_shape([key, value], (batch, tokens, groups, width))
    chex.assert_shape(keys, (batch, groups, *((width, size) if positions_last else (size, width))))
    chex.assert_shape(values, (batch, groups, size, width))
    chex.assert_shape(start, (batch,))

    # The query heads that share a kv head, times the tokens, are the rows N = H/G * Q of one product with the cache.
    shared = heads // groups

    def rows(x: jax.Array) -> jax.Array:
        """[B, Q, G, H/G, E] -> [B, G, N, E]."""
        return x.transpose(0, 2, 3, 1, 4).reshape(batch, groups, shared * tokens, width)

    def repeat(x: jax.Array) -> jax.Array:
        """[B, Q, G, E] -> [B, G, N, E]."""
        return rows(jnp.broadcast_to(x[:, :, :, None], (batch, tokens, groups, shared, width)))

    # Scores are scaled in float32, as over a whole prompt. A float32 query is scaled in their place: it is smaller.
    of_query, of_scores = (width**-0.5, 1.0) if dtype == jnp.float32 else (1.0, width**-0.5)
    query = rows((query * of_query).reshape(batch, tokens, groups, shared, width))
    if positions_last:
        scores = of_scores * cpu_form.product_with_buffer("bgne,bges->bgns", query, keys)
    else:
        scores = of_scores * quantized.scores("bgne,bgse->bgns", query, keys)
    positions = jnp.arange(size)
    if ring:
        positions = index - 1 - (index - 1 - positions) % size  # the last one before `index` in each slot
    seen = (positions >= start[:, None]) & (positions < index)  # [B, S]
    scores += jnp.where(seen, 0, -jnp.inf)[:, None, None]
    if window:  # a candidate, one position after the pending token, sees one position less of the cache
        first = index + 1 - window + (jnp.arange(tokens) > 0)  # [Q]
        scores += jnp.where(jnp.tile(positions >= first[:, None], (shared, 1)), 0, -jnp.inf)
    pending = of_scores * jnp.einsum("bgne,bge->bgn", query, key[:, 0], preferred_element_type=jnp.float32)
    own = of_scores * jnp.einsum("bgne,bgne->bgn", query, repeat(key), preferred_element_type=jnp.float32)
    own = jnp.where(jnp.tile(jnp.arange(tokens) > 0, shared), own, -jnp.inf)  # token 0's is `pending`

    # Softmax over all parts; the division comes last, on [B, G, N, E] rather than [B, G, N, S].
    largest = jnp.maximum(jnp.maximum(scores.max(-1), pending), own)
    if prefix is not None:
        largest = jnp.maximum(largest, prefix.largest)
    scores, pending, own = jnp.exp(scores - largest[..., None]), jnp.exp(pending - largest), jnp.exp(own - largest)
    total = scores.sum(-1) + pending + own
    if positions_last:
        attention = cpu_form.product_with_buffer("bgns,bgse->bgne", scores.astype(value.dtype), values)
    else:
        attention = quantized.mixed("bgns,bgse->bgne", scores, values, value.dtype)
    attention += pending[..., None] * value[:, 0, :, None] + own[..., None] * repeat(value)
    if prefix is not None:
        weight = jnp.exp(prefix.largest - largest)
        total, attention = total + weight * prefix.total, attention + weight[..., None] * prefix.mixed
    attention = (attention / total[..., None]).astype(dtype)
    attention = attention.reshape(batch, groups, shared, tokens, width).transpose(0, 3, 1, 2, 4)
    return attention.reshape(batch, tokens, heads, width)
