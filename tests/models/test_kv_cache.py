"""The cache of decoding: attention under the tree mask against one softmax a query, and what a write touches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax.models import attention, cpu_form, kv_cache

B, S, Q, H, G, E = 3, 9, 4, 6, 2, 5
START, INDEX = np.array([0, 2, 6]), 6  # the last row's only token is the pending one

attend = jax.jit(kv_cache.attend, static_argnames=("ring", "positions_last", "window"))


def step(seed=0, queries=Q):
    """Random query, key, value of a step, and buffers as they are after its write: the pending token's at INDEX."""
    rng = np.random.default_rng(seed)
    query, key, value, keys, values = (
        np.float32(rng.normal(size=shape))
        for shape in [(B, queries, H, E), (B, queries, G, E), (B, queries, G, E), (B, G, S, E), (B, G, S, E)]
    )
    keys[:, :, INDEX], values[:, :, INDEX] = key[:, 0], value[:, 0]
    return query, key, value, keys, values


def attend_one(query, seen):
    """One head's query [E] over the (key, value) pairs that it sees."""
    keys, values = (np.stack(x).astype(np.float64) for x in zip(*seen, strict=True))
    weights = np.exp(keys @ query.astype(np.float64) / np.sqrt(E))
    return weights @ values / weights.sum()


@pytest.mark.parametrize(("queries", "window"), [(1, 0), (Q, 0), (1, 3), (Q, 2), (Q, 3)])
def test_each_token_sees_its_row_up_to_the_pending_one_and_a_candidate_itself(queries, window):
    query, key, value, keys, values = step(queries=queries)
    got = attend(query, key, value, keys, values, START, INDEX, window=window)
    lap = [np.roll(buffer, 2 * S + 4, axis=2) for buffer in (keys, values)]  # position p of a ring is in slot p % S
    again = attend(query, key, value, *lap, START + 2 * S + 4, INDEX + 2 * S + 4, ring=True, window=window)
    np.testing.assert_allclose(again, got, atol=1e-6)
    assert got.shape == query.shape
    for b in range(B):
        for q in range(queries):
            for h in range(H):
                g = h * G // H
                first = max(START[b], INDEX + (q > 0) + 1 - window) if window else START[b]
                seen = [(keys[b, g, s], values[b, g, s]) for s in range(first, INDEX + 1)]
                seen += [(key[b, q, g], value[b, q, g])] if q > 0 else []
                np.testing.assert_allclose(got[b, q, h], attend_one(query[b, q, h], seen), atol=1e-5)


def test_nothing_before_the_start_or_from_the_index_on_matters():
    query, key, value, keys, values = step()
    hidden = (np.arange(S) < START[:, None]) | (np.arange(S) >= INDEX)  # [B, S]
    garbage = np.where(hidden[:, None, :, None], np.float32(1e4), 0)
    np.testing.assert_array_equal(
        attend(query, key, value, keys + garbage, values + garbage, START, INDEX),
        attend(query, key, value, keys, values, START, INDEX),
    )


def test_a_row_without_its_dimension_is_the_same_row():
    query, key, value, keys, values = (x[1:2] for x in step())
    cache = kv_cache.KVCache(keys=[keys], values=[values], start=START[1:2], index=INDEX)
    bare = cpu_form.without_rows(cache)
    assert bare.keys[0].shape == bare.values[0].shape == (G, S, E)
    jax.tree.map(np.testing.assert_array_equal, cpu_form.with_rows(bare), cache)
    new = key[:, :1] + 1
    written = kv_cache.write(keys, new, INDEX)
    np.testing.assert_array_equal(kv_cache.write(bare.keys[0], new, INDEX), written[0])
    np.testing.assert_array_equal(
        attend(query, key, value, bare.keys[0], bare.values[0], START[1:2], INDEX),
        attend(query, key, value, keys, values, START[1:2], INDEX),
    )


def test_bfloat16_comes_back_as_bfloat16_and_near_float32():
    arrays = step()
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    got = attend(*half, START, INDEX)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), attend(*arrays, START, INDEX), atol=0.05)


