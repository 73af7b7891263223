"""The static key-value cache of decoding: one buffer a layer, one write index for all rows.

Shapes: B batch, S positions of the buffer, Q tokens of a step, H heads, G kv heads, E head_dim.
A row's sequence lies in positions `start[row] .. index - 1`: prompts are placed to end where the others end, so that
every row writes at the same index and a step's write is one `dynamic_update_slice`. Of a model it knows the shape.
"""

import chex
import flax.struct
import jax
import jax.numpy as jnp

from qsharp_jax.models.config import DecoderConfig


@flax.struct.dataclass
class KVCache:
    """Attributes:
    keys, values: a [B, G, S, E] buffer a layer.
    start: [B] int32, position of each row's first token.
    index: int32 scalar, the next position to be written.
    """

    keys: list[jax.Array]
    values: list[jax.Array]
    start: jax.Array
    index: jax.Array


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


def write(buffer: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """`buffer` [B, G, S, E] with `new` [B, 1, G, E] at position `index` of every row."""
    return jax.lax.dynamic_update_slice(buffer, new.swapaxes(1, 2).astype(buffer.dtype), (0, 0, index, 0))


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    index: jax.Array,
) -> jax.Array:
    """Attention of one step's tokens over the cache, under the tree mask of guided decoding.

    Token 0 is the pending one, whose key and value are already in the cache at `index`. Tokens 1.. are candidates for
    the position after it: each sees the cache, the pending token and itself, not the other candidates.

    Args:
      query: [B, Q, H, E].
      key, value: [B, Q, G, E] of the step's tokens.
      keys, values: [B, G, S, E] buffers, written up to and including `index`.
      start: [B], first position of each row.
      index: scalar, the pending token's position.

    Returns:
      [B, Q, H, E] in the query's dtype; scores and weights are float32.
    """
    batch, tokens, heads, width = query.shape
    groups, size = keys.shape[1], keys.shape[2]
    chex.assert_shape([key, value], (batch, tokens, groups, width))
    chex.assert_shape([keys, values], (batch, groups, size, width))
    chex.assert_shape(start, (batch,))

    # h: the query heads that share a kv head.
    query = query.reshape(batch, tokens, groups, heads // groups, width) * width**-0.5
    scores = jnp.einsum("bqghe,bgse->bghqs", query, keys, preferred_element_type=jnp.float32)
    positions = jnp.arange(size)
    seen = (positions >= start[:, None]) & (positions <= index)  # [B, S]
    scores = jnp.where(seen[:, None, None, None], scores, -jnp.inf)
    if tokens == 1:
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        attention = jnp.einsum("bghqs,bgse->bqghe", weights, values)
    else:
        own = jnp.einsum("bqghe,bqge->bghq", query, key, preferred_element_type=jnp.float32)
        own = jnp.where(jnp.arange(tokens) > 0, own, -jnp.inf)  # the pending token finds itself in the cache
        weights = jax.nn.softmax(jnp.concatenate([scores, own[..., None]], axis=-1), axis=-1).astype(values.dtype)
        attention = jnp.einsum("bghqs,bgse->bqghe", weights[..., :-1], values)
        attention += jnp.einsum("bghq,bqge->bqghe", weights[..., -1], value)
    return attention.reshape(batch, tokens, heads, width).astype(query.dtype)
