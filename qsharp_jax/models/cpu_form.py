"""Forms of weights, caches and attention that are faster on a CPU.

- Weights as [out, in], the left factor of each product.
- Caches with the keys' positions last for several rows, and without the dimension of rows for one row.
- Attention over whole sequences in blocks of queries.

Shapes: B batch, T length, H heads, G kv heads, R query heads per kv head, E head_dim.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qsharp_jax.models import memory, quantized
from qsharp_jax.models.config import DecoderConfig

QUERY_BLOCK = 128  # within the masked half of the scores, a block computes only its own triangle
_MASKED = -1e30  # as a score; -inf would make a fully masked row nan


def here() -> bool:
    """Return true if models are decoded in this form on the default device."""
    return memory.default_device().platform == "cpu"


# --- Weights --------------------------------------------------------------------------------------------------------


def transpose(params: Mapping[str, Any]) -> dict[str, Any]:
    """Replace each layer's "kernel" [in, out] by "weight" [out, in], and "head" by "head_weight" [V, D].

    Args:
      params: of a decoder, layers as a list.
    """

    def module(leaves: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "weight" if name == "kernel" else name: leaf.T if name == "kernel" else leaf
            for name, leaf in leaves.items()
        }

    transposed = {name: leaf for name, leaf in params.items() if name != "head"}
    if "head" in params:
        transposed["head_weight"] = params["head"].T
    transposed["layers"] = [{name: module(leaves) for name, leaves in layer.items()} for layer in params["layers"]]
    return transposed


def is_transposed(params: Mapping[str, Any]) -> bool:
    """Return true if a decoder's weights are in the form of `transpose`."""
    return isinstance(params.get("layers"), list) and "weight" in params["layers"][0]["output"]


def product(weight: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """[..., out] from a weight [out, in] and x [..., in].

    XLA's CPU library multiplies a few rows by a matrix about twice as fast with the matrix on the left as with the
    matrix on the right, in either orientation.
    """
    y = jax.lax.dot_general(weight, x, (((1,), (x.ndim - 1,)), ((), ())), preferred_element_type=dtype)
    return jnp.moveaxis(y, 0, -1)


def dequantized_copies(params: Mapping[str, Any], config: DecoderConfig) -> list[jax.ShapeDtypeStruct]:
    """The copies of quantized weights that XLA makes on a CPU before a program multiplies with them, all at once.

    They are float32 even where the computation is in bfloat16. Experts, and rows of an embedding that is not the head,
    are dequantized one by one.

    Args:
      params: of a decoder or a value model, in any form.
      config: of its decoder.
    """
    others = {"experts"} if config.tied and "trunk" not in params else {"experts", "embedding"}
    leaves = jax.tree.leaves_with_path(params, is_leaf=quantized.is_quantized)
    return [
        jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.values.sharding)
        for path, leaf in leaves
        if quantized.is_quantized(leaf) and others.isdisjoint(getattr(key, "key", None) for key in path)
    ]


# --- Caches ---------------------------------------------------------------------------------------------------------


def positions_last(params: Mapping[str, Any], rows: int) -> bool:
    """Return true if caches of so many rows should keep the keys' positions last; with one row that is far slower."""
    return is_transposed(params) and rows > 1


def product_with_buffer(subscripts: str, x: jax.Array, buffer: jax.Array) -> jax.Array:
    """The product of x [B, G, N, C] and a buffer [B, G, C, ...], float32 [B, G, N, ...], with `jnp.einsum` subscripts.

    For one query it is written as a sum: XLA's CPU library parallelizes sums and products of matrices over the cores,
    but not products with a vector.
    """
    if x.shape[2] == 1:
        return (x.swapaxes(2, 3).astype(jnp.float32) * buffer).sum(2, keepdims=True)
    return jnp.einsum(subscripts, x, buffer, preferred_element_type=jnp.float32)


