"""Attention of a decoding step on a TPU: a kernel that copies each row's own positions from the caches.

The caches stay in HBM. A row's keys and values come to fast memory in tiles of `TILE` positions, of all kv heads at
once, which make up blocks; of a block, only the tiles that the row holds are copied. The blocks of all rows follow one
another, and the next ones are on their way while one is computed. Softmax is computed block by block, as in
FlashAttention (Dao et al., arXiv 2205.14135), and begins with the step's own tokens.
Copies in flight, an estimate: the first bytes of a copy take about a microsecond, in which v5e's memory gives 0.8 MB,
v6e's 1.6 and v5p's 2.8. A tile of one kv head of 128 numbers is 64 KB with its values, 80 ns of v5e's. Blocks for
`IN_FLIGHT` bytes, 64 such tiles, are all on their way but the one that is computed.
Keys and values in 8 bits come as whole numbers with the tiles of their scales. The scales multiply scores and weights,
in float32; whole numbers are converted in fast memory, exactly, to the queries' dtype.
Shapes: B batch, S positions of the buffers, Q tokens of the step, G kv heads, E head_dim; N rows of queries that read
one kv head.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qsharp_jax.models import sharding
from qsharp_jax.models.kv_cache import Part
from qsharp_jax.models.quantized import Weight

TILE = 128  # positions of one copy, as many as a register has lanes
IN_FLIGHT = 2**22  # bytes of the blocks in fast memory, of which there are three at least
BLOCK = 2**20  # bytes of keys and values in a block, at most
SCORES = 2**19  # bytes of a block's scores, at most: what a row does not hold of a block is computed in vain
SUBLANES = 16  # the step's tokens are padded to a multiple of them, the rows of a register of bfloat16
MEMORY = 12 * 2**20  # bytes of fast memory, of the 16 MB that a kernel gets


def covers(buffer: Weight, groups: int, count: int, tokens: int, dtype: Any) -> bool:
    """Return true if the kernel can read a buffer [B, G, S, E], and has room for so many kv heads, rows and tokens.

    Fitted to what the compiler for v5e says it needs. Products of float32 are sums of products of bfloat16 parts.

    Args:
      dtype: of the queries.
    """
    size, width = buffer.shape[-2:]
    if size % TILE:
        return False
    itemsize = jnp.dtype(dtype).itemsize
    tiles, blocks, block_bytes = _blocks(buffer, groups, count, itemsize)
    scores, numbers = max(tiles * TILE, _padded(tokens)), max(width, TILE)
    parts = 5 * 4 * numbers if itemsize == 4 else 0
    of_queries = groups * count * (3 * 4 * scores + (3 * 4 + 4 * itemsize) * numbers + parts)
    of_step = 4 * itemsize * groups * _padded(tokens) * numbers
    return blocks * block_bytes + of_queries + of_step <= MEMORY


def _padded(tokens: int) -> int:
    return pl.cdiv(tokens, SUBLANES) * SUBLANES


def _blocks(buffer: Weight, groups: int, count: int, itemsize: int) -> tuple[int, int, int]:
    """The tiles of a block, the number of blocks in fast memory, and the bytes of each.

    Args:
      itemsize: of the queries, to whose dtype a block in 8 bits is converted.
    """
    size, width = buffer.shape[-2:]
    places = 2 * groups * TILE  # of a tile, in keys and values
    tiles = min(BLOCK // (places * width * itemsize), SCORES // (4 * groups * count * TILE), size // TILE)
    tiles = max(tiles, 1)
    # In 8 bits a place has whole numbers and a scale.
    block_bytes = tiles * places * sum(x.shape[-1] * x.dtype.itemsize for x in jax.tree.leaves(buffer))
    return tiles, max(IN_FLIGHT // block_bytes, 3), block_bytes


@jax.jit
def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: Weight,
    values: Weight,
    start: jax.Array,
    index: jax.Array,
    prefix: Part | None,
) -> jax.Array:
    """Attention over the positions `start` .. `index` - 1 of each row, the pending token and each candidate itself.

    Args:
      query: [B, G, N, E], the step's tokens innermost in N, the pending one first.
      key, value: [B, Q, G, E] of the step's tokens.
      keys, values: [B, G, S, E], or [G, S, E] of one row, before the pending token is written, may be in 8 bits;
        position p is in slot p % S.
      start: [B].
      index: scalar.
      prefix: attention over what comes before.

    Returns:
      [B, G, N, E] in the query's dtype.
    """
    if keys.ndim == 3:
        keys, values = keys[None], values[None]
    shared = () if prefix is None else (prefix.mixed, prefix.total[..., None], prefix.largest[..., None])
    # Each device computes its own rows and kv heads: the compiler does not divide a kernel.
    of_step, of_row = ("batch", None, "kv", None), ("batch",)
    axes = [sharding.CACHE, of_step, of_step, sharding.CACHE, sharding.CACHE, of_row, ()]
    axes += [sharding.CACHE] * len(shared)
    return sharding.on_each_device(_of_device, *axes)(query, key, value, keys, values, start, index, *shared)


def _of_device(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: Weight,
    values: Weight,
    start: jax.Array,
    index: jax.Array,
    *prefix: jax.Array,
) -> jax.Array:
    batch, groups, count, width = query.shape
    tokens, size = key.shape[1], keys.shape[2]
    chex.assert_shape([key, value], (batch, tokens, groups, width))
    for buffer in (keys, values):
        chex.assert_shape(buffer, (batch, groups, size, width))
    chex.assert_shape(start, (batch,))
    tiles, blocks, _ = _blocks(keys, groups, count, query.dtype.itemsize)

    length = jnp.clip(index - start, 0, size)
    start = (index - length) % size
    filled = jnp.minimum(pl.cdiv(start % TILE + length, TILE), size // TILE)
    numbers = pl.cdiv(filled, tiles)  # of blocks
    first = jnp.cumsum(numbers) - numbers
    all_blocks = jnp.arange(batch * pl.cdiv(size // TILE, tiles) + blocks)  # and more, that do not exist
    row_of = jnp.sum(all_blocks[:, None] >= jnp.cumsum(numbers), axis=1)

    def of_step(x: jax.Array) -> jax.Array:
        """[B, Q, G, E] -> [B, G, Q, E], with zeros after the step's tokens."""
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, _padded(tokens) - tokens), (0, 0)))

    # The leaves are keys and values, or in 8 bits their whole numbers, each followed by its scales.
    laid_out, axes = zip(*map(_as_laid_out, jax.tree.leaves((keys, values))), strict=True)
    # The compiler would take some to fast memory as a whole.
    buffers = [pltpu.with_memory_space_constraint(x, pltpu.MemorySpace.HBM) for x in laid_out]
    in_blocks = [
        pltpu.VMEM((blocks, *x.shape[1 : axis + 1], tiles * TILE, *x.shape[axis + 2 :]), x.dtype)
        for x, axis in zip(buffers, axes, strict=True)
    ]
    of_row = [query, of_step(key), of_step(value), *prefix]
    specs = [pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (b, 0, 0, 0)) for x in of_row]
    in_hbm = pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)
    return pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, size=size, axes=axes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(batch,),
            in_specs=[*specs, *[in_hbm] * len(buffers)],
            out_specs=specs[0],
            scratch_shapes=[*in_blocks, pltpu.SemaphoreType.DMA((blocks,))],
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        name="decode_attention",
    )(start, length, filled, first, row_of, *of_row, *buffers)


