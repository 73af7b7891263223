"""Quantized weights: products against numpy, and models against the same models with dequantized weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import traced_for
from helpers import random_guide, random_model, refusal
from jax.experimental import pallas as pl
from marks import slow

from qsharp_jax import decoding
from qsharp_jax.data.batches import Example
from qsharp_jax.decoding import api, engine, loop
from qsharp_jax.decoding.api import for_decoding
from qsharp_jax.evaluation.score import log_probs as log_probs_of
from qsharp_jax.models import decoder, gpu_form, hf, memory, quantized, sharding, value
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


@pytest.mark.parametrize("quantize, tied", [slow("int8", False), ("int4", True)])
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


def test_greedy_responses_are_those_of_the_dequantized_model():
    """Keys and values are rounded in decoding as in whole passes over prompt and response."""
    small, dense = with_weights(random_model(40, scale=3.0, **SHAPE), "int8")
    prompt, new, places = [1, 5, 7], 8, np.arange(11)[None]
    tokens = np.pad(prompt, (0, new))[None]

    @jax.jit
    def hidden(params, tokens, segments):
        return decoder.forward(params, small.config, tokens, segments, places)[0]

    for length in range(3, 3 + new):
        last = hidden(dense.params, tokens, (places < length).astype(int))[0, length - 1]
        tokens[0, length] = decoder.logits(dense.params, small.config, last).argmax()
    greedy = decoding.generate(small, None, [prompt], Sampling(temperature=0.0, max_new_tokens=new), rng=0)
    assert greedy.response(0) == tokens[0, 3:].tolist()


def test_keys_and_values_are_rounded_once_and_for_all():
    """Exactly in bfloat16 as in float32, to within half a step; scales are powers of two."""
    x = weight(50, 3, 32)
    for dtype in (jnp.float32, jnp.bfloat16):
        rounded = quantized.rounded(jnp.asarray(x, dtype))
        np.testing.assert_array_equal(quantized.rounded(rounded), rounded)
        stored = quantized.in_8_bits(jnp.asarray(x, dtype))
        np.testing.assert_array_equal(quantized.dense(stored, jnp.float32), jnp.float32(rounded))
        mantissas, _ = np.frexp(np.float32(stored.scales))
        assert (mantissas == 0.5).all() and stored.values.dtype == jnp.int8
        assert (np.abs(np.asarray(stored.values, int)).max(-1) > 63).all(), "seven bits at least"
        error = np.abs(jnp.float32(rounded) - np.float32(jnp.asarray(x, dtype))) / np.float32(stored.scales)
        assert error.max() <= 0.5
    np.testing.assert_array_equal(quantized.rounded(jnp.zeros((2, 32))), 0)


@pytest.mark.parametrize("platform, shares", [("cuda", True), slow("tpu", False)])
def test_caches_of_8_bits_give_the_responses_of_rounded_floats(platform, shares, monkeypatch):
    """In the forms for accelerators, the CUDA kernel interpreted, with long prompts in chunks; and by teacher forcing."""
    shape = dict(embed=32, heads=4, kv_heads=2, head_dim=16, layers=1, mlp=32, max_positions=192)
    ref = random_model(40, scale=2.0, **shape)
    ref = quantized.model(ref.replace(config=dataclasses.replace(ref.config, quantize="int8")))
    guide = quantized.model(random_guide(ref.config, seed=1, scale=4.0))
    prompts, seeds = [[1, 5, 7], [2] * 40, [3, 4, 9, 9, 2] * 10], np.arange(6)
    settings = Sampling(
        eta=0.2, budget=[16, 3, 16, 16, 9, 16], stop_ids=[0], top_k_candidates=4, max_new_tokens=64, prompt_bucket=64
    )

    def generate(ref, guide):
        return decoding.generate(ref, guide, prompts, settings, rng=seeds, samples=2)

    wanted = generate(ref, guide)
    for row, prompt in enumerate(np.repeat(np.asarray(prompts, object), 2)):
        example = Example(list(prompt), wanted.response(row))
        (log_probs,) = log_probs_of(ref, [example], rows=1, bucket=8, vocab_size=40)
        np.testing.assert_allclose(log_probs, wanted.ref_log_probs[row, : wanted.lengths[row]], atol=1e-4)

    monkeypatch.setattr(api, "SHARED", 1 if shares else 1 << 30)
    monkeypatch.setattr(api, "SHARED_TO_NEW", 0)
    monkeypatch.setattr(loop, "prefill", functools.partial(loop.prefill, chunk=24))
    ref, guide = ref.replace(params=decoder.unstack(ref.params)), guide.replace(params=value.unstack(guide.params))
    decode = functools.partial(api.decode.__wrapped__)  # of its own: the traces of a function are kept
    compiled = jax.jit(decode, static_argnames=("settings", "block"), donate_argnames=("state",))
    interpreted, kernels = functools.partial(pl.pallas_call, interpret=True), []
    monkeypatch.setattr(pl, "pallas_call", lambda *a, **options: kernels.append(options) or interpreted(*a, **options))
    monkeypatch.setattr(api, "decode", compiled)
    monkeypatch.setattr(engine, "decode", compiled)
    with traced_for(platform):
        state = decoding.Run(ref, guide, prompts, settings, rng=seeds, samples=2).state
        assert state.ref_cache.keys[0].values.dtype == state.guide_cache.values[0].values.dtype == jnp.int8
        whole = generate(ref, guide)
        batch = decoding.ContinuousBatch(ref, guide, prompts, settings, rng=seeds, samples=2, rows=2)
        parts = [(place, part, row) for places, part in batch for row, place in enumerate(places.tolist())]
    assert kernels
    assert sorted(place for place, _, _ in parts) == list(range(6))
    for place, part, row in [(place, whole, place) for place in range(6)] + parts:
        np.testing.assert_array_equal(part.tokens[row], wanted.tokens[place])
        for name in ("log_probs", "kl", "values"):
            np.testing.assert_allclose(getattr(part, name)[row], getattr(wanted, name)[place], atol=1e-4, err_msg=name)


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


@pytest.mark.slow
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


def test_a_folder_s_dequantized_weights_must_fit_on_a_cpu_too(made, monkeypatch):
    """Before anything is read: all weights but the embedding, four bytes each; norms are not quantized."""
    config = hf.read_config(made / "llama", "float32")
    kernels = [leaf.size for leaf in jax.tree.leaves(decoder.abstract(config)["layers"]) if leaf.ndim > 2]
    copies = 4 * (sum(kernels) + config.vocab_size * config.embed)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(hf.load_ref(made / "llama", dtype="float32", quantize="int8")))
    monkeypatch.setattr(memory, "available", lambda device: weights + copies)
    hf.load_ref(made / "llama", dtype="float32", quantize="int8")
    monkeypatch.setattr(memory, "available", lambda device: weights + copies - 1)
    assert "and the dequantized weights" in refusal(hf.load_ref, made / "llama", dtype="float32", quantize="int8")


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
