"""Folders that are refused, each by one sentence that says why: configs, guides taken for references, weights."""

import errno
import json
import re

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal
from hf_folders import load_refusal, ref, refusal
from safetensors.numpy import load_file, save_file

from qsharp_jax.models import hf, memory

UP = "model.layers.1.mlp.up_proj.weight"
LLAMA3 = {"rope_type": "llama3"}


def change_tensors(folder, **tensors):
    """Replace tensors of a folder, or take them out (None)."""
    tensors = load_file(folder / "model.safetensors") | tensors
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_that_is_not_there_or_holds_no_config(tmp_path):
    assert load_refusal(tmp_path / "none").startswith("there is no folder ")
    assert "has no config.json; give a folder that transformers can load" in load_refusal(tmp_path)


@pytest.mark.parametrize("content", ["", '{"architectures": ["Llama', "[1, 2]", '{"architectures": 3}', "\x80"])
def test_a_config_that_is_no_json_object(content, copy):
    folder = copy()
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert re.search(r"config\.json is damaged \(.+\); download it again", load_refusal(folder))


@pytest.mark.parametrize(
    "name, entries, message",
    [
        # impossible
        ("llama", dict(num_hidden_layers="two"), "is damaged"),
        ("llama", dict(hidden_size=0), "is damaged"),
        ("llama", dict(num_attention_heads=3), "is damaged"),
        ("llama", dict(qsharp=[1]), "is damaged"),
        ("llama", dict(vocab_size=-4), "is damaged"),
        ("llama", dict(rope_parameters=LLAMA3, rope_theta=None, max_position_embeddings=0), "is damaged"),
        ("gpt2", dict(n_head=5), "is damaged"),
        # another architecture
        ("llama", dict(architectures=["MixtralForCausalLM"]), "'MixtralForCausalLM' is not supported; supported are GPT2"),
        ("llama", dict(architectures=None, model_type="mamba"), "'mamba' is not supported; supported are GPT2LMHeadMod"),
        ("llama", dict(architectures=None, model_type=None), "None is not supported"),
        ("llama", dict(architectures=["LlamaForSequenceClassification"]), "'LlamaForSequenceClassification' is not supp"),
        ("llama", dict(model_type="qwen2"), "says LlamaForCausalLM and model_type 'qwen2'"),
        # other mathematics
        ("llama", dict(quantization_config={"quant_method": "gptq"}), "the weights are quantized"),
        ("llama", dict(attention_bias=True), "attention_bias is true and not false, which is not supported"),
        ("llama", dict(mlp_bias=True), "mlp_bias is true and not false"),
        ("qwen3", dict(attention_bias=True), "attention_bias is true"),
        ("llama", dict(hidden_act="gelu"), 'hidden_act is "gelu" and not "silu"'),
        ("gpt2", dict(activation_function="gelu"), 'activation_function is "gelu" and not "gelu_new"'),
        ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights is false and not true"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is true"),
        ("gpt2", dict(add_cross_attention=True), "add_cross_attention is true"),
        ("llama", dict(is_causal=False), "is_causal is false"),
        ("llama", dict(is_causal=0), "is_causal is false"),
        ("gpt2", dict(is_causal=False), "is_causal is false"),
        # other rotary positions
        ("llama", dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, rope_scaling=None),
         "scaled by 'yarn' and not 'llama3'"),
        ("llama", dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "scaled by 'dynamic' and not 'llama3' or 'linear'"),
        ("gemma3_text", dict(rope_parameters={
            "full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
         "the rotary positions of layers with a window are scaled by 'linear'"),
        ("phi3", dict(rope_parameters=None, rope_scaling={
            "type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
         "the rotary positions are scaled by 'longrope'"),
        ("llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
         "partial_rotary_factor is not 1"),
        ("llama", dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 5e5}}),
         "rope_parameters has separate entries for 'full_attention'"),
        # layers that see less, or differ
        ("llama", dict(sliding_window=8), "sliding_window is 8"),
        ("gpt2", dict(sliding_window=8), "sliding_window is 8"),
        ("llama", dict(attention_chunk_size=8), "attention_chunk_size is 8"),
        ("llama", dict(layer_types=["sliding_attention"] * 2, sliding_window=8), "slides over a window of 8 tokens"),
        ("llama", dict(layer_types=["sliding_attention"] * 2), "slides over a window of None tokens"),
        ("llama", dict(layer_types=["full_attention", "chunked_attention"]), "layer_types has 'chunked_attention'"),
        ("qwen3", dict(layer_types=["sliding_attention"] * 2, use_sliding_window=True, sliding_window=1),
         "slides over a window of 1 tokens"),
        ("mistral", dict(sliding_window=1), "sliding_window is 1"),
        ("gemma3_text", dict(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0 and not null"),
        ("gemma3_text", dict(use_bidirectional_attention=True), "use_bidirectional_attention is true and not false"),
        ("gemma3_text", dict(hidden_activation="silu"), 'hidden_activation is "silu" and not "gelu_pytorch_tanh"'),
        ("qwen3_moe", dict(mlp_only_layers=[0]), "mlp_only_layers is [0] and not []"),
        ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step is 2 and not 1"),
        ("qwen3_moe", dict(use_sliding_window=True, sliding_window=8), "sliding_window is 8"),
        ("llama", dict(per_layer_config={"0": {"intermediate_size": 10}}), "per_layer_config is set"),
        ("llama", dict(kv_sharing_modes=["store", "reuse"]), "kv_sharing_modes is set"),
        ("llama", dict(transformers_weights="other.safetensors"), "transformers_weights is set"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_computed_here(name, entries, message, copy):
    assert message in load_refusal(copy(name, **entries))


WINDOW = dict(use_sliding_window=True, max_window_layers=1, sliding_window=8)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("qwen3", WINDOW | dict(use_sliding_window=False)),
        ("qwen3", WINDOW | dict(max_window_layers=2)),
        ("qwen3", WINDOW | dict(sliding_window=32)),
        ("mistral", dict(sliding_window=None)),
        ("mistral", dict(sliding_window=32)),
        ("llama", dict(architectures=None)),
        ("qwen2", dict(attention_bias=True)),
    ],
)
def test_a_config_that_changes_nothing_is_read(name, entries, copy, made):
    """A window that does not bite; no architectures, which is a language model; biases that Qwen 2 has anyway."""
    assert hf.read_config(copy(name, **entries), "float32") == hf.read_config(made / name, "float32")


def test_a_guide_is_no_reference_and_a_reference_is_no_guide(made):
    assert [hf.is_guide(made / name) for name in ("guide", "q-guide", "llama")] == [True, True, False]
    for name in ("guide", "q-guide"):
        assert "holds a guide or another token classifier" in load_refusal(made / name)
        hf.load_trunk(made / name, dtype="float32")


@pytest.mark.parametrize(
    "name, entry, message",
    [
        ("llama", {}, "describes a language model, not a guide"),
        ("guide", {}, 'add "qsharp": {"type": "v", "distribution": "bernoulli"}'),
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
    assert f"lacks {shards[1].name} (1 of {len(shards)} weight files are missing)" in load_refusal(tmp_path)
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
    error = OSError(errno.EIO, "Input/output error")

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(hf.files, "safe_open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        hf.load_ref(copy(), dtype="float32")


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({UP: None}, f"lacks the tensor {UP}, which its config requires"),
        ({UP: None, "lm_head.weight": None}, "lacks the tensor lm_head.weight and 1 more, which its config requires"),
        ({"model.layers.2.mlp.up_proj.weight": np.zeros((20, 16))},
         "has the tensor model.layers.2.mlp.up_proj.weight, which its config does not"),
        ({UP: np.zeros((20, 15), np.float32)},
         f"the tensor {UP} has the shape (20, 15), but its config requires (20, 16)"),
        ({UP: np.zeros((20, 16), np.int8)}, f"the tensor {UP} is stored as I8; supported are F32, BF16, F16"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_not_the_config_s_is_named(tensors, message, copy):
    folder = copy()
    change_tensors(folder, **tensors)
    assert message in load_refusal(folder)


@pytest.mark.parametrize(
    "name, buffers",
    [
        ("llama", {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32) for i in range(2)}),
        ("gpt2", {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8)), "transformer.h.1.attn.masked_bias": np.array(-1e4)}),
    ],
)  # fmt: skip
def test_buffers_that_follow_from_the_config_are_no_extra_tensors(name, buffers, copy, made):
    folder = copy(name)
    change_tensors(folder, **buffers)
    want = hf.load_ref(made / name, dtype="float32")
    assert_trees_equal(hf.load_ref(folder, dtype="float32").params, want.params)


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(copy, made):
    folder = copy("llama-tied")
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, **{"lm_head.weight": head})
    want = hf.load_ref(made / "llama-tied", dtype="float32")
    assert_trees_equal(hf.load_ref(folder, dtype="float32").params, want.params)
    head = head.copy()
    head[22, 15] = 7
    change_tensors(folder, **{"lm_head.weight": head})
    assert "has a lm_head.weight that differs from its embedding" in load_refusal(folder)
    hf.load_trunk(folder, dtype="float32")  # which has no head


def test_too_little_memory_is_said_before_any_is_taken(made, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 20_000)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "make_array_from_callback", lambda *_: pytest.fail("it reads"))
        message = refusal(hf.load_ref, made / "llama", dtype="float32")
    assert re.search(r"cpu 0 has 0\.00 GB of memory free, and the weights 0\.00 GB are needed on it; use", message)
    hf.load_ref(made / "llama", dtype="bfloat16")  # half as large