def _as_laid_out(x: jax.Array) -> tuple[jax.Array, int]:
    """A buffer with its axes in the order that the compiler has them in, and the axis of the positions in a row of it.

    Where heads would leave lanes of registers empty, positions are innermost.
    """
    if x.shape[3] == 1:  # scales
        return x.squeeze(3), 1
    if x.shape[3] % TILE:
        return x.swapaxes(2, 3), 2
    return x, 1


def _kernel(
    start_ref: Any,  # [B], the slot of each row's first position
    length_ref: Any,  # [B]
    filled_ref: Any,  # [B], the number of tiles that the row has positions in
    first_ref: Any,  # [B], the number of the row's first block
    row_of_ref: Any,  # the row of each block; B after the last one
    query_ref: Any,  # [G, N, E]
    key_ref: Any,  # [G, Q, E] of the step's tokens, padded
    value_ref: Any,
    *refs: Any,  # those of `prefix`, if there is one; the buffers; the result; their blocks; semaphores
    tokens: int,
    size: int,
    axes: tuple[int, ...],  # of positions in a row of each buffer, [G, S, E], [G, E, S], or of scales [G, S]
) -> None:
    """Attention of one row; grid (B,)."""
    numbers = len(axes)
    prefix, buffers = refs[: -2 * numbers - 2], refs[-2 * numbers - 2 : -numbers - 2]
    result_ref, *in_blocks, arrived = refs[-numbers - 2 :]
    row, (_, count, width) = pl.program_id(0), query_ref.shape
    blocks, positions = in_blocks[0].shape[0], in_blocks[0].shape[axes[0] + 1]
    tiles = positions // TILE

    def at(ref: Any, tile: jax.Array, axis: int) -> Any:
        places = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
        return ref.at[:, places] if axis == 1 else ref.at[:, :, places]

    def block_of(number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """A block's row, place in fast memory, first tile in the buffers, and number of tiles that the row holds."""
        its_row = row_of_ref[number]
        before = (number - first_ref[its_row]) * tiles
        base = jax.lax.div(start_ref[its_row], TILE) + before
        return its_row, jax.lax.rem(number, blocks), base, jnp.minimum(filled_ref[its_row] - before, tiles)

    def each_copy(number: jax.Array, act: Callable[[Any], None]) -> None:
        """Act on the copies of a block."""
        its_row, place, base, filled = block_of(number)

        def of_tile(tile: jax.Array, _: None) -> None:
            slot = jax.lax.rem(base + tile, size // TILE)
            for buffer, block, axis in zip(buffers, in_blocks, axes, strict=True):
                source, target = at(buffer.at[its_row], slot, axis), at(block.at[place], tile, axis)
                act(pltpu.make_async_copy(source, target, arrived.at[place]))

        jax.lax.fori_loop(0, filled, of_tile, None)

    def fetch(number: jax.Array) -> None:
        @pl.when(row_of_ref[number] < pl.num_programs(0))
        def _() -> None:
            each_copy(number, lambda copy: copy.start())

            @pl.when(number < blocks)
            def _() -> None:  # values that were never copied have no weight, but they or their scales must be finite
                _, place, _, filled = block_of(number)

                def clear(tile: jax.Array, _: None) -> None:
                    numbers = at(in_blocks[-1].at[place], tile, axes[-1])
                    numbers[...] = jnp.zeros(numbers.shape, numbers.dtype)

                jax.lax.fori_loop(filled, tiles, clear, None)

    @pl.when(row == 0)
    def first_ones() -> None:
        jax.lax.fori_loop(0, blocks - 1, lambda number, _: fetch(number), None)

    # In a program where another model is float32 all products have the highest precision, which the compiler refuses
    # for operands of bfloat16.
    precision = jax.lax.Precision.HIGHEST if query_ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)

    def added(
        part: Part,
        scores: jax.Array,
        seen: jax.Array,
        subscripts: str,
        values: jax.Array,
        scales: jax.Array | None = None,
    ) -> Part:
        scores = jnp.where(seen, width**-0.5 * scores, -jnp.inf)
        larger = jnp.maximum(part.largest, scores.max(-1, keepdims=True))
        weights, kept = jnp.exp(scores - larger), jnp.exp(part.largest - larger)
        scaled = weights if scales is None else weights * scales.astype(jnp.float32)[:, None]
        mixed = product(subscripts, scaled.astype(values.dtype), values)
        return Part(kept * part.mixed + mixed, kept * part.total + weights.sum(-1, keepdims=True), larger)

    query = query_ref[...]
    nothing = jnp.zeros((*query.shape[:2], 1), jnp.float32)
    part = Part(jnp.zeros(query.shape, jnp.float32), nothing, nothing - jnp.inf)
    if prefix:
        part = Part(*(ref[...] for ref in prefix))
    # Each of the step's tokens sees the pending one and itself.
    scores = product("gne,gqe->gnq", query, key_ref[...])
    of_query, of_key = (jax.lax.broadcasted_iota(jnp.int32, scores.shape[1:], axis) for axis in (0, 1))
    seen = of_key == 0
    for head in range(count // tokens):
        seen |= (of_query == of_key + head * tokens) & (of_key < tokens)
    part = added(part, scores, seen, "gnq,gqe->gne", value_ref[...])

    lead = jax.lax.rem(start_ref[row], TILE)  # slots of the first tile before the row's first position
    end = lead + length_ref[row]

    def add_block(turn: jax.Array, part: Part) -> Part:
        number = first_ref[row] + turn
        fetch(number + blocks - 1)
        each_copy(number, lambda copy: copy.wait())
        block = [ref[jax.lax.rem(number, blocks)] for ref in in_blocks]
        keys, key_scales, values, value_scales = block if len(block) == 4 else (block[0], None, block[1], None)
        order = "se" if axes[0] == 1 else "es"
        scores = product(f"gne,g{order}->gns", query, keys.astype(query.dtype))
        if key_scales is not None:
            scores *= key_scales.astype(jnp.float32)[:, None]
        slots = turn * positions + jax.lax.broadcasted_iota(jnp.int32, (1, 1, positions), 2)
        # A row that fills its ring ends in the tile that it begins in, before its beginning.
        seen = ((slots >= lead) & (slots < jnp.minimum(end, size))) | (slots < end - size)
        return added(part, scores, seen, f"gns,g{order}->gne", values.astype(query.dtype), value_scales)

    part = jax.lax.fori_loop(0, pl.cdiv(filled_ref[row], tiles), add_block, part)
    result_ref[...] = (part.mixed / part.total).astype(result_ref.dtype)
