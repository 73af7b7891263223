"""Checkpoints with quantized weights: packed number by number as their formats say, read and dequantized by us."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_trees_equal, refusal
from hf_folders import LLAMA, guide, load_refusal, ref
from numpy_decoder import random_params

from qsharp_jax.models import hf, lora

SHAPE = dataclasses.replace(LLAMA, head_dim=8, mlp=32)
RNG = np.random.default_rng(0)
GROUP = 8  # inputs


def pack(numbers, bits: int, axis: int, order=None):
    """Whole numbers in int32 along an axis, the first of `order` in the lowest bits."""
    each = 32 // bits
    numbers = np.moveaxis(np.asarray(numbers), axis, -1)
    packed = np.zeros((*numbers.shape[:-1], numbers.shape[-1] // each), np.uint32)
    for place in np.ndindex(packed.shape):
        for number, other in enumerate(order or range(each)):
            packed[place] |= np.uint32(numbers[*place[:-1], place[-1] * each + other]) << np.uint32(bits * number)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis)).view(np.int32)


def grouped(shape, bits: int, groups):
    """Random whole numbers [in, out], zeros and scales [G, out], and W [out, in] that they stand for."""
    out, width = shape
    count = max(groups) + 1
    numbers, zeros = RNG.integers(0, 2**bits, (width, out)), RNG.integers(1, 2**bits, (count, out))
    scales = RNG.uniform(0.01, 0.1, (count, out)).astype(np.float16)
    weight = np.empty(shape, np.float32)
    for o, i in np.ndindex(shape):
        weight[o, i] = np.float32(scales[groups[i], o]) * (numbers[i, o] - zeros[groups[i], o])
    return numbers, zeros, scales, weight


def gptq(shape, bits=4, version="gptq"):
    groups = RNG.permutation(np.arange(shape[1]) // GROUP)  # as with "desc_act"
    numbers, zeros, scales, weight = grouped(shape, bits, groups)
    stored = zeros - (version == "gptq")
    parts = {"qweight": pack(numbers, bits, 0), "qzeros": pack(stored, bits, 1), "scales": scales}
    return parts | {"g_idx": groups.astype(np.int32)}, weight


def awq(shape):
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    numbers, zeros, scales, weight = grouped(shape, 4, np.arange(shape[1]) // GROUP)
    return {"qweight": pack(numbers, 4, 1, order), "qzeros": pack(zeros, 4, 1, order), "scales": scales}, weight


def fp8(shape, block=(12, 8)):
    weight = RNG.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    scales = RNG.uniform(0.5, 2, [-(-size // by) for size, by in zip(shape, block)]).astype(np.float32)
    dense = np.empty(shape, np.float32)
    for o, i in np.ndindex(shape):
        dense[o, i] = np.float32(weight[o, i]) * scales[o // block[0], i // block[1]]
    return {"weight": weight, "weight_scale_inv": scales}, dense


def scaled(shape, dtype, scale_shape):
    weight = RNG.integers(-9, 9, shape).astype(dtype)
    scales = RNG.uniform(0.5, 2, scale_shape).astype(ml_dtypes.bfloat16)
    parts = {"weight": weight, "weight_scale": scales, "input_scale": np.ones(1, np.float32)}
    return parts, weight.astype(np.float32) * scales.astype(np.float32).reshape(-1, 1)


def packed(shape):
    numbers, _, scales, _ = grouped(shape, 4, np.arange(shape[1]) // GROUP)
    weight = np.ascontiguousarray((numbers.T - 8) * np.repeat(scales.T.astype(np.float32), GROUP, axis=1), np.float32)
    size = np.array(shape, np.int64)
    return {"weight_packed": pack(numbers.T, 4, 1), "weight_scale": scales.T.copy(), "weight_shape": size}, weight


def of_groups(bits, form, kind="int"):
    weights = {"num_bits": bits, "type": kind, "symmetric": True}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}


WAYS = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "gptq, 8 bits": (lambda shape: gptq(shape, 8), {"quant_method": "gptq", "bits": 8}),
    "gptq_v2": (
        lambda shape: gptq(shape, 2, "gptq_v2"),
        {"quant_method": "gptq", "bits": 2, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [12, 8]}),
    "fp8, one scale": (lambda shape: fp8(shape, shape), {"quant_method": "fp8"}),
    "float-quantized": (
        lambda shape: scaled(shape, ml_dtypes.float8_e4m3fn, (shape[0], 1)),
        of_groups(8, "float-quantized", "float"),
    ),
    "int-quantized, one scale": (lambda shape: scaled(shape, np.int8, (1,)), of_groups(8, "int-quantized")),
    "pack-quantized": (packed, of_groups(4, "pack-quantized")),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "ref"
    hf.export_ref(ref(SHAPE), folder)
    return folder


def put(folder, plain, tensors, entries):
    """A folder of the plain one's config with other tensors, quantized as the entries say."""
    folder.mkdir(exist_ok=True)
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": entries}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def with_quantized_layers(plain, way):
    """Tensors as a way stores them, and what they stand for."""
    make, entries = WAYS[way]
    tensors, expected = {}, {}
    for name, tensor in safetensors.numpy.load_file(plain / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = expected[name] = tensor
            continue
        parts, expected[name] = make(tensor.shape)
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
    return tensors, expected, entries


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_those_that_the_format_says(plain, tmp_path, way):
    """Layers are quantized, the embedding and the head are not, as in published checkpoints."""
    tensors, expected, entries = with_quantized_layers(plain, way)
    put(tmp_path, plain, tensors, entries)
    folder = tmp_path / "expected"
    folder.mkdir()
    (folder / "config.json").write_text((plain / "config.json").read_text())
    safetensors.numpy.save_file(expected, folder / "model.safetensors")
    read, whole = (hf.load_ref(path, dtype="float32", unstacked=False).params for path in (tmp_path, folder))
    for module in ("query", "key", "output", "gate", "down"):
        actual = np.asarray(read["layers"][module]["kernel"])
        np.testing.assert_allclose(actual, whole["layers"][module]["kernel"], rtol=1e-6, err_msg=module)
    np.testing.assert_array_equal(read["embedding"], whole["embedding"])


@pytest.mark.parametrize("way", ["gptq, 8 bits", "awq"])
def test_biases_of_zeros_beside_quantized_weights_are_none(plain, tmp_path, way):
    """AutoGPTQ writes one for every module; one that is not zero is a tensor that the config does not call for."""
    tensors, _, entries = with_quantized_layers(plain, way)
    folder = put(tmp_path / "without", plain, tensors, entries)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    tensors |= {f"{module}.bias": np.zeros(tensors[f"{module}.scales"].shape[1], np.float16) for module in modules}
    read, want = (
        hf.load_ref(path, dtype="float32", unstacked=False).params
        for path in (put(tmp_path / "with", plain, tensors, entries), folder)
    )
    assert_trees_equal(read, want)
    name = f"{modules[3]}.bias"
    other = tensors | {name: tensors[name] + np.float16(1e-3) * (np.arange(len(tensors[name])) == 2)}
    assert f"has the tensor {name}, which its config does not call for" in load_refusal(
        put(tmp_path / "other", plain, other, entries)
    )
    beside = tensors | {"model.norm.bias": np.zeros(SHAPE.embed, np.float16)}  # of no quantized module
    assert "has the tensor model.norm.bias, which" in load_refusal(put(tmp_path / "beside", plain, beside, entries))


@pytest.mark.parametrize("way", ["gptq", "awq", "fp8"])
def test_an_exported_adapter_of_a_quantized_model_is_read_back(plain, tmp_path, way):
    """Its own config.json says nothing of its base's weights."""
    tensors, expected, entries = with_quantized_layers(plain, way)
    base = put(tmp_path / "base", plain, tensors, entries)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text((plain / "config.json").read_text())
    safetensors.numpy.save_file(expected, whole / "model.safetensors")
    model = guide(SHAPE)
    learned = random_params(1, lambda key, config: lora.split(lora.add(key, model.params, 2, 4.0))[0], model.config)
    read = []
    for ref_folder in (base, whole):
        folder = tmp_path / f"adapter of {ref_folder.name}"
        hf.export_adapter([learned], model.config, folder, alpha=4.0, base=str(ref_folder))
        read.append(hf.load_guide(folder, dtype="float32", unstacked=False).params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *read)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "other"}}))
    assert f"{base / 'config.json'}: the weights are quantized with quant_method 'other'" in refusal(
        hf.load_guide, folder.with_name("adapter of base"), dtype="float32"
    )


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "with quant_method 'bitsandbytes', which is not read"),
        ({"quant_method": "gptq", "bits": 3}, "gptq in 3 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "awq in the version 'gemv'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 in the format 'e5m2'"),
        (of_groups(4, "marlin-24"), "compressed-tensors in the format 'marlin-24'"),
        (of_groups(4, "pack-quantized") | {"transform_config": {"R1": {}}}, "sparse or transformed weights"),
        ({}, "quant_method None"),
    ],
)
def test_other_ways_are_refused_with_what_is_read(plain, tmp_path, entries, words):
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": entries}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = load_refusal(tmp_path)
    assert words in message and "give the folder of the model before quantization" in message


def test_a_weight_without_its_scales_is_refused(plain, tmp_path):
    tensors = safetensors.numpy.load_file(plain / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    parts, _ = awq(tensors.pop(f"{name}.weight").shape)
    del parts["scales"]
    tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    entries = {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(json.loads((plain / "config.json").read_text()) | entries))
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert f"lacks the tensor '{name}.scales' of a quantized weight" in load_refusal(tmp_path)
