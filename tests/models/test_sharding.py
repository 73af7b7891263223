"""Rules and shardings, and guided decoding on meshes of fake devices against one device.

The devices are made by a process of its own, which is this file run as a script: XLA reads their number when it starts.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_guide, random_model
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from processes import printed_on_fake_devices

from qsharp_jax import decoding
from qsharp_jax.decoding import api
from qsharp_jax.models import config, cpu_form, decoder, memory, meshes, quantized, sharding, value
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import KVCache
from qsharp_jax.models.sharding import DECODE, FIT
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import Sampling
from qsharp_jax.system.errors import UserError

PROMPTS = [[1, 5, 7], [2], [3, 4, 9, 9, 2], [8, 1], [6, 6, 6], [30, 31], [17], [1, 2, 3, 4]]
SETTINGS = dict(
    eta=[0.1, 0.2, 0.5, jnp.inf, 0.1, 0.1, 0.3, 0.2], temperature=[1, 1, 0.7, 1, 0, 1, 1.3, 1],
    top_p=[1, 0.9, 0.8, 0.9, 1, 0.7, 0.9, 1], top_k=[0, 0, 5, 0, 0, 0, 7, 0], top_k_candidates=4, max_new_tokens=12,
    stop_ids=[0],
)  # fmt: skip
MESHES = {
    "tensor 2": {"tensor": 2},
    "tensor 4, more than kv heads": {"tensor": 4},
    "data 2": {"data": 2},
    "data 2, tensor 4": {"data": 2, "tensor": 4},
    "caches apart, mlp together": {"attention_data": 2, "tensor": 2},
}
CASES = [("own", name) for name in MESHES]
CASES += [(variant, "data 2, tensor 4") for variant in ("packed", "quantized", "sharing a prompt")]
QUICK = [(variant, "data 2, tensor 4") for variant in ("own", "quantized", "sharing a prompt")]
SLOW = [case for case in CASES if case not in QUICK]


# --- In the other process: decode on every mesh ---------------------------------------------------------------------


def models():
    ref = random_model(40, scale=2.0, layers=2, heads=4, kv_heads=2, head_dim=8)
    trunk = config.make(
        "tiny", vocab_size=40, embed=16, layers=1, heads=4, kv_heads=4, head_dim=8, mlp=32, max_positions=23, tied=True
    )
    return ref, random_guide(trunk, seed=1, scale=4.0)


def in_8_bits(model):
    """A reference with quantized weights, or a guide whose weights decoding quantizes."""
    if isinstance(model, ValueModel):
        trunk = dataclasses.replace(model.config.trunk, quantize="int8")
        return model.replace(config=dataclasses.replace(model.config, trunk=trunk))
    return quantized.model(model.replace(config=dataclasses.replace(model.config, quantize="int8")))


def decoded(ref, guide, *, samples=1, **changes):
    prompts = PROMPTS[: len(PROMPTS) // samples]
    made = decoding.generate(ref, guide, prompts, Sampling(**SETTINGS | changes), rng=3, samples=samples)
    names = ("tokens", "lengths", "dropped", "log_probs", "ref_log_probs", "kl", "kl_truncated", "values")
    return {name: np.nan_to_num(getattr(made, name), nan=-9).tolist() for name in names}


def main(*names: str):
    """Prints a JSON object: by variant, what one device gives and what each mesh does."""
    of_variant = dict.fromkeys(("own", "packed", "sharing a prompt"), models())
    of_variant["quantized"] = [in_8_bits(model) for model in models()]
    variants = {"own": {}, "packed": dict(candidate_slots=2), "quantized": {}, "sharing a prompt": dict(samples=4)}
    results = {
        variant: {"one device": decoded(*of_variant[variant], **changes)} for variant, changes in variants.items()
    }
    api.SHARED, api.SHARED_TO_NEW = 1, 0  # on the meshes, prompts of any length are shared
    for name in names:
        sizes = MESHES[name]
        devices = jax.devices()[: np.prod(list(sizes.values()))]
        mesh = meshes.make_mesh(sizes, DECODE, devices)
        with jax.set_mesh(mesh):
            for variant, changes in variants.items():
                if (variant, name) in CASES:
                    placed = [sharding.move(model, mesh, DECODE) for model in of_variant[variant]]
                    results[variant][name] = decoded(*placed, **changes)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])


# --- In the tests ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    return printed_on_fake_devices(__file__, *{mesh for _, mesh in QUICK})[0]


@pytest.fixture(scope="module")
def slow_results():
    return printed_on_fake_devices(__file__, *{mesh for _, mesh in SLOW})[0]


@pytest.mark.parametrize("variant, mesh", QUICK)
def test_a_mesh_decodes_what_one_device_does(results, variant, mesh):
    check(results, variant, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("variant, mesh", SLOW)
def test_smaller_meshes_decode_what_one_device_does(slow_results, variant, mesh):
    check(slow_results, variant, mesh)


def check(results, variant, mesh):
    expected, actual = results[variant]["one device"], results[variant][mesh]
    for name in ("tokens", "lengths", "dropped"):
        assert actual[name] == expected[name], name
    for name in ("log_probs", "ref_log_probs", "kl", "kl_truncated", "values"):
        np.testing.assert_allclose(actual[name], expected[name], atol=1e-4, err_msg=name)
    assert np.max(expected["kl"]) > 0.01, "the guide steers"


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def specs(tree):
    return jax.tree.map(lambda placed: placed.spec, tree)


def abstract_ref(stacked=False, **changes):
    shape = config.make("llama3.2-1b", layers=2, **changes)
    params = decoder.abstract(shape)
    return LanguageModel(params if stacked else jax.eval_shape(decoder.unstack, params), shape)


def test_weights_are_divided_as_the_table_says():
    mesh = mesh_of(data=2, tensor=4)
    made = specs(sharding.of_model(abstract_ref(), mesh, DECODE)).params
    layer = made["layers"][1]
    assert made["embedding"] == P("tensor", None)
    assert layer["query"]["kernel"] == layer["key"]["kernel"] == layer["up"]["kernel"] == P(None, "tensor")
    assert layer["output"]["kernel"] == layer["down"]["kernel"] == P("tensor", None)
    assert layer["attention_norm"]["scale"] == P(None)
    uneven = specs(sharding.of_model(abstract_ref(vocab_size=50_257), mesh_of(tensor=4), DECODE)).params
    assert uneven["embedding"] == P(None, None)
    stacked = specs(sharding.of_model(abstract_ref(stacked=True), mesh_of(data=2, fsdp=2, tensor=2), FIT)).params
    assert stacked["layers"]["query"]["kernel"] == P(None, "fsdp", "tensor")
    assert stacked["layers"]["down"]["kernel"] == P(None, "tensor", "fsdp")
    assert stacked["embedding"] == P("tensor", "fsdp")


def test_transposed_weights_are_divided_as_what_they_replace():
    mesh = mesh_of(data=2, tensor=4)
    kernels = abstract_ref(tied=False)
    transposed = kernels.replace(params=jax.eval_shape(cpu_form.transpose, kernels.params))
    expected = specs(sharding.of_model(kernels, mesh, DECODE)).params
    actual = specs(sharding.of_model(transposed, mesh, DECODE)).params
    assert tuple(actual["head_weight"]) == tuple(expected["head"])[::-1] == ("tensor", None)
    for name in ("query", "key", "value", "output", "gate", "up", "down"):
        assert tuple(actual["layers"][1][name]["weight"]) == tuple(expected["layers"][1][name]["kernel"])[::-1]


@pytest.mark.parametrize("size", config.SIZES)
@pytest.mark.parametrize("type_", ["v", "q"])
def test_every_leaf_of_every_model_is_divided_evenly(size, type_):
    shape = config.make(size, token_shift=True)
    guide = ValueConfig(shape, type=type_)
    for model in (LanguageModel(decoder.abstract(shape), shape), ValueModel(value.abstract(guide), guide)):
        for rules in (DECODE, FIT):
            shardings = sharding.of_model(model, mesh_of(data=1, tensor=2), rules)
            jax.tree.map(lambda leaf, placed: placed.shard_shape(leaf.shape), model, shardings)


@pytest.mark.parametrize("type_, kernel", [("q", P(None, "tensor")), ("v", P(None, None))])
def test_a_q_type_head_is_divided_by_token_and_a_v_type_head_is_not(type_, kernel):
    shape = ValueConfig(abstract_ref().config, type=type_, distribution="categorical", atoms=(0.0, 1.0))
    guide = ValueModel(value.abstract(shape), shape)
    assert specs(sharding.of_model(guide, mesh_of(tensor=2), DECODE)).params["head"]["kernel"] == kernel


def test_kv_heads_that_the_tensor_axis_does_not_divide_are_on_every_device_with_their_cache():
    mesh = mesh_of(tensor=8)
    layer = specs(sharding.of_model(abstract_ref(kv_heads=4), mesh, DECODE)).params["layers"][0]
    assert layer["key"]["kernel"] == layer["value"]["kernel"] == P(None, None)
    assert layer["query"]["kernel"] == P(None, "tensor")
    assert specs(sharding.of_rows(cache(kv_heads=4), mesh, DECODE)).keys == [P(None, None, None, None)]


def cache(rows=16, kv_heads=8):
    buffer = jax.ShapeDtypeStruct((rows, kv_heads, 32, 64), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    return KVCache(keys=[buffer], values=[buffer], start=jax.ShapeDtypeStruct((rows,), jnp.int32), index=index)


def test_caches_are_divided_by_row_and_kv_head():
    made = specs(sharding.of_rows(cache(), mesh_of(data=2, attention_data=2, tensor=4), DECODE))
    assert made.keys == made.values == [P(("data", "attention_data"), "tensor", None, None)]
    assert made.start == P(("data", "attention_data"))
    assert made.index == P()


def test_memory_is_counted_where_the_caches_will_lie():
    mesh = meshes.make_mesh({"data": 1, "tensor": 1}, DECODE, jax.devices()[:1])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache())
    assert sharding.abstract_rows(zeros) is zeros, "no mesh is set"
    with jax.set_mesh(mesh):
        counted, placed = sharding.abstract_rows(cache()), sharding.place_rows(zeros)
        with pytest.raises(UserError, match="cache .* GB"):
            memory.check_memory({"the cache": sharding.abstract_rows(cache(rows=10**9))})
    assert [leaf.sharding for leaf in jax.tree.leaves(counted)] == [leaf.sharding for leaf in jax.tree.leaves(placed)]


@pytest.mark.parametrize(
    "refused, words",
    [
        (lambda: sharding.of_model(abstract_ref(heads=24), mesh_of(tensor=16), DECODE), "24 query heads .* tensor 16; .* 1, 2, 3, 4, 6, 8, 12$"),
        (lambda: sharding.of_model(abstract_ref(mlp=8190), mesh_of(tensor=4), DECODE), "8190 hidden units of the mlp .* tensor 4"),
        (lambda: sharding.of_rows(cache(rows=6), mesh_of(data=4), DECODE), "6 rows of the batch .* data 4; .* 1, 2, 3$"),
        (lambda: meshes.make_mesh({"data": 1, "fsdp": 1}, DECODE), "no sharding rule uses the mesh axis 'fsdp'"),
        (lambda: meshes.make_mesh({"data": 2}, DECODE, jax.devices()[:1]), "a mesh of data 2 needs 2 devices, and there are 1"),
        (lambda: sharding.spec(("batch", "color"), DECODE, mesh_of(data=2, tensor=2)), "unknown logical axes color"),
        (lambda: sharding.spec(("heads", "mlp"), DECODE, mesh_of(data=2, tensor=2)), "mesh axis tensor would divide two dimensions"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_is_refused(refused, words):
    with pytest.raises((UserError, ValueError), match=words):
        refused()


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, "batch", None) is x
    assert sharding.by_row(jnp.sum)(x) == 6
