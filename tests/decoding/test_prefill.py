"""Prefill in chunks against prefill of whole prompts."""

import functools

import jax
import numpy as np
import pytest
from helpers import random_model

from qsharp_jax.decoding import prefill
from qsharp_jax.models import decoder

CASES = {
    "stacked": dict(positions="learned", norm="layer", activation="gelu", bias=True),
    "unstacked": dict(window=6, window_layers=(0,), window_rope_theta=100.0),
    "transposed": dict(no_rope_layers=(1,), token_shift=True),
}


@pytest.mark.parametrize("form", CASES)
def test_chunks_fill_the_cache_as_whole_prompts_do(form):
    """Prompts of 21, 14, 2 and 1 tokens in 21 positions, which chunks of 8 do not divide: the last begins early."""
    settings = dict(embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, max_positions=32) | CASES[form]
    model = random_model(vocab_size=17, scale=0.3, **settings)
    params = model.params if form == "stacked" else decoder.unstack(model.params, transposed=form == "transposed")
    tokens = np.random.default_rng(0).integers(0, 17, (4, 21))
    fill = functools.partial(prefill, params, model.config, tokens, size=32, samples=2)
    for start in np.array([[0, 7, 19, 20], [15, 15, 19, 20]]):  # in the first two chunks of the latter are no tokens
        whole, chunked = fill(start=start), fill(start=start, chunk=8)
        assert jax.tree.structure(whole) == jax.tree.structure(chunked)
        assert chunked.index == 21 and (chunked.start == np.repeat(start, 2)).all()
        assert_same_tokens(whole, chunked)
    assert not any(np.moveaxis(keys, chunked.axes[0], 2)[:, :, :14].any() for keys in chunked.keys)


def assert_same_tokens(whole, chunked):
    for name, axis in zip(("keys", "values"), whole.axes, strict=True):
        for got, want in zip(getattr(chunked, name), getattr(whole, name), strict=True):
            got, want = (np.moveaxis(x, axis, 2) for x in (got, want))
            for row, first in enumerate(chunked.start):
                np.testing.assert_allclose(got[row, :, first:21], want[row, :, first:21], atol=1e-5)
                assert np.abs(want[row, :, first:21]).max() > 0.1 and not got[row, :, 21:].any()


def test_memory_beside_the_cache_does_not_grow_with_the_prompt():
    """Memory by the compiler; what is in proportion to the prompt are its ids and positions, a few bytes a token."""
    model = random_model(17, layers=2)
    beside = []
    for length in (1024, 4096):
        tokens, start = jax.ShapeDtypeStruct((2, length), int), jax.ShapeDtypeStruct((2,), int)
        program = prefill.lower(model.params, model.config, tokens, start, size=length + 8, chunk=64).compile()
        beside.append(program.memory_analysis().temp_size_in_bytes)
    assert beside[1] - beside[0] < 2 * 3072 * 100 < beside[0]
