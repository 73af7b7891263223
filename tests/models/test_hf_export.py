"""Contents of exported folders, read back without PyTorch, and refusals to export."""

import dataclasses
import json
import re

import jax
import pytest
import transformers
from helpers import assert_trees_equal
from hf_folders import CONFIGS, LLAMA, TIED, guide, load_refusal, ref, refusal
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

from qsharp_jax.models import hf
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.hf import export
from qsharp_jax.models.value import ValueConfig, ValueModel


def tokenizer():
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "yes": 3, "no": 4}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_a_reference_comes_with_tokenizer_stop_tokens_and_a_card(tmp_path):
    hf.export_ref(
        ref(), tmp_path, tokenizer=tokenizer(), stop_ids=(4, 1), trained_on="Word problems.",
        metrics={"reward": 0.36123, "problems": 500},
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, [1, 4], None)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (type(config), config.eos_token_id) == (transformers.LlamaConfig, [1, 4])
    assert str(config.dtype).removeprefix("torch.") == "float32"
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.get_vocab(), loaded.eos_token) == (tokenizer().get_vocab(), "</s>")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    for words in (
        "Word problems.",
        "AutoModelForCausalLM.from_pretrained",
        "| reward | 0.3612 |",
        "| problems | 500 |",
    ):
        assert words in card


@pytest.mark.parametrize(
    "law, atoms, ends, words",
    [
        (dict(), [], (0.0, 1.0), "sigmoid(outputs)"),
        (dict(distribution="scalar"), [], (None, None), "its mean"),
        (dict(distribution="categorical", atoms=(-1.0, 0.0, 2.0)), [-1.0, 0.0, 2.0], (-1.0, 2.0),
         "a `softmax` over the rewards -1.0, 0.0, 2.0"),
        (dict(type="q"), [], (0.0, 1.0), "These are not logits of a next token"),
    ],
)  # fmt: skip
def test_a_guide_says_what_its_outputs_stand_for(law, atoms, ends, words, tmp_path):
    model = guide(**law)
    hf.export_guide(model, tmp_path, tokenizer=tokenizer(), trained_on="Rollouts.", metrics={"auc": 0.9})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["qsharp"] == {
        "type": model.config.type, "distribution": model.config.distribution, "atoms": atoms, "v_min": ends[0],
        "v_max": ends[1],
    }  # fmt: skip
    kind = "TokenClassification" if model.config.type == "v" else "CausalLM"
    assert config["architectures"] == [f"LlamaFor{kind}"]
    if kind == "TokenClassification":
        assert transformers.AutoConfig.from_pretrained(tmp_path).num_labels == (len(atoms) or 1)
    card = (tmp_path / "README.md").read_text()
    for part in (words, f"AutoModelFor{kind}.from_pretrained", "qsharp generate", "Rollouts.", "| auc | 0.9"):
        assert part in card
    assert not (tmp_path / "generation_config.json").exists()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("largest_file", [10**9, 1500])
def test_what_is_written_is_read_back_bit_by_bit(name, largest_file, tmp_path):
    """In one file, or in files of 1,500 bytes of tensors at most, but for the larger ones alone in theirs."""
    model = ref(CONFIGS[name])
    hf.export_ref(model, tmp_path, largest_file=largest_file)
    weights = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    index = tmp_path / "model.safetensors.index.json"
    assert (len(weights) > 1) == index.exists() == (largest_file == 1500)
    if index.exists():
        sizes = {name: [leaf.nbytes for leaf in tensors.values()] for name, tensors in weights.items()}
        assert all(sum(of_file) <= largest_file or len(of_file) == 1 for of_file in sizes.values())
        entries = json.loads(index.read_text())
        assert entries["metadata"]["total_size"] == sum(map(sum, sizes.values()))
        assert entries["weight_map"] == {leaf: name for name, tensors in weights.items() for leaf in tensors}
    again = hf.load_ref(tmp_path, dtype="float32", unstacked=False)
    assert again.config == model.config
    assert_trees_equal(again.params, model.params)


