"""PEFT's LoRA adapters: read onto their base by the formula and as PEFT does, written and read back, and refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal
from hf_folders import CONFIGS, guide, load_refusal
from marks import slow
from numpy_decoder import random_params
from safetensors.numpy import load_file, save_file

from qsharp_jax.models import decoder, hf, lora, value

RANK, ALPHA = 3, 6.0
PREFIX = "base_model.model."


def put(folder, base, changes, saved=None, **entries):
    """An adapter's folder with random updates of some modules, by name with their (out, in) shape."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    tensors = {PREFIX + name: tensor for name, tensor in (saved or {}).items()}
    for name, (out, width) in changes.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.float32(rng.normal(size=(RANK, width)))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.float32(rng.normal(size=(out, RANK)))
    save_file(tensors, folder / "adapter_model.safetensors")
    entries = dict(peft_type="LORA", base_model_name_or_path=str(base), r=RANK, lora_alpha=ALPHA) | entries
    entries.setdefault("target_modules", sorted({name.rpartition(".")[2] for name in changes}))
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    return folder


LLAMA_CHANGES = {"model.layers.0.self_attn.q_proj": (24, 16), "model.layers.1.mlp.down_proj": (16, 20)}
CASES = {
    "llama": (LLAMA_CHANGES, 2.0, {}),
    "gpt2": ({"transformer.h.1.attn.c_attn": (48, 16), "lm_head": (23, 16)}, 6 / 3**0.5,
             dict(use_rslora=True)),
    "phi3": ({"model.layers.0.self_attn.qkv_proj": (48, 16)}, 3.0, dict(alpha_pattern={"self_attn.qkv_proj": 9})),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_is_its_base_with_the_updates_of_the_formula(name, made, tmp_path):
    changes, scale, entries = CASES[name]
    folder = put(tmp_path / "adapter", made / name, changes, **entries)
    merged = shutil.copytree(made / name, tmp_path / "merged")
    weights, own = load_file(merged / "model.safetensors"), load_file(folder / "adapter_model.safetensors")
    for module in changes:
        update = scale * own[f"{PREFIX}{module}.lora_B.weight"] @ own[f"{PREFIX}{module}.lora_A.weight"]
        stored = weights[f"{module}.weight"]
        weights[f"{module}.weight"] = stored + (update.T if stored.shape != update.shape else update)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    for load in (hf.load_ref, hf.load_trunk):
        got, want = load(folder, dtype="float32"), load(merged, dtype="float32")
        assert got.config == want.config == CONFIGS[name]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got.params, want.params)


def test_modules_saved_whole_take_the_place_of_the_base_s(made, tmp_path):
    head = np.float32(np.random.default_rng(1).normal(size=(23, 16)))
    folder = put(tmp_path / "a", made / "llama", {}, {"lm_head.weight": head}, modules_to_save=["lm_head"])
    want = hf.load_ref(made / "llama", dtype="float32", unstacked=False).params
    got = hf.load_ref(folder, dtype="float32", unstacked=False).params
    np.testing.assert_array_equal(got["head"], head.T)
    assert_trees_equal(got | {"head": want["head"]}, want)


