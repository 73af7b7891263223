"""Causal attention within the segments of whole sequences, by the implementation that suits the device.

Shapes: B batch, T length, H heads, G kv heads, E head_dim. It knows nothing about weights or caches.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from qsharp_jax.models import sharding

Attention = Literal["xla", "blocks", "cudnn", "splash"]
# of query [B, T, H, E], key and value [B, T, G, E] -> [B, T, H, E]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

QUERY_BLOCK = 128  # queries of "blocks": of the masked half of the scores, a block's own triangle is computed
SPLASH_TILES = (512, 256, 128)  # the longest that divides the length is taken
_MASKED = -1e30  # as a score; -inf would make a row in which all is masked a nan


def make(implementation: Attention, segments: jax.Array, *, packed: bool = True) -> Attend:
    """Attention for a batch of sequences; what it gives at padding is not to be used.

    Args:
      implementation: "xla": `jax.nn.dot_product_attention`, which keeps scores [B, H, T, T]; "blocks": for CPUs,
        queries in blocks, each with the keys up to its end; "cudnn": NVIDIA's flash attention, bfloat16 only;
        "splash": the TPU's, for lengths that 128 divides.
      segments: [B, T], 0 at padding; tokens attend within their own segment only.
      packed: whether a row may have several segments. Where it has one, with the padding behind it, causality alone
        keeps real tokens from others, and cuDNN then needs no mask of [B, 1, T, T].
    """
    if implementation == "blocks":
        return lambda query, key, value: _blocks(query, key, value, segments)
    if implementation == "splash":
        return lambda query, key, value: _splash(query, key, value, segments)
    if implementation == "cudnn":
        same = (segments[:, None, :, None] == segments[:, None, None, :]) if packed else None
        return lambda query, key, value: jax.nn.dot_product_attention(
            query, key, value, mask=same, is_causal=True, implementation="cudnn"
        )
    length = segments.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    mask = causal & (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    return lambda query, key, value: jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])


# --- Blocks of queries ----------------------------------------------------------------------------------------------


def _blocks(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    batch, length, heads, size = query.shape
    kv_heads = key.shape[2]
    query = (query * size**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [B, G, T, E]
    found = []
    for begin in range(0, length, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, length)
        seen = jnp.arange(begin, end)[:, None] >= jnp.arange(end)
        mask = seen & (segments[:, begin:end, None] == segments[:, None, :end])
        found.append(_block(query[:, :, :, begin:end], key[:, :, :end], value[:, :, :end], mask))
    return jnp.concatenate(found, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


@jax.custom_vjp
def _block(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of scaled queries [B, G, R, N, E] to keys [B, G, S, E] under a mask [B, N, S].

    Its gradient is written out: of the scores' size, only the exponentials are kept for it, and the division is left
    to arrays of the queries' size.
    """
    return _block_forward(query, key, value, mask)[0]


def _block_forward(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> tuple:
    scores = jnp.einsum("bgrne,bgse->bgrns", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    # Kept as an array: fused into its users, each would compute the exponentials again.
    weights, total = jax.lax.optimization_barrier((weights.astype(value.dtype), weights.sum(-1, keepdims=True)))
    mixed = jnp.einsum("bgrns,bgse->bgrne", weights, value, preferred_element_type=jnp.float32)
    attention = (mixed / total).astype(query.dtype)
    return attention, (query, key, value, weights, total, attention)


def _block_backward(kept: tuple, cotangent: jax.Array) -> tuple:
    query, key, value, weights, total, attention = kept
    divided = (cotangent / total).astype(value.dtype)
    mean = (divided.astype(jnp.float32) * attention).sum(-1, keepdims=True)
    value_cotangent = jnp.einsum("bgrns,bgrne->bgse", weights, divided)
    difference = jnp.einsum("bgrne,bgse->bgrns", divided, value, preferred_element_type=jnp.float32) - mean
    score_cotangent = jax.lax.optimization_barrier((weights * difference).astype(query.dtype))
    query_cotangent = jnp.einsum("bgrns,bgse->bgrne", score_cotangent, key)
    key_cotangent = jnp.einsum("bgrns,bgrne->bgse", score_cotangent, query)
    return query_cotangent, key_cotangent, value_cotangent, None


_block.defvjp(_block_forward, _block_backward)


# --- Splash attention -----------------------------------------------------------------------------------------------


def _splash(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Every device has its own rows and heads; under a mesh the kernel is not divided by the compiler."""
    heads, kv_heads = query.shape[2], key.shape[2]
    arrays = [x.transpose(0, 2, 1, 3) for x in (query * query.shape[-1] ** -0.5, key, value)]  # [B, H or G, T, E]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _splash_of_device(*arrays, segments).transpose(0, 2, 1, 3)
    rules = sharding.rules_of(mesh)
    of_heads = sharding.spec(("batch", "heads", None, None), rules, mesh)
    if kv_heads % mesh.shape.get("tensor", 1):  # each device's queries come with keys of their own
        arrays[1:] = [jnp.repeat(x, heads // kv_heads, axis=1) for x in arrays[1:]]
    attend = jax.shard_map(
        _splash_of_device,
        in_specs=(*[of_heads] * 3, sharding.spec(("batch", None), rules, mesh)),
        out_specs=of_heads,
        check_vma=False,
    )
    return attend(*arrays, segments).transpose(0, 2, 1, 3)


def _splash_of_device(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    heads, length = query.shape[1:3]
    tile = next(tile for tile in SPLASH_TILES if length % tile == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads),
        block_sizes=splash_attention.BlockSizes(**dict.fromkeys(names, tile)),
    )
    return jax.vmap(kernel)(query, key, value, splash_attention.SegmentIds(segments, segments))
