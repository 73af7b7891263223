"""The mixture of experts against a loop over tokens in NumPy, and on a mesh of fake devices against one device.

The devices are made by a process of its own, which is this file run as a script.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import QWEN3_MOE
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from processes import printed_on_fake_devices

from qsharp_jax.models import config, decoder, meshes, moe, sharding
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.plan import weights

N, K, D, F = 12, 3, 8, 6
CONFIG = dataclasses.replace(QWEN3_MOE, experts=N, experts_per_token=K, embed=D, mlp=F, heads=2, kv_heads=1)


def params_and_tokens(batch, length):
    rng = np.random.default_rng(0)
    shapes = dict(router=(D, N), gate=(N, D, F), up=(N, D, F), down=(N, F, D))
    params = {name: jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32) for name, shape in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(batch, length, D)), jnp.float32)


def by_token(params, x, normalized):
    """One token after another, in float64."""
    params, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x))
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        logits = x[place] @ params["router"]
        share = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        chosen = np.argsort(-share)[:K]
        for expert in chosen:
            gate = x[place] @ params["gate"][expert]
            hidden = gate / (1 + np.exp(-gate)) * (x[place] @ params["up"][expert])
            out[place] += share[expert] * (hidden @ params["down"][expert]) / (share[chosen].sum() if normalized else 1)
    return out


@pytest.mark.parametrize("shape, mix", [((3, 1), "_few_tokens"), ((2, 5), "_all_experts")])
@pytest.mark.parametrize("normalized", [True, False])
def test_each_token_goes_through_its_own_experts(shape, mix, normalized, monkeypatch):
    """Few tokens and many, each the way that is meant for them."""
    other = {"_few_tokens": "_all_experts", "_all_experts": "_few_tokens"}[mix]
    monkeypatch.setattr(moe, other, None)
    params, x = params_and_tokens(*shape)
    changed = dataclasses.replace(CONFIG, normalized_router=normalized)
    np.testing.assert_allclose(moe.feed_forward(params, changed, x), by_token(params, x, normalized), atol=1e-5)


def test_both_ways_have_the_same_gradient(monkeypatch):
    params, x = params_and_tokens(1, 3)

    def loss(params, x):
        return jnp.sin(moe.feed_forward(params, CONFIG, x)).sum()

    few = jax.grad(loss, argnums=(0, 1))(params, x)
    monkeypatch.setattr(moe, "_few_tokens", moe._all_experts)
    every = jax.grad(loss, argnums=(0, 1))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), few, every)
    assert float(jnp.abs(few[0]["router"]).max()) > 0.1


def test_experts_are_divided_by_their_hidden_units():
    model = LanguageModel(decoder.abstract(CONFIG), CONFIG)
    specs = sharding.of_model(model, AbstractMesh((2, 2), ("fsdp", "tensor")), sharding.FIT).params["layers"]["experts"]
    assert specs["gate"].spec == P(None, None, "fsdp", "tensor") and specs["down"].spec == P(None, None, "tensor", "fsdp")
    assert specs["router"].spec == P(None, "fsdp", None)


def test_what_a_token_is_multiplied_with_is_counted():
    """Qwen 3 30B-A3B has 3.3e9 weights a token, of which the embedding and the head have 0.6e9."""
    shape = config.make("qwen3-30b-a3b")
    few, every = (weights.weights_per_token(decoder.abstract(shape), shape, tokens) for tokens in (1, 16))
    tables = 2 * shape.vocab_size * shape.embed
    assert few + tables == pytest.approx(3.35e9, rel=5e-3) and every + tables == pytest.approx(30.53e9, rel=1e-3)


@pytest.mark.slow
def test_devices_together_compute_what_one_does():
    assert printed_on_fake_devices(__file__)[0] == ["fit", "decode"]


def main():
    """On each mesh, output and gradient are those of one device; prints the meshes' names as JSON."""
    params, x = params_and_tokens(2, 5)

    def loss(params, x):
        y = moe.feed_forward(params, CONFIG, x)
        return jnp.sin(y).sum(), y

    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    expected = step(params, x)
    names = []
    layer = LanguageModel({"layers": [{"experts": params}]}, CONFIG)
    for name, sizes, rules in (
        ("fit", {"data": 1, "fsdp": 2, "tensor": 2}, sharding.FIT),
        ("decode", {"data": 2, "attention_data": 1, "tensor": 2}, sharding.DECODE),
    ):
        mesh = meshes.make_mesh(sizes, rules, jax.devices()[:4])
        placed = jax.device_put(layer, sharding.of_model(layer, mesh, rules)).params["layers"][0]["experts"]
        with jax.set_mesh(mesh):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), step(placed, x), expected)
        names.append(name)
    print(json.dumps(names))


if __name__ == "__main__":
    main()
