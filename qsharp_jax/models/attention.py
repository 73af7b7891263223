"""Causal attention within the segments of whole sequences: a table of implementations by kind of device.

Shapes: B batch, T length, H heads, G kv heads, E head_dim, C queries of a chunk, S positions of a buffer.
"""

from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from qsharp_jax.models import cpu_form, quantized, sharding
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.quantized import Weight
from qsharp_jax.system.errors import UserError

# (query [B, T, H, E], key [B, T, G, E], value [B, T, G, E], window) -> [B, T, H, E]. The window is the number of tokens
# that each sees, its own included, which may be traced; the integer 0, the default, is no window.
Attend = Callable[..., jax.Array]
Make = Callable[[jax.Array, bool], Attend]  # (segments, packed) -> Attend, see `make`
Attention = Literal["xla", "blocks", "cudnn", "splash", "chunks"]

CHUNK = 1024  # queries at a time in "chunks" and in prefill; shorter sequences are attended to as a whole
KEYS = 512  # whose scores with a chunk of queries exist at a time
_MASKED = -1e30  # as a score; -inf would make a fully masked row nan
SPLASH_TILES = (512, 256, 128)  # the first that divides the length is used
LONG = 512  # tokens of a sequence from which on "blocks" is faster than "xla" on a CPU


def choose(trunk: DecoderConfig, kind: str, *, multiple: int, tokens: int) -> Attention:
    """Choose the implementation that is fastest for training a model.

    Args:
      trunk: in the dtype that it is computed in.
      kind: of the devices, see `kind_of`.
      multiple: the rows' lengths are multiples of it, in tokens.
      tokens: of a long row.
    """
    if kind == "cuda" and trunk.dtype == "bfloat16" and trunk.head_dim <= 128 and trunk.head_dim % 8 == 0:
        return "cudnn" if multiple % 2 == 0 else "xla"
    if kind == "tpu" and not trunk.window and multiple % SPLASH_TILES[-1] == 0:
        return "splash"
    return "blocks" if kind == "cpu" and tokens >= LONG else "xla"


def kind_of(device: jax.Device) -> str:
    """Return "cpu", "tpu", "cuda" for a GPU that cuDNN's attention runs on, or "gpu" for another one."""
    if device.platform == "gpu" and "cuda" in device.client.platform_version:
        return "cuda" if float(device.compute_capability) >= 8 else "gpu"
    return device.platform


def make(implementation: Attention | Make, segments: jax.Array, *, packed: bool = True) -> Attend:
    """Attention for a batch of sequences; its results at padding are meaningless.

    Args:
      implementation: a key of `IMPLEMENTATIONS`, or a function like its values.
      segments: [B, T], 0 at padding; tokens attend within their own segment only.
      packed: whether a row may have several segments.
    """
    return (IMPLEMENTATIONS[implementation] if isinstance(implementation, str) else implementation)(segments, packed)


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


def _chunks(segments: jax.Array, packed: bool) -> Attend:
    """Chunk by chunk of queries, with memory linear in the length, for any device; without a gradient."""
    if segments.shape[1] <= CHUNK:
        return _xla(segments, packed)
    return lambda query, key, value, window=0: in_chunks(query, key, value, segments, window)


IMPLEMENTATIONS: dict[str, Make] = {
    "xla": _xla,
    "blocks": _blocks,
    "cudnn": _cudnn,
    "splash": _splash,
    "chunks": _chunks,
}


# --- Chunks of queries ----------------------------------------------------------------------------------------------