def test_a_head_in_another_dtype_loses_nothing(tmp_path):
    model = guide()
    half = {"trunk": jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model.params["trunk"])}
    hf.export_guide(model.replace(params=model.params | half), tmp_path)
    again = hf.load_guide(tmp_path, dtype="float32", unstacked=False)
    assert_trees_equal(again.params["head"], model.params["head"])
    assert_trees_equal(again.params["trunk"], jax.tree.map(lambda leaf: leaf.astype("float32"), half["trunk"]))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    hf.export_ref(ref(), tmp_path, tokenizer=tokenizer(), largest_file=3000)
    (tmp_path / "notes.txt").write_text("mine")
    hf.export_guide(guide(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "config.json", "custom_generate", "model.safetensors", "notes.txt"
    ]  # fmt: skip
    hf.load_guide(tmp_path, dtype="float32")
    hf.export_ref(ref(), tmp_path)
    assert not (tmp_path / "custom_generate" / "generate.py").exists()

    for name, content in [("notes.txt", "mine"), ("config.json", '{"model_type": "llama"}'), ("config.json", "[")]:
        other = tmp_path / f"{name}{len(content)}"
        other.mkdir()
        (other / name).write_text(content)
        assert "is not empty and not an earlier export; give a new folder" in refusal(hf.export_ref, ref(), other)
        assert (other / name).read_text() == content
    assert "is a file; give a new folder" in refusal(hf.export_ref, ref(), tmp_path / "notes.txt")


@pytest.mark.parametrize("stop_at", ["write", "replace"])
def test_a_kill_leaves_no_half_model_and_the_next_export_mends_it(stop_at, tmp_path, monkeypatch):
    hf.export_ref(ref(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export.files if stop_at == "write" else export.os, stop_at, killed)
        hf.export_ref(ref(TIED), tmp_path)
    if stop_at == "write":  # the earlier export is still whole
        assert (tmp_path / "model.safetensors").read_bytes() == before
        hf.load_ref(tmp_path, dtype="float32")
    else:
        assert "has no config.json" in load_refusal(tmp_path)
    hf.export_ref(ref(TIED), tmp_path)
    assert hf.load_ref(tmp_path, dtype="float32").config == TIED
    assert not (tmp_path / ".partial").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(token_shift=True), "a model with token_shift cannot be exported"),
        (dict(positions="learned"), "no class of transformers computes it"),
        (dict(qkv_bias=True, qk_norm=True), "no class of transformers computes it"),
        (dict(qkv_bias=True, rope_dims=4), "no class of transformers computes it"),
    ],
)
def test_a_model_without_a_class_in_transformers_is_refused_before_anything_is_written(changes, message, tmp_path):
    config = dataclasses.replace(LLAMA, **changes)
    assert message in refusal(hf.export_ref, LanguageModel({}, config), tmp_path / "new")
    assert message in refusal(hf.export_guide, ValueModel({}, ValueConfig(config)), tmp_path / "new")
    several = ValueConfig(LLAMA, type="q", distribution="categorical", atoms=(0.0, 1.0))
    message = refusal(hf.export_guide, ValueModel({}, several), tmp_path / "new")
    assert message.startswith("transformers has no form for a Q-type guide with several outputs per token")
    assert not (tmp_path / "new").exists()


def test_the_code_of_a_guides_card_steers(tmp_path, monkeypatch):
    """The card's code for `transformers` runs as it stands, from the folder that has the card."""
    pytest.importorskip("torch", reason="the code is PyTorch's, which the test extra installs")
    folders = {"path/to/the/reference": tmp_path / "ref", "path/to/this/folder": tmp_path / "guide"}
    hf.export_ref(ref(), tmp_path / "ref", tokenizer=tokenizer())
    hf.export_guide(guide(), tmp_path / "guide", tokenizer=tokenizer())
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = (tmp_path / "guide" / "README.md").read_text()
    for name, folder in folders.items():
        code = code.replace(name, str(folder))
    outputs = []
    for eta in ("0.1", "1e6"):
        names = {}
        for block in re.findall(r"^```python\n(.*?)^```", code, re.MULTILINE | re.DOTALL):
            exec(block.replace("eta=0.1", f"eta={eta}").replace("max_new_tokens=64", "max_new_tokens=20"), names)
        outputs.append(names["output"].tolist())
    assert outputs[0] != outputs[1]
