"""Folders that are refused, each by one sentence that says why: configs, guides taken for references, weights."""

import dataclasses
import errno
import json
import re

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal
from hf_folders import LLAMA, load_refusal, ref, refusal
from safetensors.numpy import load_file, save_file

from qsharp_jax.models import hf, memory

UP = "model.layers.1.mlp.up_proj.weight"


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- Config: what is refused ----------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_or_holds_no_config(tmp_path):
    assert load_refusal(tmp_path / "none").startswith("there is no folder ")
    assert "has no config.json; give a folder that transformers could load" in load_refusal(tmp_path)


@pytest.mark.parametrize("content", ["", '{"architectures": ["Llama', "[1, 2]", '{"architectures": 3}', "\x80"])
def test_a_config_that_is_no_json_object(content, copy):
    folder = copy()
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert re.search(r"config\.json is damaged \(.+\); download it again", load_refusal(folder))


@pytest.mark.parametrize(
    "entries",
    [
        dict(num_hidden_layers="two"), dict(hidden_size=0), dict(num_attention_heads=3), dict(qsharp=[1]),
        dict(vocab_size=-4), dict(rope_parameters={"rope_type": "llama3"}, rope_theta=None, max_position_embeddings=0),
    ],
)  # fmt: skip
def test_a_config_with_impossible_entries(entries, copy):
    assert "is damaged" in load_refusal(copy(**entries))


@pytest.mark.parametrize(
    "entries, message",
    [
        (dict(architectures=["MistralForCausalLM"]), "'MistralForCausalLM' is not supported; supported are GPT2LMHead"),
        (
            dict(architectures=None, model_type="mamba"),
            "'mamba' is not supported; supported are GPT2LMHeadModel, Llama",
        ),
        (dict(architectures=None, model_type=None), "None is not supported"),
        (dict(architectures=["LlamaForSequenceClassification"]), "'LlamaForSequenceClassification' is not supported"),
        (dict(model_type="qwen2"), "says LlamaForCausalLM and model_type 'qwen2'"),
        (dict(quantization_config={"quant_method": "gptq"}), "the weights are quantised"),
        (dict(attention_bias=True), "attention_bias is true, which is not supported"),
        (dict(mlp_bias=True), "mlp_bias is true, which"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu' and not 'silu'"),
        (
            dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, rope_scaling=None),
            "scaled by 'yarn' and not 'llama3'",
        ),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "scaled by 'linear'"),
        (
            dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "partial_rotary_factor is not 1",
        ),
        (dict(is_causal=False), "is_causal is false"),
        (dict(is_causal=0), "is_causal is false"),
        (
            dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 5e5}}),
            "rope_parameters has entries of its own for 'full_attention'",
        ),
        (dict(sliding_window=8), "sliding_window is 8"),
        (dict(attention_chunk_size=8), "attention_chunk_size is 8"),
        (dict(layer_types=["sliding_attention"] * 2, sliding_window=8), "slides over a window of 8 tokens"),
        (dict(layer_types=["sliding_attention"] * 2), "slides over a window of None tokens"),
        (dict(layer_types=["full_attention", "chunked_attention"]), "layer_types has 'chunked_attention'"),
        (dict(per_layer_config={"0": {"intermediate_size": 10}}), "per_layer_config is set"),
        (dict(kv_sharing_modes=["store", "reuse"]), "kv_sharing_modes is set"),
        (dict(transformers_weights="other.safetensors"), "transformers_weights is set"),
    ],
)
def test_a_llama_that_is_not_computed_here(entries, message, copy):
    assert message in load_refusal(copy(**entries))