def test_bfloat16_scores_are_scaled_in_float32_as_over_a_whole_prompt():
    """A scaled query would be rounded: scores of about 40 then differ by 0.1, and weights by a tenth."""
    rng = np.random.default_rng(0)
    shapes = [(64, 50, h, E) for h in (H, G, G)]
    query, key, value = (jnp.asarray(6 * rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    got = attend(query[:, -1:], key[:, -1:], value[:, -1:], key.swapaxes(1, 2), value.swapaxes(1, 2), jnp.zeros(64), 49)
    whole = attention.make("xla", jnp.ones((64, 50)))(query, key, value)[:, -1:]
    np.testing.assert_allclose(np.float32(got), np.float32(whole), atol=0.15)


@pytest.mark.parametrize("index", [0, 4, S - 1])
def test_a_write_touches_one_position_of_every_row(index):
    rng = np.random.default_rng(0)
    buffer, new = np.float32(rng.normal(size=(B, G, S, E))), np.float32(rng.normal(size=(B, 1, G, E)))
    want = buffer.copy()
    want[:, :, index] = new[:, 0]
    np.testing.assert_array_equal(kv_cache.write(jnp.asarray(buffer), new, index), want)
    assert kv_cache.write(jnp.asarray(buffer, jnp.bfloat16), new, index).dtype == jnp.bfloat16


def test_prompts_are_laid_down_from_position_0_and_the_next_write_follows_them():
    length, layers = 4, 2
    rng = np.random.default_rng(0)
    kept = [tuple(np.float32(rng.normal(size=(B, length, G, E))) for _ in "kv") for _ in range(layers)]
    cache = kv_cache.from_prefill(kept, np.array([0, 1, 4]), S)
    assert int(cache.index) == length and cache.index.dtype == jnp.int32
    np.testing.assert_array_equal(cache.start, [0, 1, 4])
    for layer, pair in enumerate(kept):
        for buffer, prompt in zip((cache.keys[layer], cache.values[layer]), pair, strict=True):
            assert buffer.shape == (B, G, S, E)
            np.testing.assert_array_equal(buffer[:, :, :length], prompt.swapaxes(1, 2))
            np.testing.assert_array_equal(buffer[:, :, length:], 0)


@pytest.mark.parametrize("queries, heads", [(1, G), (Q, H)])
def test_keys_with_positions_last_are_attended_to_alike(queries, heads):
    query, key, value, keys, values = step(queries=queries)
    arrays = query[:, :, :heads], key, value
    got = attend(*arrays, keys.swapaxes(2, 3), values, START, INDEX, positions_last=True)
    np.testing.assert_allclose(got, attend(*arrays, keys, values, START, INDEX), atol=1e-6)


@pytest.mark.parametrize("width", [4, S + 3])
def test_keys_with_positions_last_are_prefilled_refilled_and_written_alike(width):
    rng = np.random.default_rng(0)
    old, prompts, new = (
        tuple(np.float32(rng.normal(size=(B, length, G, E))) for _ in "kv") for length in (7, width, 1)
    )
    results = []
    for last in (False, True):
        made = kv_cache.from_prefill([old], jnp.asarray(START), S, positions_last=last)
        made = made.replace(ring=True, index=jnp.int32(S + 2))
        waiting = kv_cache.from_prefill([prompts], jnp.array([width - 3] * B), width, positions_last=last)
        cache = kv_cache.refill(made, waiting, jnp.array([-1, 2, 0]), jnp.array([False, True, True]))
        keys, values = kv_cache.write_pair((cache.keys[0], cache.values[0]), new, cache.slot, cache.axes)
        results.append((keys.swapaxes(2, 3) if last else keys, values, cache.start))
    jax.tree.map(np.testing.assert_array_equal, *results)
    np.testing.assert_array_equal(results[0][0][1:, :, :2], prompts[0][[2, 0], -2:].swapaxes(1, 2))
