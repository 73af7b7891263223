"""The static key-value cache of decoding: one buffer a layer, one write index for all rows.

Shapes: B batch, S positions of the buffer, Q tokens of a step, H heads, G kv heads, E head_dim.
A row's sequence lies in positions `start[row] .. index - 1`: prompts are placed to end where the others end, so that
every row writes at the same index and a step's write is one `dynamic_update_slice`. In a ring position p lies in slot
p % S, so that the index goes on for ever, and `refill` gives a row to another prompt. Of a model it knows the shape.
"""

from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp

from qsharp_jax import sharding
from qsharp_jax.models.config import DecoderConfig


@flax.struct.dataclass
class KVCache:
    """Attributes:
    keys, values: a [B, G, S, E] buffer a layer; [G, S, E] within a loop over one row, see `without_rows`.
    start: [B] int32, position of each row's first token.
    index: int32 scalar, the next position to be written.
    ring: positions wrap around at S; a row must not be longer.
    """

    keys: list[jax.Array]
    values: list[jax.Array]
    start: jax.Array
    index: jax.Array
    ring: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def slot(self) -> jax.Array:
        """Where in the buffers position `index` lies."""
        return self.index % self.keys[0].shape[-2] if self.ring else self.index


def from_prefill(kept: list[tuple[jax.Array, jax.Array]], start: jax.Array, size: int) -> KVCache:
    """A cache of `size` positions from the prompts' keys and values, a ([B, T, G, E], [B, T, G, E]) pair a layer."""

    def buffer(prompt: jax.Array) -> jax.Array:
        return jnp.pad(prompt.swapaxes(1, 2), ((0, 0), (0, 0), (0, size - prompt.shape[1]), (0, 0)))

    keys, values = zip(*kept, strict=True)
    length = keys[0].shape[1]
    return KVCache(
        keys=[buffer(key) for key in keys],
        values=[buffer(value) for value in values],
        start=start,
        index=jnp.asarray(length, jnp.int32),
    )


def abstract(config: DecoderConfig, rows: int, size: int) -> KVCache:
    """The cache of a decoder with `size` positions as `jax.ShapeDtypeStruct`s, to count its bytes before it is made."""
    buffer = jax.ShapeDtypeStruct((rows, config.kv_heads, size, config.head_dim), config.compute_dtype)
    return KVCache(
        keys=[buffer] * config.layers,
        values=[buffer] * config.layers,
        start=jax.ShapeDtypeStruct((rows,), jnp.int32),
        index=jax.ShapeDtypeStruct((), jnp.int32),
    )


def empty_ring(config: DecoderConfig, rows: int, size: int) -> KVCache:
    """A ring in which no row has a sequence yet."""
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract(config, rows, size))
    return cache.replace(ring=True)


def refill(cache: KVCache, prompts: KVCache, source: jax.Array) -> KVCache:
    """A ring of which some rows begin anew, with a prompt that ends where the others are.

    A row is written as a whole, for what it held is of no use: what it holds besides the prompt is never seen.

    Args:
      cache: the ring [B, G, S, E].
      prompts: a cache of U prompts [U, G, W, E], each of which ends at its last position and is not longer than S.
      source: [B], the prompt that the row gets; -1: the row goes on.
    """
    size, width = cache.keys[0].shape[-2], prompts.keys[0].shape[-2]
    chex.assert_shape(source, cache.start.shape)

    def write_rows(buffers, prompts, source, index):
        rows = jnp.argsort(source < 0)  # those that get a prompt come first

        def write_row(count, buffers):
            row = rows[count]

            def write(buffer, prompts):
                new = jax.lax.dynamic_slice_in_dim(prompts, source[row], 1)[:, :, -min(size, width) :]
                new = jnp.pad(new, ((0, 0), (0, 0), (size - new.shape[2], 0), (0, 0)))
                return jax.lax.dynamic_update_slice_in_dim(buffer, jnp.roll(new, index % size, axis=2), row, 0)

            return jax.tree.map(write, buffers, prompts)

        return jax.lax.fori_loop(0, jnp.sum(source >= 0), write_row, buffers)

    # Each device writes its own rows, of which it has another number than the others.
    write_rows = sharding.on_each_device(
        write_rows, sharding.CACHE, (None, *sharding.CACHE[1:]), sharding.CACHE[:1], ()
    )
    keys, values = write_rows((cache.keys, cache.values), (prompts.keys, prompts.values), source, cache.index)
    start = cache.index - (width - prompts.start[source])
    return cache.replace(keys=keys, values=values, start=jnp.where(source >= 0, start, cache.start))


def each(change: Callable[..., Any], *caches: Any) -> Any:
    """What `change` makes of a cache; of each of several, as a tuple; and of none, None."""
    return jax.tree.map(change, *caches, is_leaf=lambda x: isinstance(x, KVCache))