def over_chunks(
    length: int, chunk: int, step: Callable[[jax.Array, int, Any], Any], carry: Any, start: Any = 0
) -> Any:
    """Apply `step(begin, count, carry)` to the least number of parts of a sequence with at most `chunk` tokens each.

    All have as many tokens, `count`: the last may begin with some that the one before it ends with. Parts that end
    before the token `start`, which may be traced, are left out.
    """
    parts = -(-length // chunk)
    count = -(-length // parts)

    def part(number: jax.Array, carry: Any) -> Any:
        return step(jnp.minimum(number * count, length - count), count, carry)

    return jax.lax.fori_loop(start // count, parts, part, carry)


def in_chunks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    window: Any = 0,
    *,
    chunk: int = CHUNK,
    block: int = KEYS,
) -> jax.Array:
    """Attention of whole sequences, arguments as of `Attend`, with scores [B, H, chunk, block] at a time."""
    keys, values = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [B, G, T, E]

    def step(begin: jax.Array, count: int, attended: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(query, begin, count, 1)
        part = of_chunk(part, keys, values, segments, begin, window, block)
        return jax.lax.dynamic_update_slice_in_dim(attended, part, begin, 1)

    return over_chunks(query.shape[1], chunk, step, jnp.zeros_like(query))


def of_chunk(
    query: jax.Array,
    keys: Weight,
    values: Weight,
    segments: jax.Array,
    begin: Any,
    window: Any = 0,
    block: int = KEYS,
    start: Any = 0,
) -> jax.Array:
    """Causal attention of a chunk of tokens to buffers that have their keys and values, and those before.

    The softmax is added up over blocks of keys (Milakov and Gimelshein, arXiv 1805.02867), from the first to the last
    that the chunk sees.

    Args:
      query: [B, C, H, E].
      keys, values: [B, G, S, E], may be in 8 bits; positions from begin + C on are not read.
      segments: [B, S], 0 at padding, where results are meaningless.
      begin: position of the chunk's first token, which may be traced.
      window: as of `Attend`.
      block: keys of which scores, float32 [B, H, C, block], exist at a time.
      start: position before which all is padding, which may be traced.

    Returns:
      [B, C, H, E] in the query's dtype.
    """
    batch, count, heads, width = query.shape
    (groups, size), dtype = keys.shape[1:3], query.dtype
    for buffer in (keys, values):
        chex.assert_shape(buffer, (batch, groups, size, width))
    chex.assert_shape(segments, (batch, size))
    block, has_window = min(block, size), not isinstance(window, int) or window > 0
    query = query.reshape(batch, count, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)  # [B, G, H/G, C, E]
    places = begin + jnp.arange(count)
    own = jax.lax.dynamic_slice_in_dim(segments, begin, count, 1)  # [B, C]

    def add(number: jax.Array, sums: tuple) -> tuple:
        largest, total, mixed = sums
        first = jnp.minimum(number * block, size - block)  # the last block begins with keys of the one before it
        key, value = (
            quantized.dense(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, block, 2), buffer), dtype)
            for buffer in (keys, values)
        )
        segment = jax.lax.dynamic_slice_in_dim(segments, first, block, 1)
        others = first + jnp.arange(block)
        seen = (others >= number * block) & (others <= places[:, None])  # [C, block]
        if has_window:
            seen &= places[:, None] - others < window
        seen = seen & (own[:, :, None] == segment[:, None])  # [B, C, block]
        scores = jnp.einsum("bgrce,bgke->bgrck", query, key, preferred_element_type=jnp.float32) * width**-0.5
        scores = jnp.where(seen[:, None, None], scores, _MASKED)
        new = jnp.maximum(largest, scores.max(-1))
        weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(largest - new)
        added = jnp.einsum("bgrck,bgke->bgrce", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return new, total * kept + weights.sum(-1), mixed * kept[..., None] + added

    first = (jnp.maximum(begin - window + 1, start) if has_window else start) // block
    zeros = jnp.zeros(query.shape, jnp.float32)
    # Where all keys so far are masked, `total` and `mixed` count them; the first that is not makes `kept` 0.
    sums = jnp.full(query.shape[:-1], _MASKED), zeros[..., 0], zeros
    _, total, mixed = jax.lax.fori_loop(first, (begin + count - 1) // block + 1, add, sums)
    attended = (mixed / total[..., None]).astype(query.dtype)
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, count, heads, width)


# --- The TPU's kernel -----------------------------------------------------------------------------------------------


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
