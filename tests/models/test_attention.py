"""Every implementation of attention against the plain einsum, with its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from qsharp_jax.models import attention, config
from qsharp_jax.system.errors import UserError


def plain(query, key, value, segments, window=None):
    """Textbook attention, one head at a time, in the inputs' dtype."""
    length, heads = query.shape[1:3]
    share = heads // key.shape[2]
    mask = np.tril(np.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None, :])
    mask &= np.triu(np.ones((length, length), bool), 1 - (window or length))
    attended = []
    for head in range(heads):
        scores = jnp.einsum("bqe,bke->bqk", query[:, :, head], key[:, :, head // share]) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        attended.append(jnp.einsum("bqk,bke->bqe", weights, value[:, :, head // share]))
    return jnp.stack(attended, axis=2)


def inputs(length, heads, kv_heads, size, seed=0):
    """Query, key, value, a cotangent, and segments: three in the first row, one and padding in the second."""
    rng = np.random.default_rng(seed)
    shapes = [(2, length, h, size) for h in (heads, kv_heads, kv_heads, heads)]
    segments = np.ones((2, length), np.int32)
    segments[0, length // 5 :], segments[0, length // 2 :], segments[1, -length // 3 :] = 2, 3, 0
    query, key, value, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return (query, key, value), cotangent * (segments > 0)[..., None, None], segments


def compare(implementation, length, heads, kv_heads, size, tolerance, window=0, **options):
    """Attention at real tokens, and the gradients of all three arguments."""
    arguments, cotangent, segments = inputs(length, heads, kv_heads, size)

    def loss(attend, *arguments):
        return (attend(*arguments) * cotangent).sum()

    attend = functools.partial(attention.make(implementation, segments, **options), window=window)
    expected = functools.partial(plain, segments=segments, window=int(window))
    real = segments > 0
    np.testing.assert_allclose(
        jax.jit(attend)(*arguments)[real], jax.jit(expected)(*arguments)[real], atol=tolerance, rtol=tolerance
    )
    gradients = (jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(*arguments) for f in (attend, expected))
    for actual, wanted in zip(*gradients, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("implementation", ["xla", "blocks"])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(7, 2, 2), (128, 4, 1), (300, 4, 2)])
def test_attention_is_the_plain_einsum(implementation, length, heads, kv_heads):
    """Less than a block of queries, one, and some; grouped queries; several segments and padding."""
    compare(implementation, length, heads, kv_heads, 16, 2e-6)


@pytest.mark.parametrize(("implementation", "window"), [("xla", 20), ("blocks", jnp.int32(20))])
def test_a_window_is_the_plain_einsum_s(implementation, window):
    compare(implementation, 150, 4, 2, 16, 2e-6, window=window)


@pytest.mark.parametrize(("length", "chunk", "block", "window"), [(150, 40, 16, jnp.int32(20)), (96, 32, 40, 0)])
def test_chunks_are_the_plain_einsum(length, chunk, block, window):
    """Lengths that chunks, and blocks of keys, divide or not; segments that end within them; padding."""
    (query, key, value), _, segments = inputs(length, 4, 2, 16)
    attend = jax.jit(functools.partial(attention.in_chunks, window=window, chunk=chunk, block=block))
    got, want = attend(query, key, value, segments), plain(query, key, value, segments, int(window))
    np.testing.assert_allclose(got[segments > 0], want[segments > 0], atol=2e-6)
    whole = attention.make("xla", segments)(query, key, value, window)
    np.testing.assert_array_equal(attention.make("chunks", segments)(query, key, value, window), whole)


def test_splash_attention_refuses_windows():
    arguments, _, segments = inputs(128, 2, 1, 16)
    with pytest.raises(UserError, match="splash attention has no windows, which this model has; use config.fit.att"):
        attention.make("splash", segments)(*arguments, window=8)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_splash_attention_is_the_plain_einsum(kv_heads, monkeypatch):
    """The TPU's kernel, interpreted; a length of two tiles, segments that end within them."""
    kernel = functools.partial(splash_attention.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", kernel)
    monkeypatch.setattr(attention, "SPLASH_TILES", (128,))
    compare("splash", 256, 2, kv_heads, 16, 2e-5)


def test_the_call_of_cudnn(monkeypatch):
    """It cannot run here, so XLA gets the same call: causal, with the segments as a mask where rows are packed."""
    calls = []
    real = jax.nn.dot_product_attention

    def spy(*arguments, implementation, **options):
        calls.append((implementation, options["mask"] is not None))
        return real(*arguments, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    compare("cudnn", 12, 4, 2, 8, 2e-6, packed=True)
    assert set(calls) == {("cudnn", True)}
    # A row of one segment needs no mask: what stands behind it is not seen.
    arguments, _, _ = inputs(12, 4, 2, 8)
    segments = np.asarray([[1] * 12, [1] * 9 + [0] * 3], np.int32)
    actual = attention.make("cudnn", segments, packed=False)(*arguments)
    np.testing.assert_allclose(actual[segments > 0], plain(*arguments, segments)[segments > 0], atol=2e-6)
    assert calls[-1] == ("cudnn", False)
    actual = attention.make("cudnn", segments, packed=False)(*arguments, window=4)
    np.testing.assert_allclose(actual[segments > 0], plain(*arguments, segments, 4)[segments > 0], atol=2e-6)


def test_blocks_in_bfloat16_lose_no_more_than_bfloat16_does():
    """Scores, exponentials' sums and mixed values are float32 before they are rounded."""
    arguments, _, segments = inputs(200, 4, 2, 32)
    half = [x.astype(jnp.bfloat16) for x in arguments]
    actual = attention.make("blocks", segments)(*half)
    exact = plain(*(x.astype(jnp.float32) for x in half), segments)
    assert actual.dtype == jnp.bfloat16
    assert np.abs(np.float32(actual) - exact)[segments > 0].max() < 0.02


@pytest.mark.parametrize(
    ("kind", "changes", "multiple", "tokens", "chosen"),
    [
        ("cuda", {}, 24, 64, "cudnn"),
        ("cuda", {"dtype": "float32"}, 24, 64, "xla"),  # cuDNN's has no float32
        ("cuda", {"head_dim": 256}, 24, 64, "xla"),
        ("cuda", {}, 25, 64, "xla"),  # nor packed rows of an odd length
        ("gpu", {}, 24, 64, "xla"),
        ("tpu", {}, 256, 64, "splash"),
        ("tpu", {"dtype": "float32", "head_dim": 64}, 256, 64, "splash"),
        ("tpu", {}, 64, 64, "xla"),
        ("tpu", {"window": 8, "window_layers": (0,)}, 256, 64, "xla"),
        ("cpu", {}, 256, 511, "xla"),
        ("cpu", {}, 256, 512, "blocks"),
    ],
)
def test_the_attention_that_is_chosen_runs_on_the_device(kind, changes, multiple, tokens, chosen):
    trunk = config.make("tiny", **{"vocab_size": 11, "dtype": "bfloat16", "head_dim": 128} | changes)
    assert attention.choose(trunk, kind, multiple=multiple, tokens=tokens) == chosen
    assert attention.kind_of(jax.devices()[0]) == "cpu"
