"""Attention of a decoding step over the key-value cache, in the form for each kind of device.

CPU: `kv_cache.attend`, over the whole buffers. CUDA: a kernel that reads each row's own positions, merged with the
candidates' attention to themselves as in FlashAttention (Dao et al., arXiv 2205.14135). TPU: a kernel that does both,
see `tpu_attention.py`. Both have the plain form for what they do not cover. Prompts that rows share are read once for
all of these (Juravsky et al., "Hydragen", arXiv 2402.05099), and merged alike.
Shapes: B batch, S positions of the buffers, Q tokens of the step, H heads, G kv heads, E head_dim; N = H/G * Q rows of
queries that read one kv head; U prompts that rows share, W positions of these.
"""

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qsharp_jax.models import attention, kv_cache, memory, quantized, sharding, tpu_attention
from qsharp_jax.models.kv_cache import KVCache, Part
from qsharp_jax.models.quantized import Weight

Buffers = tuple[Weight, Weight]  # keys and values of one layer, as in `KVCache`

TILE = 64  # positions that the CUDA kernel reads at once
WIDEST = 512  # bytes of a head in the kernel
PROGRAMS = 264  # of the kernel that keep a GPU busy, two for each multiprocessor of an H200
MASKED = -1e30  # as a score; with -inf the difference of two would be nan


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    before: Buffers,
    after: Buffers,
    cache: KVCache,
    window: int = 0,
    prefix: Buffers | None = None,
) -> jax.Array:
    """Attention of one step's tokens over a layer's cache; up to rounding, the result of `kv_cache.attend`.

    Args:
      query: [B, Q, H, E].
      key, value: [B, Q, G, E] of the step's tokens, the pending one first.
      before, after: the layer's buffers before and after the pending token is written. A buffer that is written and
        then read is updated in place on CPU and GPU; the other way round it is copied first. A TPU takes a buffer that
        is to be written to its fast memory, and moves all of it back: there reads come first.
      cache: the start, index and form of the buffers.
      window: as in `kv_cache.attend`.
      prefix: the layer's buffers of `cache.prefix`, where rows share prompts.

    Returns:
      [B, Q, H, E] in the query's dtype.
    """
    step = functools.partial(kv_cache.attend, ring=cache.ring, positions_last=cache.positions_last, window=window)

    def plain(query, key, value, buffers, start, index):
        shared = None if prefix is None else _over_prefix(query, prefix, cache, window)
        return step(query, key, value, *buffers, start, index, prefix=shared)

    if cache.positions_last:  # the form for a CPU
        return plain(query, key, value, after, cache.own, cache.index)
    groups, size, width = cache.values[0].shape[-3:]
    mesh = jax.sharding.get_abstract_mesh()
    # Where a mesh has more devices than kv heads, the compiler divides the query heads.
    whole = not window and (mesh.empty or groups % mesh.shape.get("tensor", 1) == 0)

    def cpu(query, key, value, before, after, start, index):
        return plain(query, key, value, after, start, index)

    def cuda(query, key, value, before, after, start, index):
        sizes = [size] if prefix is None else [size, prefix[0].shape[2]]
        fits = width in (16, 32, 64, 128, 256) and width * query.dtype.itemsize <= WIDEST
        # Triton's compiler refuses GPUs before Ampere.
        if attention.kind_of(memory.default_device()) == "gpu" or not whole or not fits or any(s % TILE for s in sizes):
            return plain(query, key, value, after, start, index)
        shared = None if prefix is None else (*prefix, cache.prefix.start, cache.prefix.index)
        return _by_kernel(query, key, value, *after, start, index, shared)

    def tpu(query, key, value, before, after, start, index):
        rows = _rows(query, groups)
        here = groups // mesh.shape.get("tensor", 1)  # kv heads on one device
        if not whole or not tpu_attention.covers(before[0], here, rows.shape[2], query.shape[1], query.dtype):
            return plain(query, key, value, before, start, index)
        shared = None if prefix is None else _over_prefix(query, prefix, cache, window)
        return _tokens(tpu_attention.attend(rows, key, value, *before, start, index, shared), query.shape[1])

    operands = query, key, value, before, after, cache.own, cache.index
    return jax.lax.platform_dependent(*operands, cuda=cuda, tpu=tpu, default=cpu)