def without_rows(cache: Any) -> Any:
    """The `KVCache` of one row with buffers [G, S, E], which a CPU updates in place.

    XLA drops a dimension of 1 from the products that read a buffer but not from the write, treats the two as different
    arrays, and would copy each buffer twice per step.
    """
    keys, values = jax.tree.map(lambda leaf: leaf[0], (cache.keys, cache.values))
    return cache.replace(keys=keys, values=values)


def with_rows(cache: Any) -> Any:
    """The inverse of `without_rows`."""
    keys, values = jax.tree.map(lambda leaf: leaf[None], (cache.keys, cache.values))
    return cache.replace(keys=keys, values=values)


# --- Attention in blocks of queries ---------------------------------------------------------------------------------


def attention(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, window: Any = 0) -> jax.Array:
    """Causal attention of query [B, T, H, E] to key and value [B, T, G, E] within segments [B, T]: [B, T, H, E].

    `window` is as in `attention.Attend`.
    """
    batch, length, heads, size = query.shape
    kv_heads = key.shape[2]
    query = (query * size**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [B, G, T, E]
    attended = []
    # Split rather than sliced: the gradient puts the blocks' side by side, and adds no arrays of the whole's size.
    for number, block in enumerate(jnp.split(query, list(range(QUERY_BLOCK, length, QUERY_BLOCK)), axis=3)):
        begin, end = number * QUERY_BLOCK, number * QUERY_BLOCK + block.shape[3]
        causal = jnp.arange(begin, end)[:, None] >= jnp.arange(end)
        if not isinstance(window, int) or window:
            causal &= jnp.arange(begin, end)[:, None] - jnp.arange(end) < window
        mask = causal & (segments[:, begin:end, None] == segments[:, None, :end])
        attended.append(_block(block, key[:, :, :end], value[:, :, :end], mask))
    return jnp.concatenate(attended, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


@jax.custom_vjp
def _block(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of scaled queries [B, G, R, N, E] to keys [B, G, S, E] under a mask [B, N, S].

    The explicit gradient saves only the exponentials at the scores' size, and divides arrays of the queries' size.
    """
    return _block_forward(query, key, value, mask)[0]


def _block_forward(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> tuple:
    # Products of matrices [R N, ...]: over R and N apart, XLA would first transpose arrays of the scores' size.
    rows = query.reshape(*query.shape[:2], -1, query.shape[-1])  # [B, G, R N, E]
    scores = jnp.einsum("bgme,bgse->bgms", rows, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(*query.shape[:4], -1)
    scores = jnp.where(mask[:, None, None], scores, _MASKED).reshape(*rows.shape[:3], -1)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    # The barrier keeps XLA from fusing the exponentials into each user, which would compute them again.
    weights, total = jax.lax.optimization_barrier((weights.astype(value.dtype), weights.sum(-1, keepdims=True)))
    mixed = jnp.einsum("bgms,bgse->bgme", weights, value, preferred_element_type=jnp.float32)
    attention = (mixed / total).astype(query.dtype)
    return attention.reshape(query.shape), (rows, key, value, weights, total, attention)


def _block_backward(saved: tuple, cotangent: jax.Array) -> tuple:
    rows, key, value, weights, total, attention = saved
    divided = (cotangent.reshape(rows.shape) / total).astype(value.dtype)
    mean = (divided.astype(jnp.float32) * attention).sum(-1, keepdims=True)
    value_cotangent = jnp.einsum("bgms,bgme->bgse", weights, divided)
    difference = jnp.einsum("bgme,bgse->bgms", divided, value, preferred_element_type=jnp.float32) - mean
    score_cotangent = jax.lax.optimization_barrier((weights * difference).astype(rows.dtype))
    query_cotangent = jnp.einsum("bgms,bgse->bgme", score_cotangent, key).reshape(cotangent.shape)
    key_cotangent = jnp.einsum("bgms,bgme->bgse", score_cotangent, rows)
    return query_cotangent, key_cotangent, value_cotangent, None


_block.defvjp(_block_forward, _block_backward)
