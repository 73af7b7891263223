"""The forms of a step's attention for accelerators against the plain one; the CUDA kernel is interpreted."""

import functools
from unittest import mock

import jax
import numpy as np
import pytest
from devices import traced_for
from jax.experimental import pallas as pl

from qsharp_jax.models import decode_attention, kv_cache

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