@pytest.mark.parametrize(
    "entries, message",
    [
        (dict(peft_type="IA3"), "holds an adapter of the type IA3, and only LORA is applied; merge it into its base first"),
        (dict(use_dora=True), "use_dora is true and not false, which is not applied; merge the adapter into its base"),
        (dict(bias="all"), 'bias is "all" and not "none"'),
        (dict(init_lora_weights="pissa"), 'init_lora_weights is "pissa" and not true'),
        (dict(layer_replication=[[0, 2]]), "layer_replication is [[0, 2]] and not null"),
        (dict(lora_alpha=None), "adapter_config.json is damaged (base_model_name_or_path, r or lora_alpha is not valid)"),
        (dict(base_model_name_or_path=None), "is damaged"),
        (dict(base_model_name_or_path="./none"), "is an adapter of ./none, which does not exist; correct base_model_na"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_not_applied_is_refused_by_name(entries, message, made, tmp_path):
    folder = put(tmp_path / "adapter", made / "llama", LLAMA_CHANGES, **entries)
    assert message in load_refusal(folder)


def test_an_adapter_that_does_not_fit_its_base_is_refused(made, tmp_path):
    beside = shutil.copytree(made / "llama", tmp_path / "beside")
    (beside / "adapter_config.json").write_text("{}")
    assert "has an adapter_config.json beside the weights of a model; remove adapter_config" in load_refusal(beside)
    folder = put(tmp_path / "a", made / "gpt2", LLAMA_CHANGES)
    assert "changes model.layers.0.self_attn.q_proj.weight, which its base" in load_refusal(folder)
    folder = put(tmp_path / "b", made / "llama", {"model.layers.0.mlp.up_proj": (7, 16)})
    assert "changes model.layers.0.mlp.up_proj.weight of the shape (7, 16), and its base" in load_refusal(folder)
    folder = put(tmp_path / "c", made / "llama", {}, {"model.embed_tokens.lora_embedding_A": np.zeros((3, 23))})
    assert "has the tensor base_model.model.model.embed_tokens.lora_embedding_A, which is not app" in load_refusal(
        folder
    )
    assert "is an adapter itself; merge that one first" in load_refusal(put(tmp_path / "d", folder, LLAMA_CHANGES))
    (folder / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors; download it again" in load_refusal(folder)
    assert "describes a language model, not a guide" in load_refusal(
        put(tmp_path / "e", made / "llama", LLAMA_CHANGES), hf.load_guide
    )


def rounds_of(trunk, **changes):
    """A guide's config, and what two fits with LoRA learned in turn."""
    model = guide(trunk, **changes)

    def learned(key, config):
        return lora.split(lora.add(key, model.params, RANK, ALPHA))[0]

    return model.config, [random_params(seed, learned, model.config) for seed in (1, 2)]


@pytest.mark.parametrize("name, law", [("llama", {}), slow("gpt2", dict(distribution="categorical", atoms=(0.0, 1.0))),
                                       slow("phi3", {}), ("qwen3", dict(type="q"))])  # fmt: skip
def test_a_fit_s_updates_are_an_adapter_that_is_read_back_as_the_merged_guide(name, law, made, tmp_path):
    config, rounds = rounds_of(CONFIGS[name], **law)
    ref = hf.load_trunk(made / name, dtype="float32").params
    hf.export_adapter(rounds, config, tmp_path / "adapter", alpha=ALPHA, base=str(made / name))
    want = dict(ref, layers=dict(ref["layers"]))
    for module in {path[-2].key for path, _ in jax.tree.leaves_with_path(rounds[0]["trunk"])}:
        leaves = [learned["trunk"]["layers"][module] for learned in rounds]
        update = sum(ALPHA / RANK * np.einsum("ldr,lrn->ldn", leaf["lora_a"], leaf["lora_b"]) for leaf in leaves)
        want["layers"][module] = dict(ref["layers"][module], kernel=ref["layers"][module]["kernel"] + update)
    got = hf.load_guide(tmp_path / "adapter", dtype="float32", unstacked=False)
    assert got.config.outputs == config.outputs and got.config.type == config.type
    assert_trees_equal(got.params["head"], rounds[-1]["head"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got.params["trunk"], want)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_peft_reads_what_is_written_and_what_it_writes_is_read(name, made, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not among the packages of the tests")
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    tokens = np.random.default_rng(0).integers(0, 23, (2, 9))
    whole = np.ones_like(tokens), np.broadcast_to(np.arange(9), (2, 9))
    config, rounds = rounds_of(CONFIGS[name])
    hf.export_adapter(rounds, config, tmp_path / "ours", alpha=ALPHA, base=str(made / name))
    base = AutoModelForTokenClassification.from_pretrained(made / name, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    ours = hf.load_guide(tmp_path / "ours", dtype="float32")
    want = value.forward(ours.params, ours.config, tokens, *whole)[0]
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(tokens)).logits.numpy(), want, atol=1e-4)

    modules = sorted({path.rpartition(".")[2] for path in CASES[name][0]})
    settings = peft.LoraConfig(
        r=4, lora_alpha=9, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM", use_rslora=True
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(made / name), settings).eval()
    model.save_pretrained(tmp_path / "theirs")
    ours = hf.load_ref(tmp_path / "theirs", dtype="float32")
    hidden, _ = decoder.forward(ours.params, ours.config, tokens, *whole)
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(decoder.logits(ours.params, ours.config, hidden), want, atol=1e-4)
