"""The forms of a step's attention for accelerators against the plain one; the CUDA kernel is interpreted."""

import functools
from unittest import mock

import jax
import numpy as np
import pytest
from devices import traced_for
from jax.experimental import pallas as pl

from qsharp_jax.models import attention, decode_attention, kv_cache

B, S, Q, H, G, E = 3, 128, 3, 4, 2, 16


@pytest.fixture(autouse=True)
def interpreted():
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)):
        yield


def both(start, index, platform="cpu", dtype=np.float32):
    """Attention over a ring, on a platform and plain; slots outside of a row's positions hold numbers of others."""
    rng = np.random.default_rng(0)
    query, key, value, keys, values = (
        rng.normal(size=shape).astype(dtype)
        for shape in [(B, Q, H, E), (B, Q, G, E), (B, Q, G, E), (B, G, S, E), (B, G, S, E)]
    )
    cache = kv_cache.KVCache(keys=[keys], values=[values], start=np.array(start), index=np.int32(index), ring=True)
    after = kv_cache.write_pair((keys, values), (key[:, :1], value[:, :1]), cache.slot)
    want = kv_cache.attend(query, key, value, keys, values, cache.start, cache.index, ring=True)
    with traced_for(platform):
        return compiled(platform)(query, key, value, (keys, values), after, cache), want


def kernels(width, dtype=np.float32):
    """The number of kernels in the program for CUDA."""
    shapes = (1, Q, H, width), (1, Q, G, width), (1, Q, G, width), (1, G, S, width)
    query, key, value, buffer = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    number = jax.ShapeDtypeStruct((), np.int32)
    cache = kv_cache.KVCache(keys=[buffer], values=[buffer], start=jax.ShapeDtypeStruct((1,), np.int32), index=number)
    pair = buffer, buffer
    with traced_for("cuda"):
        program = jax.make_jaxpr(lambda *arguments: decode_attention.attend(*arguments))
        return str(program(query, key, value, pair, pair, cache)).count("pallas_call")


@functools.cache
def compiled(platform):
    return jax.jit(lambda *arguments: decode_attention.attend(*arguments))


@pytest.mark.parametrize(
    ("start", "index"),
    [
        ([-20, 60, 63], 64),  # from before position 0, where a ring begins; the last row has two positions
        ([3 * S - 20, 3 * S - 3, 3 * S + 1], 3 * S + 4),  # around their end
        ([3 * S + 9, 3 * S + 70, 2 * S], 4 * S + 8),  # all of them, and a row that has ended long before
    ],
)
def test_each_row_attends_to_its_own_positions(start, index):
    got, want = both(start, index, "cuda")
    lengths = np.minimum(index - np.array(start), S)
    np.testing.assert_allclose(got[lengths < S], want[lengths < S], atol=1e-5)
    assert (lengths < S).sum() >= 2


def test_in_bfloat16_the_kernel_is_as_near_as_the_plain_form():
    start, index = [5, 40, 90], 100
    exact, _ = both(start, index)
    got, want = (np.float32(x) - exact for x in both(start, index, "cuda", jax.numpy.bfloat16))
    for quantile in (0.5, 0.99):
        assert np.quantile(np.abs(got), quantile) < 1.5 * np.quantile(np.abs(want), quantile)


@pytest.mark.parametrize(("width", "dtype"), [(256, np.float16), (128, np.float32), (128, np.float16)])
def test_a_program_of_the_kernel_fits_into_the_memory_of_small_gpus(width, dtype):
    """A tile of keys and one of values, the queries, and their weights, in the 99 KiB that one of RTX 30 and 40 has."""
    assert kernels(width, dtype) == 1
    head, number = width * np.dtype(dtype).itemsize, np.dtype(dtype).itemsize
    rows = decode_attention.most_rows(head)
    assert (rows + 2 * decode_attention.TILE) * head + rows * decode_attention.TILE * number < 98 * 1024


def test_heads_of_a_kilobyte_and_gpus_before_ampere_have_the_plain_form(monkeypatch):
    assert kernels(256) == 0
    monkeypatch.setattr(attention, "kind_of", lambda device: "gpu")
    assert kernels(64) == 0
