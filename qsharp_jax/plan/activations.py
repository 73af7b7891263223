"""Bytes that a fit's backward pass needs from its forward pass: JAX is asked, and computes nothing.

Shapes: B batch, T length, H heads, G kv heads, E head_dim.
"""

import dataclasses
import functools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from qsharp_jax import train
from qsharp_jax.data.batches import Batch
from qsharp_jax.models import value
from qsharp_jax.models.attention import Attend, Attention
from qsharp_jax.models.decoder import Params
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.plan.job import abstract_batch, divided, shared

KERNELS = ("cudnn", "splash")


def kept_bytes(guide: ValueConfig, remat: str, rows: int, length: int, tensor: int, attention: Attention) -> int:
    """Count the bytes that the backward pass needs from the forward pass, on one chip, without the weights."""
    of_one, of_two = (_kept_bytes(guide, remat, count, length, tensor, attention) for count in (1, 2))
    return of_one + (rows - 1) * (of_two - of_one)


@functools.lru_cache
def _kept_bytes(guide: ValueConfig, remat: str, rows: int, length: int, tensor: int, attention: Attention) -> int:
    """Ask JAX what it saves, for a model with a chip's share of the heads and of the hidden units."""
    trunk = guide.trunk
    heads, mlp = divided(trunk.heads, tensor), divided(trunk.mlp, tensor)
    kv_heads = heads // shared(trunk, tensor)
    share = dataclasses.replace(guide, trunk=dataclasses.replace(trunk, heads=heads, kv_heads=kv_heads, mlp=mlp))
    params = value.abstract(share)
    weights = Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params))
    attend_by = _like_kernels if attention in KERNELS else attention

    def backward(params: Params, batch: Batch) -> Any:
        loss = functools.partial(train.value_loss, batch=batch, config=share, remat=remat, attend_by=attend_by)
        return jax.vjp(loss, params, has_aux=True)[1]

    kept = Counter(
        (leaf.shape, leaf.dtype)
        for leaf in jax.tree.leaves(jax.eval_shape(backward, params, abstract_batch(rows, length)))
    )
    return sum(math.prod(shape) * dtype.itemsize * count for (shape, dtype), count in (kept - weights).items())


# --- Kernels of attention, which JAX only knows on their own devices ------------------------------------------------


def _like_kernels(segments: jax.Array, packed: bool) -> Attend:
    """Attention as of `attention.make` with the shapes of `KERNELS`, also of what they keep; it is never computed."""
    return lambda query, key, value, window=0: _attended(query, key, value)


@jax.custom_vjp
def _attended(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """[B, T, H, E], as the query; key and value are [B, T, G, E]."""
    return _attended_forward(query, key, value)[0]


def _attended_forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    attended, statistics = -query, query.astype(jnp.float32).max(-1)  # the logarithms of the softmax's sums, [B, T, H]
    return attended, (query, key, value, attended, statistics)


def _attended_backward(kept: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
    return kept[:3]


_attended.defvjp(_attended_forward, _attended_backward)
