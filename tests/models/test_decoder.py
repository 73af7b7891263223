"""The decoder against the same network in float64 numpy, and the invariances that its callers build on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
from helpers import assert_trees_equal
from hf_folders import GPT2, LLAMA
from jax.sharding import PartitionSpec as P

from qsharp_jax.models import attention, cpu_form, decoder, gpu_form, sharding, value
from qsharp_jax.models import config as configs
from qsharp_jax.models.value import ValueConfig

# As Llama 3.1's rotary positions: one of the three wavelengths is kept, one stretched, one between.
SCALED = dict(rope_factor=8.0, rope_original_positions=30, rope_low_freq=0.3, rope_high_freq=2.0)
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, tied=True, norm_eps=1e-2, token_shift=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, kv_heads=1, **SCALED),
    "gpt2-shift": dataclasses.replace(GPT2, token_shift=True, activation="swiglu", kv_heads=2, tied=False),
}

# Layers that differ in window and rotary positions, and everything else that Gemma 3, SmolLM3 and Phi-3 have.
MIXED = dataclasses.replace(
    LLAMA, layers=3, window=4, window_layers=(0, 2), window_rope_theta=10.0, no_rope_layers=(2,), rope_dims=4,
    norm="rms_plus_one", post_norms=True, activation="geglu", qk_norm=True, query_scalar=10.0, scaled_embedding=True,
)  # fmt: skip

SMOLLM3 = dataclasses.replace(LLAMA, layers=3, no_rope_layers=(1,))

# Three rows that hold four sequences: behind padding; two of them packed, before padding; alone.
SEGMENTS = np.array([[0] * 4 + [1] * 8, [1] * 5 + [2] * 6 + [0], [3] * 12])
POSITIONS = np.array([[0] * 4 + [*range(8)], [*range(5), *range(6), 0], [*range(12)]])
PLACES = [(0, slice(4, 12)), (1, slice(0, 5)), (1, slice(5, 11)), (2, slice(0, 12))]
TOKENS = np.random.default_rng(0).integers(0, 23, SEGMENTS.shape)

# One program a family for all tests of whole sequences.
forward = jax.jit(decoder.forward, static_argnames=("config", "keep_kv"))


@functools.cache
def model(family):
    config = (FAMILIES | {"mixed": MIXED, "smollm3": SMOLLM3})[family]
    return numpy_decoder.random_params(0, decoder.init, config), config


def hidden_of(family, tokens=TOKENS, segments=SEGMENTS, positions=POSITIONS):
    return np.asarray(forward(*model(family), tokens, segments, positions)[0])


every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_forward_is_the_network_in_plain_numpy_whatever_the_packing_and_padding(family):
    params, config = model(family)
    got, _ = forward(params, config, TOKENS, SEGMENTS, POSITIONS)
    got_logits = decoder.logits(params, config, got)
    exact = numpy_decoder.to_float64(params)
    for row, place in PLACES:
        want = numpy_decoder.hidden(exact, config, TOKENS[row, place])
        np.testing.assert_allclose(got[row, place], want, atol=1e-4)
        np.testing.assert_allclose(got_logits[row, place], numpy_decoder.logits(exact, config, want), atol=1e-4)


# Where tokens are changed, and which positions do not see it.
CHANGES = {
    "a later token": (np.arange(12) == 8, (SEGMENTS > 0) & (np.arange(12) < 8)),
    "the segment before": (SEGMENTS == 1, (SEGMENTS == 2)),
    "padding": (SEGMENTS == 0, SEGMENTS > 0),
}


@every_family
@pytest.mark.parametrize(("changed", "unseen"), CHANGES.values(), ids=CHANGES.keys())
def test_a_position_sees_its_own_segment_up_to_itself(family, changed, unseen):
    before, after = hidden_of(family), hidden_of(family, np.where(changed, (TOKENS + 1) % 23, TOKENS))
    np.testing.assert_array_equal(after[unseen], before[unseen])
    if changed.ndim == 1:
        assert (np.abs(after[:, 8:11] - before[:, 8:11]).max(-1) > 1e-5).all(), "every later position sees it"


@every_family
def test_a_row_moved_right_by_padding_keeps_its_hidden_states(family):
    left = hidden_of(family)[0, 4:]
    moved, segments, positions = TOKENS.copy(), SEGMENTS.copy(), POSITIONS.copy()
    moved[0], segments[0], positions[0] = np.roll(TOKENS[0], -4), np.roll(SEGMENTS[0], -4), np.roll(POSITIONS[0], -4)
    np.testing.assert_allclose(hidden_of(family, moved, segments, positions)[0, :8], left, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2-shift", "mixed", "smollm3"])
def test_scanned_layers_equal_unrolled_ones_keys_and_values_included(family):
    params, config = model(family)
    unstacked = decoder.unstack(params)
    assert len(unstacked["layers"]) == config.layers
    scanned, (keys, values) = forward(params, config, TOKENS, SEGMENTS, POSITIONS, keep_kv=True)
    unrolled, kept = forward(unstacked, config, TOKENS, SEGMENTS, POSITIONS, keep_kv=True)
    np.testing.assert_allclose(unrolled, scanned, atol=1e-5)
    assert len(kept) == config.layers
    for layer, (key, stored) in enumerate(kept):
        assert key.shape == stored.shape == (*TOKENS.shape, config.kv_heads, config.head_dim)
        np.testing.assert_allclose(key, keys[layer], atol=1e-5)
        np.testing.assert_allclose(stored, values[layer], atol=1e-5)


def test_attention_by_kernels_gets_no_window_where_layers_differ_in_rotary_positions_alone(monkeypatch):
    """The TPU's kernel has no windows, and cuDNN's would get a mask of [T, T] for one."""
    windows = []

    def spy(segments, packed):
        return lambda query, key, value, window: windows.append(window) or query

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "cudnn", spy)
    params = decoder.abstract(SMOLLM3)
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def loss(params, tokens, attend_by):
        return decoder.forward(params, SMOLLM3, tokens, tokens, tokens, attend_by=attend_by)[0].sum()

    gradients = jax.eval_shape(jax.grad(functools.partial(loss, attend_by="splash")), params, tokens)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, params)
    jax.eval_shape(functools.partial(loss, attend_by="cudnn"), params, tokens)
    assert set(windows) == {0}


def test_the_first_layers_are_those_of_the_whole_model_in_window_and_rotary_positions_too():
    params, config = model("mixed")
    cut = config.first_layers(2)
    assert (cut.kinds, cut.window_layers, cut.no_rope_layers) == (config.kinds[:2], (0,), ())
    unstacked = decoder.unstack(params)
    want, _ = forward(unstacked | {"layers": unstacked["layers"][:2]}, cut, TOKENS, SEGMENTS, POSITIONS)
    got, _ = forward(decoder.first_layers(params, 2), cut, TOKENS, SEGMENTS, POSITIONS)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_joined_weights_give_the_same_hidden_states(family):
    params, config = model(family)
    unstacked = decoder.unstack(params)
    fused = gpu_form.fuse(unstacked, config)
    gated = {"gate", "up"} if config.gated else set()
    assert unstacked["layers"][0].keys() - fused["layers"][0].keys() == {"query", "key", "value"} | gated
    jax.tree.map(np.testing.assert_array_equal, gpu_form.fuse(fused, config), fused)
    expected, _ = forward(unstacked, config, TOKENS, SEGMENTS, POSITIONS)
    actual, _ = forward(fused, config, TOKENS, SEGMENTS, POSITIONS)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_joined_weights_are_divided_by_kv_head_and_hidden_unit():
    config = dataclasses.replace(LLAMA, bias=True)
    fused = gpu_form.fuse(decoder.unstack(decoder.init(jax.random.key(0), config)), config)
    mesh = jax.sharding.AbstractMesh((config.kv_heads,), ("tensor",))
    layer = sharding.of_model(decoder.LanguageModel(fused, config), mesh, sharding.DECODE).params["layers"][0]
    assert layer["qkv"]["kernel"].spec == P(None, "tensor", None, None)
    assert layer["qkv"]["bias"].spec == P("tensor", None, None)
    assert layer["gate_up"]["kernel"].spec == P(None, None, "tensor")
    assert layer["gate_up"]["bias"].spec == P(None, "tensor")


@pytest.mark.parametrize("tied", [True, False])
@every_family
def test_transposed_weights_give_the_same_hidden_states_and_logits(family, tied):
    _, config = model(family)
    config = dataclasses.replace(config, tied=tied)
    params = decoder.init(jax.random.key(1), config)
    turned = decoder.unstack(params, transposed=True)
    assert cpu_form.is_transposed(turned) and not cpu_form.is_transposed(decoder.unstack(params))
    assert [cpu_form.positions_last(turned, rows) for rows in (1, 2)] == [False, True]
    assert not cpu_form.positions_last(decoder.unstack(params), 2)
    assert {path[-1].key for path, _ in jax.tree.leaves_with_path(turned)}.isdisjoint({"kernel", "head"})
    expected, _ = forward(params, config, TOKENS, SEGMENTS, POSITIONS)
    actual, _ = forward(turned, config, TOKENS, SEGMENTS, POSITIONS)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    for hidden in (expected, expected[:, 0], expected[0, 0]):
        logits = decoder.logits(turned, config, hidden)
        assert logits.shape == (*hidden.shape[:-1], config.vocab_size)
        np.testing.assert_allclose(logits, decoder.logits(params, config, hidden), atol=1e-5)


def test_gradients_are_finite_and_padding_gets_none():
    """A row of padding attends to nothing, and a softmax over nothing is where nan would come from."""
    params, config = model("llama")
    tokens = np.where(SEGMENTS == 0, 22, TOKENS % 22)  # token 22 occurs in the padding alone

    @jax.jit
    def loss(params):
        hidden, _ = decoder.forward(params, config, tokens, SEGMENTS, POSITIONS)
        return jnp.sum(jnp.where(SEGMENTS[..., None] > 0, hidden, 0) ** 3)

    gradient = jax.grad(loss)(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
    np.testing.assert_array_equal(gradient["embedding"][22], 0)
    assert (np.abs(gradient["embedding"][np.unique(TOKENS % 22)]).max(-1) > 0).all()


@pytest.mark.parametrize(("family", "count"), [("llama", 3), ("mixed", 3), ("gpt2", 2)])
def test_a_gradient_keeps_the_hidden_units_before_and_after_the_activation_alone(family, count):
    """Their gate too, where there is one; the rest of the activation is computed again."""
    config = dataclasses.replace(model(family)[1], mlp=113)  # a width that nothing else has

    def backward(params):
        hidden_of = functools.partial(decoder.forward, config=config, tokens=TOKENS, segments=SEGMENTS, remat="none")
        return jax.vjp(lambda params: hidden_of(params, positions=POSITIONS)[0], params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, decoder.abstract(config)))
    assert [leaf.shape for leaf in kept].count((config.layers, *TOKENS.shape, 113)) == count


def test_bfloat16_computes_near_float32_and_gives_float32_logits():
    params, config = model("llama")
    half = dataclasses.replace(config, dtype="bfloat16")
    got, _ = forward(params, half, TOKENS, SEGMENTS, POSITIONS)
    assert got.dtype == jnp.bfloat16
    logits = decoder.logits(params, half, got)
    assert logits.dtype == jnp.float32
    want = decoder.logits(params, config, hidden_of("llama"))
    place = SEGMENTS > 0
    assert np.abs(np.asarray(logits - want))[place].mean() < 0.02 * np.asarray(want)[place].std()


@pytest.mark.parametrize("size", ["llama3.1-8b", "llama3.2-1b", "llama3-8b", "qwen3-8b"])
def test_rotary_positions_are_scaled_as_published_up_to_the_last_position(size):
    config = configs.make(size)
    positions = np.array([[0, 1, 8191, 8192, config.max_positions - 1]])
    plain = config.rope_theta ** (-2 * np.arange(config.head_dim // 2) / config.head_dim)
    frequencies = np.array([numpy_decoder.frequency(config, f) for f in plain])
    scaled = ~np.isclose(frequencies, plain)
    assert scaled.any() == (config.rope_factor > 1) and not scaled.all()
    cos, sin = decoder.rotations(positions, config)["main"]
    angles = positions[0][:, None] * frequencies
    # An angle of 1e5 radians, in float32, is known to 1e5 * 2^-24.
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angles), atol=1.5e-7 * positions.max())
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angles), atol=1.5e-7 * positions.max())
    np.testing.assert_allclose(cos[0, 1, 0], np.cos(angles[1]), atol=1e-6)


@every_family
def test_init_gives_the_abstract_tree_and_each_layer_leaf_begins_with_the_layers(family):
    config = FAMILIES[family]
    abstract = decoder.abstract(config)
    params = jax.eval_shape(lambda key: decoder.init(key, config), jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, jnp.dtype("float32")), abstract
    )
    assert {leaf.shape[0] for leaf in jax.tree.leaves(abstract["layers"])} == {config.layers}
    assert ("head" in abstract, "positions" in abstract) == (not config.tied, config.positions == "learned")
    assert ("token_shift" in abstract) == config.token_shift
    assert {leaf.dtype for leaf in jax.tree.leaves(decoder.abstract(config, "bfloat16"))} == {jnp.dtype("bfloat16")}


def test_an_untrained_model_has_layers_that_differ_and_nearly_uniform_next_tokens():
    config = dataclasses.replace(FAMILIES["gpt2-shift"], layers=3)
    params = jax.jit(lambda key: decoder.init(key, config))(jax.random.key(0))
    kernels = np.asarray(params["layers"]["query"]["kernel"])
    assert (np.abs(kernels[0] - kernels[1]).mean(), np.abs(kernels[1] - kernels[2]).mean()) > (0.1, 0.1)
    logits = decoder.logits(params, config, forward(params, config, TOKENS, SEGMENTS, POSITIONS)[0])
    assert 0.3 < np.asarray(logits)[SEGMENTS > 0].std() < 3


@pytest.mark.parametrize("option", [("jax_enable_x64", True), ("jax_default_prng_impl", "rbg")])
def test_initial_weights_do_not_depend_on_the_process_s_defaults(option):
    config = configs.make("tiny", vocab_size=20, qkv_bias=True, positions="learned", token_shift=True)
    key = jax.random.key(3, impl="threefry2x32")
    jax.clear_caches()  # another test may have compiled some of it with other optimizations
    want = value.init(key, ValueConfig(config), decoder.init(key, config))
    name, changed = option
    before = getattr(jax.config, name)
    jax.config.update(name, changed)
    try:
        got = value.init(key, ValueConfig(config), decoder.init(key, config))
    finally:
        jax.config.update(name, before)
    assert_trees_equal(got, want)