# --- Parts of the positions -----------------------------------------------------------------------------------------


def _rows(x: jax.Array, groups: int) -> jax.Array:
    """[B, Q, H, E] -> [B, G, N, E]."""
    batch, tokens, heads, width = x.shape
    x = x.reshape(batch, tokens, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    return x.reshape(batch, groups, heads // groups * tokens, width)


def _tokens(x: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `_rows`."""
    batch, groups, rows, width = x.shape
    x = x.reshape(batch, groups, rows // tokens, tokens, width).transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, tokens, groups * (rows // tokens), width)


def _scores(subscripts: str, query: jax.Array, key: jax.Array) -> jax.Array:
    return query.shape[-1] ** -0.5 * jnp.einsum(subscripts, query, key, preferred_element_type=jnp.float32)


def _by_prompt(x: jax.Array, prompts: int) -> jax.Array:
    """[B, G, N, ...] -> [U, G, B/U * N, ...], the rows of a prompt next to each other."""
    batch, groups, count, *rest = x.shape
    x = x.reshape(prompts, batch // prompts, groups, count, *rest).swapaxes(1, 2)
    return x.reshape(prompts, groups, batch // prompts * count, *rest)


def _by_row(x: jax.Array, batch: int) -> jax.Array:
    """The inverse of `_by_prompt`."""
    prompts, groups, count, *rest = x.shape
    x = x.reshape(prompts, groups, batch // prompts, count * prompts // batch, *rest).swapaxes(1, 2)
    return x.reshape(batch, groups, count * prompts // batch, *rest)


def _over_prefix(query: jax.Array, buffers: Buffers, cache: KVCache, window: int) -> Part:
    """Attention of [B, Q, H, E] over the prompts that rows share, one product for all rows of a prompt."""
    (keys, values), prefix = buffers, cache.prefix
    batch, tokens = query.shape[:2]
    prompts, groups, size, _ = values.shape
    rows = _rows(query, groups)
    subscripts = "ugne,uges->ugns" if prefix.positions_last else "ugne,ugse->ugns"
    scores = rows.shape[-1] ** -0.5 * quantized.scores(subscripts, _by_prompt(rows, prompts), keys)
    places = jnp.arange(size)
    seen = ((places >= prefix.start[:, None]) & (places < prefix.index))[:, None, None]  # [U, 1, 1, W]
    if window:  # a candidate, one position after the pending token, sees one position less
        first = cache.index + 1 - window + (jnp.arange(tokens) > 0)  # [Q]
        near = (cache.own - prefix.index)[:, None, None] + places >= first[:, None]  # [B, Q, W]
        near = jnp.tile(near, (1, rows.shape[2] // tokens, 1))[:, None]  # [B, 1, N, W]
        seen = seen & _by_prompt(near, prompts)
    scores = jnp.where(seen, scores, MASKED)
    largest = scores.max(-1)
    weights = jnp.exp(scores - largest[..., None])
    mixed = quantized.mixed("ugns,ugse->ugne", weights, values, query.dtype)
    return Part(*(_by_row(x, batch) for x in (mixed, weights.sum(-1), largest)))


def _over_itself(query: jax.Array, key: jax.Array, value: jax.Array) -> Part:
    """Attention of each candidate over itself; the pending token is in the buffers."""
    tokens, groups = key.shape[1:3]
    shared = query.shape[2] // tokens
    key, value = (_rows(jnp.repeat(x, shared, axis=2), groups) for x in (key, value))  # [B, G, N, E]
    candidate = jnp.tile(jnp.arange(tokens) > 0, shared)
    scores = jnp.where(candidate, _scores("bgne,bgne->bgn", query, key), MASKED)
    return Part(value.astype(jnp.float32), jnp.ones_like(scores), scores)


def _merged(parts: Sequence[Part], dtype: Any) -> jax.Array:
    """Attention over all parts, [B, G, N, E]."""
    largest = functools.reduce(jnp.maximum, [part.largest for part in parts])
    weights = [jnp.exp(part.largest - largest) for part in parts]
    mixed = [weight[..., None] * part.mixed for weight, part in zip(weights, parts, strict=True)]
    total = [weight * part.total for weight, part in zip(weights, parts, strict=True)]
    return (functools.reduce(jnp.add, mixed) / functools.reduce(jnp.add, total)[..., None]).astype(dtype)


# --- CUDA -----------------------------------------------------------------------------------------------------------


@jax.jit
def _by_kernel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: Weight,
    values: Weight,
    start: jax.Array,
    index: jax.Array,
    prefix: tuple[Weight, Weight, jax.Array, jax.Array] | None,
) -> jax.Array:
    """Attention that reads the positions `start` .. `index` of each row, with the pending token in the buffers.

    `prefix`: the buffers of prompts that rows share, where each begins [U], and where they end.
    """
    if keys.ndim == 3:
        keys, values = keys[None], values[None]
    start = jnp.maximum(start, index + 1 - keys.shape[2])
    shared = () if prefix is None else prefix

    def of_device(rows, key, value, keys, values, start, index, *shared):
        parts = [_over_buffers(rows, keys, values, start, index + 1), _over_itself(rows, key, value)]
        if shared:
            part = _over_buffers(_by_prompt(rows, shared[0].shape[0]), *shared)
            parts.append(Part(*(_by_row(x, len(rows)) for x in part)))
        return _merged(parts, rows.dtype)

    # Each device computes its own rows and kv heads: the compiler does not divide a kernel.
    of_step, of_row = ("batch", None, "kv", None), ("batch",)
    axes = [sharding.CACHE, of_step, of_step, sharding.CACHE, sharding.CACHE, of_row, ()]
    axes += [sharding.CACHE, sharding.CACHE, of_row, ()] if shared else []
    rows = _rows(query, key.shape[2])
    attended = sharding.on_each_device(of_device, *axes)(rows, key, value, keys, values, start, index, *shared)
    return _tokens(attended, query.shape[1])


def most_rows(head: int) -> int:
    """Rows of queries in one program of the kernel, by the bytes of a head: with two tiles RTX 30 and 40 have room."""
    return 128 if head <= 256 else 32


def _over_buffers(query: jax.Array, keys: Weight, values: Weight, start: jax.Array, end: jax.Array) -> Part:
    """Attention of [B, G, N, E] over positions `start` [B] .. `end` - 1 (scalar) of the buffers [B, G, S, E].

    As `jax.experimental.pallas.ops.gpu.decode_attention.gqa`, but over a ring, and with splits of what a row holds in
    place of splits of the buffers: no tile outside of it is read, and few splits are needed where there are many rows.
    """
    batch, groups, count, width = query.shape
    size = keys.shape[2]
    start, end = start % size, start % size + end - start  # of the first lap, in which no position is negative
    for buffer in (keys, values):
        chex.assert_shape(buffer, (batch, groups, size, width))
    of_buffers = jax.tree.leaves((keys, values))  # each, if in 8 bits, as whole numbers and scales
    if quantized.is_quantized(keys):
        of_buffers = [leaf.squeeze(-1) if leaf.shape[-1] == 1 else leaf for leaf in of_buffers]
    rows = max(16, min(pl.next_power_of_2(count), most_rows(width * query.dtype.itemsize)))
    programs = batch * groups * pl.cdiv(count, rows)
    splits = min(max(PROGRAMS // programs, 1), size // TILE)
    kernel = functools.partial(_kernel, count=count, size=size, splits=splits)
    of_rows, of_numbers = (None, None, None, rows, width), (None, None, None, rows)
    mixed, total, largest = pl.pallas_call(
        kernel,
        grid=(batch, groups, pl.cdiv(count, rows), splits),
        in_specs=[
            pl.BlockSpec((None, None, rows, width), lambda b, g, i, j: (b, g, i, 0)),
            pl.BlockSpec((None,), lambda b, g, i, j: (b,)),
            pl.BlockSpec((None,), lambda b, g, i, j: (b,)),
            *(
                pl.BlockSpec((None, None, *leaf.shape[2:]), lambda b, g, i, j, rest=leaf.ndim - 2: (b, g, *[0] * rest))
                for leaf in of_buffers
            ),
        ],
        out_specs=[
            pl.BlockSpec(of_rows, lambda b, g, i, j: (j, b, g, i, 0)),
            pl.BlockSpec(of_numbers, lambda b, g, i, j: (j, b, g, i)),
            pl.BlockSpec(of_numbers, lambda b, g, i, j: (j, b, g, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((splits, *query.shape), query.dtype),
            *[jax.ShapeDtypeStruct((splits, *query.shape[:-1]), jnp.float32)] * 2,
        ],
        compiler_params=triton.CompilerParams(num_warps=8 if rows > 32 else 4, num_stages=2),
        name="decode_attention",
    )(query, start, end, *of_buffers)
    of_all = largest.max(0)
    weights = jnp.exp(largest - of_all)
    return Part((weights[..., None] * mixed).sum(0), (weights * total).sum(0), of_all)


def _kernel(
    query_ref: Any,  # [rows, E]
    start_ref: Any,  # scalars
    end_ref: Any,
    *refs: Any,  # keys and values [S, E], each followed by its scales [S] if in 8 bits; the results of `Part`
    count: int,
    size: int,
    splits: int,
) -> None:
    """One split of a row's positions, for the queries of one kv head; grid (B, G, tiles of N, splits)."""
    *of_buffers, mixed_ref, total_ref, largest_ref = refs
    keys_ref, key_scales, values_ref, value_scales = (
        of_buffers if len(of_buffers) == 4 else (of_buffers[0], None, of_buffers[1], None)
    )
    rows, width = query_ref.shape
    start, end = start_ref[()], end_ref[()]
    base = jax.lax.div(start, TILE) * TILE  # tiles do not wrap around: the buffer has a whole number of them
    tiles = pl.cdiv(end - base, TILE)
    share = pl.cdiv(tiles, splits)
    begin = pl.program_id(3) * share

    everything, mask = pl.ds(0, rows), jnp.arange(rows) < count - rows * pl.program_id(2)
    query = triton.load(query_ref.at[everything, :], mask=mask[:, None], other=0.0)

    def add_tile(number: jax.Array, so_far: tuple) -> tuple:
        mixed, total, largest = so_far
        position = base + (begin + number) * TILE
        slots = pl.ds(jax.lax.rem(position, size), TILE)
        positions = position + jnp.arange(TILE)
        seen = ((positions >= start) & (positions < end))[None]
        scores = triton.dot(query, keys_ref[slots, :].T.astype(query.dtype), allow_tf32=False) * width**-0.5
        if key_scales is not None:
            scores = scores * key_scales[slots].astype(jnp.float32)
        scores = jnp.where(seen, scores, MASKED)
        larger = jnp.maximum(largest, scores.max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - larger[:, None]), 0.0)
        kept = jnp.exp(largest - larger)
        scaled = weights if value_scales is None else weights * value_scales[slots].astype(jnp.float32)
        values = values_ref[slots, :].astype(query.dtype)
        added = triton.dot(scaled.astype(values.dtype), values, allow_tf32=False)
        return kept[:, None] * mixed + added, kept * total + weights.sum(axis=-1), larger

    nothing = jnp.zeros((rows, width), jnp.float32), jnp.zeros(rows, jnp.float32), jnp.full(rows, MASKED, jnp.float32)
    mixed, total, largest = jax.lax.fori_loop(0, jnp.clip(tiles - begin, 0, share), add_tile, nothing)
    triton.store(mixed_ref.at[everything, :], mixed.astype(mixed_ref.dtype), mask=mask[:, None])
    triton.store(total_ref.at[everything], total, mask=mask)
    triton.store(largest_ref.at[everything], largest, mask=mask)
