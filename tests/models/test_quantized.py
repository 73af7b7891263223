"""Quantized weights: products against numpy, and models against the same models with dequantized weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_guide, random_model, refusal

from qsharp_jax import decoding
from qsharp_jax.decoding.api import for_decoding
from qsharp_jax.models import decoder, gpu_form, hf, quantized, sharding
from qsharp_jax.models.config import make
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.quantized import Quantized
from qsharp_jax.sampling import Sampling

RNG = np.random.default_rng(0)
SHAPE = dict(embed=64, heads=2, kv_heads=1, head_dim=32, mlp=128, layers=2)


def weight(*shape):
    return np.float32(RNG.normal(size=shape) * RNG.uniform(0.1, 3, size=shape[-1]))


def numpy_dense(stored: Quantized) -> np.ndarray:
    values, scales = np.asarray(stored.values, np.float64), np.asarray(stored.scales, np.float64)
    for axis in range(values.ndim):
        scales = np.repeat(scales, values.shape[axis] // scales.shape[axis], axis)
    return values * scales


def with_weights(model, quantize):
    """The model with quantized weights, and the one with these weights as float32."""
    trunk = getattr(model.config, "trunk", model.config)
    as_is = dataclasses.replace(trunk, quantize=quantize)
    config = as_is if trunk is model.config else dataclasses.replace(model.config, trunk=as_is)
    small = quantized.model(model.replace(config=config))
    dense = jax.tree.map(lambda leaf: quantized.dense(leaf, jnp.float32), small.params, is_leaf=quantized.is_quantized)
    return small, model.replace(params=dense)


@pytest.mark.parametrize("bits, group", [(8, None), (4, 32)])
def test_a_product_is_that_of_the_dequantized_weight(bits, group):
    kernel, x = weight(96, 40), weight(5, 96)
    stored = quantized.quantize(kernel, bits=bits, group=group)
    dense = numpy_dense(stored)
    for actual in (quantized.product(x, stored, jnp.float32), x @ quantized.dense(stored, jnp.float32)):
        np.testing.assert_allclose(actual, x.astype(np.float64) @ dense, rtol=1e-5, atol=1e-5 * np.abs(dense).max())
    turned = quantized.quantize(kernel.T, bits=bits, group=group, axis=-1)
    np.testing.assert_array_equal(quantized.dense(turned, jnp.float32), quantized.dense(stored, jnp.float32).T)
    # The largest of a group is exact; no other is off by more than half a step, but for 4 bits' missing value 8.
    groups, values = kernel.reshape(-1, group or 96, 40), np.asarray(stored.values, int).reshape(-1, group or 96, 40)
    np.testing.assert_allclose(np.abs(stored.scales), np.abs(groups).max(1) / {8: 127, 4: 8}[bits], rtol=1e-6)
    assert (values.max(1) == 127).all() if bits == 8 else (values.min(1) == -8).all()
    error = np.abs(groups - dense.reshape(groups.shape)) / np.abs(stored.scales)[:, None]
    assert error.max() < 1 and error[values < 7].max() < 0.5 + 1e-4 and (bits == 4 or error.max() < 0.5 + 1e-4)


def test_a_channel_of_zeros_stays_zero():
    stored = quantized.quantize(np.zeros((32, 2), np.float32), bits=4, group=32)
    np.testing.assert_array_equal(quantized.dense(stored, jnp.float32), 0)


@pytest.mark.parametrize("quantize, tied", [("int8", False), ("int4", True)])
def test_logits_in_every_form_are_those_of_the_dequantized_model(quantize, tied):
    model = random_model(40, **SHAPE)
    params = model.params if not tied else {name: leaf for name, leaf in model.params.items() if name != "head"}
    model = LanguageModel(params, dataclasses.replace(model.config, tied=tied))
    small, dense = with_weights(model, quantize)
    tokens = np.array([[3, 5, 7, 9], [1, 2, 0, 0]])
    segments, positions = np.array([[1, 1, 1, 1], [1, 1, 0, 0]]), np.arange(4) * np.ones((2, 1), int)

    def logits(params):
        hidden, _ = decoder.forward(params, small.config, tokens, segments, positions)
        return np.asarray(decoder.logits(params, small.config, hidden))[segments > 0]

    expected = logits(dense.params)
    unstacked = decoder.unstack(small.params)
    forms = [small.params, decoder.unstack(small.params, transposed=True), gpu_form.fuse(unstacked, small.config)]
    assert "qkv" in forms[2]["layers"][0] and "gate_up" in forms[2]["layers"][0]
    for params in forms:
        np.testing.assert_allclose(logits(params), expected, atol=2e-5)


def test_greedy_responses_are_those_of_the_dequantized_models():
    ref, dense_ref = with_weights(random_model(40, scale=3.0, **SHAPE), "int8")
    float_guide = random_guide(dataclasses.replace(ref.config, quantize="int4"), seed=1, scale=4.0)
    _, dense_guide = with_weights(float_guide, "int4")
    settings = Sampling(eta=0.2, temperature=0.0, top_k_candidates=4, max_new_tokens=8)

    def generate(ref, guide):
        return decoding.generate(ref, guide, [[1, 5, 7], [2]], settings, rng=0)

    guided = generate(ref, float_guide)  # whose trunk is quantized for decoding, as its config says
    expected = generate(dense_ref, dense_guide)
    np.testing.assert_array_equal(guided.tokens, expected.tokens)
    np.testing.assert_allclose(guided.kl, expected.kl, atol=2e-5)
    np.testing.assert_allclose(guided.values, expected.values, atol=2e-5)


def test_what_is_quantized():
    ref, guide = random_model(40, **SHAPE), random_guide(make("tiny", vocab_size=40, **SHAPE, quantize="int4"))
    params = for_decoding(guide).params["trunk"]
    layer = params["layers"][0]
    assert {layer[name]["weight"].values.dtype for name in ("query", "output", "down")} == {jnp.int4.dtype}
    assert layer["down"]["weight"].scales.shape == (64, 1) and layer["query"]["weight"].scales.shape == (64, 2)
    assert params["embedding"].values.dtype == jnp.int8 and params["embedding"].scales.shape == (40, 1)
    kept = [layer["mlp_norm"]["scale"], params["final_norm"]["scale"], guide.params["head"]["kernel"]]
    assert not any(map(quantized.is_quantized, kept))
    assert quantized.tree(ref.params, "none") is ref.params


def test_experts_are_those_of_the_dequantized_model():
    experts = dict(experts=4, experts_per_token=2, normalized_router=True)
    small, dense = with_weights(random_model(40, **SHAPE | dict(layers=1), **experts), "int4")
    assert small.params["layers"]["experts"]["down"].values.dtype == jnp.int8
    for tokens in (np.array([[3, 5, 7]]), np.array([[3]])):  # one token goes through its own experts only
        ones = np.ones(tokens.shape, int)
        hidden, expected = (
            decoder.forward(model.params, small.config, tokens, ones, ones)[0] for model in (small, dense)
        )
        np.testing.assert_allclose(hidden, expected, atol=2e-5)


def test_a_folder_is_quantized_as_it_is_read(made):
    read = hf.load_ref(made / "llama", dtype="bfloat16", quantize="int8")
    whole = hf.load_ref(made / "llama", dtype="float32")
    expected = quantized.tree(whole.params, "int8")
    assert read.config.quantize == "int8" and jax.tree.structure(read.params) == jax.tree.structure(expected)
    for actual, leaf in zip(jax.tree.leaves(read.params), jax.tree.leaves(expected), strict=True):
        assert actual.dtype in (jnp.int8, jnp.float32) or leaf.ndim < 2
        np.testing.assert_array_equal(actual, leaf.astype(actual.dtype))


def test_widths_without_groups_are_refused():
    model = random_model(40, **SHAPE | dict(mlp=72))
    assert "72 inputs of down, which groups of 32 do not divide, as int4 needs; use int8" in refusal(
        quantized.tree, model.params, "int4"
    )


def test_scales_are_divided_like_outputs_and_like_even_groups():
    config = make("tiny", vocab_size=64, embed=256, heads=8, kv_heads=2, head_dim=64, mlp=256, layers=1)
    mesh = jax.sharding.AbstractMesh((4,), ("tensor",))

    def specs(quantize):
        shapes = LanguageModel(decoder.abstract(config), dataclasses.replace(config, quantize=quantize))
        small = jax.eval_shape(quantized.model, shapes)
        return sharding.of_model(small, mesh, sharding.DECODE).params

    layers, P = specs("int8")["layers"], jax.sharding.PartitionSpec
    assert layers["up"]["kernel"].values.spec == layers["up"]["kernel"].scales.spec == P(None, None, "tensor")
    assert layers["down"]["kernel"].values.spec == P(None, "tensor", None)
    assert layers["down"]["kernel"].scales.spec == P(None, None, None)  # one for all inputs
    assert layers["key"]["kernel"].scales.spec == P(None, None, None)  # two kv heads on four devices
    layers = specs("int4")["layers"]
    assert layers["output"]["kernel"].scales.spec == P(None, "tensor", None)  # four groups
    assert layers["down"]["kernel"].scales.spec == P(None, None, None)  # two groups