@pytest.mark.parametrize(
    "entries, message",
    [
        (dict(activation_function="gelu"), "activation_function is 'gelu' and not 'gelu_new'"),
        (dict(scale_attn_weights=False), "scale_attn_weights is false"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is true"),
        (dict(add_cross_attention=True), "add_cross_attention is true"),
        (dict(n_head=5), "is damaged"),
        (dict(is_causal=False), "is_causal is false"),
        (dict(sliding_window=8), "sliding_window is 8"),
    ],
)
def test_a_gpt2_that_is_not_computed_here(entries, message, copy):
    assert message in load_refusal(copy("gpt2", **entries))


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_biases_of_attention_are_refused_where_the_family_has_them(name, tmp_path):
    shape = dataclasses.replace(LLAMA, qkv_bias=name == "qwen2", qk_norm=name == "qwen3")
    hf.export_ref(ref(shape), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"attention_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if name == "qwen2":  # its biases are there whatever this says
        assert hf.read_config(tmp_path, "float32") == shape
    else:
        assert "attention_bias is true" in load_refusal(tmp_path)


def test_an_adapter_is_refused_beside_weights_and_alone(copy, tmp_path):
    folder = copy()
    (folder / "adapter_config.json").write_text("{}")
    for load in (hf.load_ref, hf.load_trunk, hf.load_guide):
        assert "has an adapter_config.json beside the weights, and an adapter is not app" in load_refusal(folder, load)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert "holds a LoRA adapter; merge it into its base first" in load_refusal(folder)
    (folder / "config.json").unlink()
    assert "holds a LoRA adapter; merge it into its base first" in load_refusal(folder)


def test_a_sliding_window_is_refused_where_it_bites(copy):
    window = dict(use_sliding_window=True, max_window_layers=1, sliding_window=8)
    folder = copy("qwen3", **window)
    assert "attention slides over a window of 8 tokens" in load_refusal(folder)
    for harmless in (dict(use_sliding_window=False), dict(max_window_layers=2), dict(sliding_window=32)):
        config = json.loads((folder / "config.json").read_text()) | window | harmless
        (folder / "config.json").write_text(json.dumps(config))
        hf.read_config(folder, "float32")


def test_a_config_without_architectures_is_a_language_model(copy):
    assert hf.read_config(copy(architectures=None), "float32") == LLAMA


# --- Guides and language models are not taken for each other --------------------------------------------------------


def test_a_guide_is_no_reference_and_a_reference_is_no_guide(made, copy):
    assert [hf.is_guide(made / name) for name in ("guide", "q-guide", "llama")] == [True, True, False]
    for name in ("guide", "q-guide"):
        assert "holds a guide or another token classifier" in load_refusal(made / name)
        hf.load_trunk(made / name, dtype="float32")
    assert "describes a language model, not a guide" in load_refusal(made / "llama", hf.load_guide)
    assert '"qsharp": {"type": "v", "distribution": "bernoulli"}' in load_refusal(
        copy("guide", qsharp={}), hf.load_guide
    )


@pytest.mark.parametrize(
    "name, entry, message",
    [
        ("guide", dict(type="v", distribution="bernoulli"), "has 3 labels; a bernoulli guide has 1"),
        ("guide", dict(type="v"), "is damaged"),
        ("guide", dict(type="x", distribution="bernoulli"), "is damaged"),
        ("guide", dict(type="v", distribution="categorical", atoms="abc"), "is damaged"),
        ("guide", dict(type="q", distribution="bernoulli"), "describes a Q-type guide; a V-type is a token classifier"),
        ("q-guide", dict(type="v", distribution="bernoulli"), "describes a V-type guide"),
        ("llama-tied", dict(type="q", distribution="bernoulli"), "head must be untied"),
    ],
)
def test_a_guide_whose_entry_does_not_fit_its_weights(name, entry, message, copy):
    assert message in load_refusal(copy(name, qsharp=entry), hf.load_guide)


# --- Weights: what is refused ---------------------------------------------------------------------------------------


def test_pickles_are_refused_and_the_way_out_is_named(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = load_refusal(folder)
    assert "pytorch_model.bin, a pickle" in message and "save_pretrained(FOLDER, safe_serialization=True)" in message
    (folder / "pytorch_model.bin").unlink()
    assert "has no weights; it needs model.safetensors" in load_refusal(folder)


def test_a_missing_shard_and_a_damaged_index(tmp_path):
    hf.export_ref(ref(), tmp_path, largest_file=3000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    assert f"lacks {shards[1].name}, one of 1 missing of {len(shards)} files" in load_refusal(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content in ("{", "[]", '{"weight_map": 3}', '{"metadata": {}}'):
        index.write_text(content)
        assert "index.json is damaged; download it again" in load_refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "names '../elsewhere.safetensors', which is not a file beside it" in load_refusal(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "html"])
def test_a_damaged_file_is_named(damage, copy):
    folder = copy()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    damaged = {"cut": content[:-10], "header": content[:100], "empty": b"", "html": b"<html>not found</html>"}
    path.write_bytes(damaged[damage])
    assert re.search(r"model\.safetensors is damaged or truncated \(.+\); download it again", load_refusal(folder))


def test_a_file_that_cannot_be_read_is_not_called_damaged(copy, monkeypatch):
    """By an error of the disk, or of the network it lies behind: it is raised as it is."""
    error = OSError(errno.EIO, "Input/output error")

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(hf.files, "safe_open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        hf.load_ref(copy(), dtype="float32")


def test_a_missing_tensor_is_named(copy):
    folder = copy()
    change_tensors(folder, lambda tensors: tensors.pop(UP))
    assert f"lacks the tensor {UP}, which its config.json asks for" in load_refusal(folder)
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert re.search(r"lacks the tensor \S+ and 1 more, which its config.json asks for", load_refusal(folder))


def test_an_extra_tensor_is_named(copy):
    folder = copy()
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": np.zeros((20, 16))}))
    assert "has the tensor model.layers.2.mlp.up_proj.weight, which its config.json does not" in load_refusal(folder)


def test_a_wrong_shape_is_named_with_both_shapes(copy):
    folder = copy()
    change_tensors(folder, lambda tensors: tensors.update({UP: np.zeros((20, 15), np.float32)}))
    assert f"the tensor {UP} has the shape (20, 15), and its config.json asks for (20, 16)" in load_refusal(folder)


def test_a_type_of_number_that_is_not_read_is_named(copy):
    folder = copy()
    change_tensors(folder, lambda tensors: tensors.update({UP: np.zeros((20, 16), np.int8)}))
    assert f"the tensor {UP} is stored as I8; F32, BF16, F16 can be read" in load_refusal(folder)


def test_buffers_that_follow_from_the_config_are_no_extra_tensors(copy, made):
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32) for i in range(2)}
    masks = {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8)), "transformer.h.1.attn.masked_bias": np.array(-1e4)}
    for name, buffers in [("llama", frequencies), ("gpt2", masks)]:
        folder = copy(name)
        change_tensors(folder, lambda tensors, buffers=buffers: tensors.update(buffers))
        want = hf.load_ref(made / name, dtype="float32")
        assert_trees_equal(hf.load_ref(folder, dtype="float32").params, want.params)


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(copy, made):
    folder = copy("llama-tied")
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 0}))
    want = hf.load_ref(made / "llama-tied", dtype="float32")
    assert_trees_equal(hf.load_ref(folder, dtype="float32").params, want.params)
    change_tensors(folder, lambda tensors: tensors["lm_head.weight"].__setitem__((22, 15), 7.0))
    assert "has a lm_head.weight that is not its embedding" in load_refusal(folder)
    hf.load_trunk(folder, dtype="float32")  # which has no head


def test_too_little_memory_is_said_before_any_is_taken(made, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 20_000)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "make_array_from_callback", lambda *_: pytest.fail("it reads"))
        message = refusal(hf.load_ref, made / "llama", dtype="float32")
    assert re.search(r"cpu 0 has 0\.00 GB of memory free, and the weights 0\.00 GB are needed on it; use", message)
    hf.load_ref(made / "llama", dtype="bfloat16")  # half as large
