"""Causal attention within the segments of whole sequences: a table of implementations by kind of device.

Shapes: B batch, T length, H heads, G kv heads, E head_dim.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from qsharp_jax.models import cpu_form, sharding
from qsharp_jax.system.errors import UserError

Attention = Literal["xla", "blocks", "cudnn", "splash"]
# (query [B, T, H, E], key [B, T, G, E], value [B, T, G, E], window) -> [B, T, H, E]. The window is the number of tokens
# that each sees, its own included, which may be traced; the integer 0, the default, is no window.
Attend = Callable[..., jax.Array]

SPLASH_TILES = (512, 256, 128)  # the first that divides the length is used


def make(implementation: Attention, segments: jax.Array, *, packed: bool = True) -> Attend:
    """Attention for a batch of sequences; its results at padding are meaningless.

    Args:
      implementation: a key of `IMPLEMENTATIONS`.
      segments: [B, T], 0 at padding; tokens attend within their own segment only.
      packed: whether a row may have several segments.
    """
    return IMPLEMENTATIONS[implementation](segments, packed)


def _xla(segments: jax.Array, packed: bool) -> Attend:
    """XLA's own, for any device; it stores scores [B, H, T, T]."""
    length = segments.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    mask = causal & (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    return lambda query, key, value, window=0: jax.nn.dot_product_attention(
        query, key, value, mask=_near(mask, window)[:, None]
    )


def _near(mask: jax.Array, window: Any) -> jax.Array:
    """The part of a mask [..., T, T] within the window."""
    if isinstance(window, int) and not window:
        return mask
    places = jnp.arange(mask.shape[-1])
    return mask & (places[:, None] - places < window)


def _blocks(segments: jax.Array, packed: bool) -> Attend:
    """For CPUs: queries in blocks, each with the keys up to its end."""
    return lambda query, key, value, window=0: cpu_form.attention(query, key, value, segments, window)


def _cudnn(segments: jax.Array, packed: bool) -> Attend:
    """NVIDIA's flash attention, bfloat16 only.

    Rows of one segment with the padding behind it need no mask [B, 1, T, T]: causality alone keeps tokens from padding.
    """
    same = (segments[:, None, :, None] == segments[:, None, None, :]) if packed else None

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, window: Any = 0) -> jax.Array:
        mask = same
        if not isinstance(window, int) or window:
            everything = jnp.ones((1, 1, *2 * segments.shape[1:]), bool)
            mask = _near(everything if same is None else same, window)
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True, implementation="cudnn")

    return attend


def _splash(segments: jax.Array, packed: bool) -> Attend:
    """The TPU's kernel, for lengths that 128 divides."""

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, window: Any = 0) -> jax.Array:
        if not isinstance(window, int) or window:
            raise UserError("splash attention has no windows, which this model has; use config.fit.attention=xla")
        return _splash_under_mesh(query, key, value, segments)

    return attend


# (segments, packed) -> Attend, see `make`
IMPLEMENTATIONS: dict[str, Callable[[jax.Array, bool], Attend]] = {
    "xla": _xla,
    "blocks": _blocks,
    "cudnn": _cudnn,
    "splash": _splash,
}


def _splash_under_mesh(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Run the kernel on every device for its own rows and heads: the compiler does not divide it under a mesh."""
    heads, kv_heads = query.shape[2], key.shape[2]
    query = (query * query.shape[-1] ** -0.5).transpose(0, 2, 1, 3)  # [B, H, T, E]
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [B, G, T, E]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _splash_of_device(query, key, value, segments).transpose(0, 2, 1, 3)
    rules = sharding.rules_of(mesh)
    of_heads = sharding.spec(("batch", "heads", None, None), rules, mesh)
    if kv_heads % mesh.shape.get("tensor", 1):  # then each device's queries come with their own keys
        key, value = (jnp.repeat(x, heads // kv_heads, axis=1) for x in (key, value))
    attend = jax.shard_map(
        _splash_of_device,
        in_specs=(*[of_heads] * 3, sharding.spec(("batch", None), rules, mesh)),
        out_specs=of_heads,
        check_vma=False,
    )
    return attend(query, key, value, segments).transpose(0, 2, 1, 3)


def _splash_of_device(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    heads, length = query.shape[1:3]
    tile = next(tile for tile in SPLASH_TILES if length % tile == 0)
    sizes: dict[str, Any] = dict.fromkeys(
        ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), tile
    )
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads),
        block_sizes=splash_attention.BlockSizes(**sizes),
    )
    return jax.vmap(kernel)(query, key, value, splash_attention.SegmentIds(segments, segments))