def without_rows(cache: KVCache) -> KVCache:
    """The cache of one row as buffers [G, S, E], which a CPU updates in place.

    XLA leaves a dimension of 1 out of the products that read a buffer, not out of the write, and so takes the two for
    different arrays: it copied each buffer twice a step.
    """
    return cache.replace(**{name: [buffer[0] for buffer in getattr(cache, name)] for name in ("keys", "values")})


def with_rows(cache: KVCache) -> KVCache:
    """The inverse of `without_rows`."""
    return cache.replace(**{name: [buffer[None] for buffer in getattr(cache, name)] for name in ("keys", "values")})


def write_pair(
    buffers: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array], index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A layer's keys and values with [B, 1, G, E] of each at position `index` of every row; buffers as in `write`."""
    return tuple(write(buffer, pair, index) for buffer, pair in zip(buffers, new, strict=True))


def write(buffer: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """`buffer` [B, G, S, E] (or [G, S, E] of one row) with `new` [B, 1, G, E] at position `index` of every row."""
    new = new.swapaxes(1, 2).astype(buffer.dtype).reshape(*buffer.shape[:-2], 1, buffer.shape[-1])
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, index, -2)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    index: jax.Array,
    ring: bool = False,
) -> jax.Array:
    """Attention of one step's tokens over the cache, under the tree mask of guided decoding.

    Token 0 is the pending one; the buffers may hold its key and value already or not. Tokens 1.. are
    candidates for the position after it: each sees the cache, the pending token and itself, not the other candidates.

    Args:
      query: [B, Q, H, E].
      key, value: [B, Q, G, E] of the step's tokens.
      keys, values: [B, G, S, E] buffers (or [G, S, E] of one row), of which the positions before `index` are read.
      start: [B], first position of each row.
      index: scalar, the pending token's position.
      ring: whether the buffers are, see `KVCache`.

    Returns:
      [B, Q, H, E] in the query's dtype; scores and weights are float32.
    """
    batch, tokens, heads, width = query.shape
    dtype = query.dtype
    if keys.ndim == 3:
        keys, values = keys[None], values[None]
    groups, size = keys.shape[1], keys.shape[2]
    chex.assert_shape([key, value], (batch, tokens, groups, width))
    chex.assert_shape([keys, values], (batch, groups, size, width))
    chex.assert_shape(start, (batch,))

    # The query heads that share a kv head, and the tokens, are the rows N = H/G * Q of one product with the cache.
    shared = heads // groups

    def rows(x: jax.Array) -> jax.Array:
        """[B, Q, G, H/G, E] -> [B, G, N, E]."""
        return x.transpose(0, 2, 3, 1, 4).reshape(batch, groups, shared * tokens, width)

    def repeat(x: jax.Array) -> jax.Array:
        """[B, Q, G, E] -> [B, G, N, E]."""
        return rows(jnp.broadcast_to(x[:, :, :, None], (batch, tokens, groups, shared, width)))

    query = rows((query * width**-0.5).reshape(batch, tokens, groups, shared, width))
    scores = jnp.einsum("bgne,bgse->bgns", query, keys, preferred_element_type=jnp.float32)
    positions = jnp.arange(size)
    if ring:
        positions = index - 1 - (index - 1 - positions) % size  # the last before `index` that lies in the slot
    seen = (positions >= start[:, None]) & (positions < index)  # [B, S]
    scores += jnp.where(seen, 0, -jnp.inf)[:, None, None]
    pending = jnp.einsum("bgne,bge->bgn", query, key[:, 0], preferred_element_type=jnp.float32)
    own = jnp.einsum("bgne,bgne->bgn", query, repeat(key), preferred_element_type=jnp.float32)
    own = jnp.where(jnp.tile(jnp.arange(tokens) > 0, shared), own, -jnp.inf)  # that of token 0 is `pending`

    # The softmax over the three parts; its division comes last, on [B, G, N, E] in place of [B, G, N, S].
    largest = jnp.maximum(jnp.maximum(scores.max(-1), pending), own)
    scores, pending, own = jnp.exp(scores - largest[..., None]), jnp.exp(pending - largest), jnp.exp(own - largest)
    total = scores.sum(-1) + pending + own
    attention = jnp.einsum("bgns,bgse->bgne", scores.astype(values.dtype), values, preferred_element_type=jnp.float32)
    attention += pending[..., None] * value[:, 0, :, None] + own[..., None] * repeat(value)
    attention = (attention / total[..., None]).astype(dtype)
    attention = attention.reshape(batch, groups, shared, tokens, width).transpose(0, 3, 1, 2, 4)
    return attention.reshape(batch, tokens, heads, width)
