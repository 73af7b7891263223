"""The TPU's attention kernel against the plain form, in the interpreter, in which fast memory begins as nan."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import traced_for
from jax.experimental import pallas as pl

from qsharp_jax.models import decode_attention, kv_cache, quantized, tpu_attention
from qsharp_jax.models.kv_cache import KVCache, Part

S = 384  # three tiles


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Names of the kernels that are traced; none is taken from the cache of another test."""
    names, real = [], pl.pallas_call

    def call(*arguments, **options):
        names.append(options["name"])
        return real(*arguments, **options, interpret=True)

    monkeypatch.setattr(pl, "pallas_call", call)
    monkeypatch.setattr(tpu_attention, "attend", tpu_attention.attend.__wrapped__)
    return names


def case(start, index, seed=0, tokens=3, heads=4, groups=2, width=16, size=S, dtype=np.float32, int8=False):
    """Arguments of attention over a ring; slots outside of a row's positions hold numbers of others.

    In 8 bits scales differ by position.
    """
    rng, batch = np.random.default_rng(seed), len(start)
    of_step, of_buffer = (batch, tokens, groups, width), (batch, groups, size, width)
    drawn = [
        rng.normal(size=shape) for shape in [(batch, tokens, heads, width), of_step, of_step, of_buffer, of_buffer]
    ]
    query, key, value, keys, values = (x.astype(dtype) for x in drawn)
    if int8:
        sizes = 2.0 ** rng.integers(-3, 2, (2, *of_buffer[:-1], 1))
        keys, values = (quantized.in_8_bits(jnp.float32(x * size)) for x, size in zip(drawn[3:], sizes, strict=True))
    cache = KVCache(keys=[keys], values=[values], start=np.array(start, np.int32), index=np.int32(index), ring=True)
    return query, key, value, cache


def on_a_tpu(query, key, value, cache, window=0, prefix=None):
    before = cache.layers[0]
    with traced_for("tpu"):
        return decode_attention.attend(query, key, value, before, None, cache, window, prefix)


def plain(query, key, value, cache, **rest):
    return kv_cache.attend(query, key, value, *cache.layers[0], cache.start, cache.index, ring=True, **rest)


@pytest.mark.parametrize(
    ("index", "shape", "block"),
    [
        (3 * S + 8, dict(), 1),  # blocks of one tile each; the first row's positions are around the ring's end
        (2 * S, dict(tokens=1), None),  # at the ring's end, in one block
        (200, dict(groups=1, width=128), 1),  # in the first lap, with rows that began before position 0
        (5 * S + 300, dict(tokens=20, groups=4, width=128), None),  # blocks of two tiles
        (3 * S - 1, dict(heads=6, groups=2, width=64), 2 * 2 * tpu_attention.TILE * 2 * 64 * 4),
        (3 * S + 8, dict(int8=True), 1),
        (200, dict(int8=True, groups=1, width=128), 1),
        (5 * S + 300, dict(int8=True, tokens=20, groups=4, width=128), None),
        (3 * S - 1, dict(int8=True, heads=6, groups=2, width=64), 2 * 2 * tpu_attention.TILE * 2 * 64 * 4),
    ],
)
def test_each_row_attends_to_its_own_positions(index, shape, block, kernels, monkeypatch):
    """Rows with some positions, with all, with one, with none, and one that has ended long before."""
    monkeypatch.setattr(tpu_attention, "BLOCK", block or tpu_attention.BLOCK)
    attend = jax.jit(on_a_tpu)
    for seed in range(3):
        length = np.random.default_rng(seed).integers(2, S)
        arguments = case([index - length, index - S, index - 1, index, index - 3 * S], index, seed, **shape)
        np.testing.assert_allclose(attend(*arguments), plain(*arguments), atol=1e-5)
    assert kernels == ["decode_attention"]


@pytest.mark.parametrize("int8", [False, True])
def test_the_buffers_of_a_single_row(int8):
    query, key, value, cache = case([40], 100, tokens=1, size=tpu_attention.TILE, int8=int8)
    single = cache.replace(keys=[cache.keys[0][0]], values=[cache.values[0][0]])
    got = jax.jit(on_a_tpu)(query, key, value, single)
    np.testing.assert_allclose(got, plain(query, key, value, cache), atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
def test_attention_over_what_comes_before_is_a_part_of_it(int8):
    """Also of a row that has nothing of its own, and of one with nothing before."""
    query, key, value, cache = case([20, 60, 95], 95, size=tpu_attention.TILE, int8=int8)
    rng, rows = np.random.default_rng(1), decode_attention._rows(query, 2)
    mixed, total, largest = (
        rng.normal(size=rows.shape),
        rng.uniform(1, 9, rows.shape[:-1]),
        rng.normal(size=rows.shape[:-1]),
    )
    largest[1] = decode_attention.MASKED
    part = Part(*map(jnp.float32, (mixed, total, largest)))
    with traced_for("tpu"):
        got = jax.jit(tpu_attention.attend)(rows, key, value, *cache.layers[0], cache.start, cache.index, part)
    want = plain(query, key, value, cache, prefix=part)
    np.testing.assert_allclose(decode_attention._tokens(got, 3), want, atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
def test_in_bfloat16_the_kernel_is_as_near_as_the_plain_form(int8):
    start, index = [5, 40, 90], 300
    exact = plain(*case(start, index, width=128, int8=int8))
    arguments = case(start, index, width=128, dtype=jnp.bfloat16, int8=int8)
    got, want = (np.float32(x) - exact for x in (jax.jit(on_a_tpu)(*arguments), plain(*arguments)))
    for quantile in (0.5, 0.99):
        assert np.quantile(np.abs(got), quantile) < 1.5 * np.quantile(np.abs(want), quantile)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("dtype", "precision"), [(jnp.bfloat16, "DEFAULT"), (np.float32, "HIGHEST")])
def test_products_of_bfloat16_have_the_only_precision_that_the_compiler_takes(dtype, precision, int8):
    """Also in a program whose products are of the highest, as another model in it is float32."""
    with jax.default_matmul_precision("highest"):
        program = str(jax.make_jaxpr(on_a_tpu)(*case([5, 40, 90], 300, width=128, dtype=dtype, int8=int8)))
    precisions = re.findall(r"precision=\((.*?)\)", program.replace("Precision.", ""))
    assert len(precisions) >= 4 and set(precisions) == {f"{precision}, {precision}"}


# The compiler for v5e takes 16.6 of 16 MiB for the last shape.
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        (dict(size=192), 0),
        (dict(), 20),
        (dict(tokens=101, heads=64, groups=16, width=128), 0),
        (dict(tokens=50, heads=32, groups=8, width=128), 0),
    ],
)
def test_what_the_kernel_does_not_cover_has_the_plain_form(shape, window, kernels):
    """Buffers that are not whole tiles, layers with a window, and more rows of queries than there is room for."""
    arguments = case([30, 60], 80, **shape)
    got = jax.jit(on_a_tpu, static_argnames="window")(*arguments, window=window)
    np.testing.assert_allclose(got, plain(*arguments, window=window), atol=1e-6)
    assert kernels == []
