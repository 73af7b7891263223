"""Folders of models without PyTorch: what an export holds, what is refused and how, where the bytes go."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import transformers
from helpers import assert_trees_equal
from numpy_decoder import random_params
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from qsharp_jax.errors import UserError
from qsharp_jax.models import decoder, hf, memory, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.hf import export
from qsharp_jax.models.value import ValueConfig, ValueModel

LLAMA = DecoderConfig(
    vocab_size=23, embed=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp=20, max_positions=32, rope_theta=100.0
)
TIED = dataclasses.replace(LLAMA, tied=True)
GPT2 = DecoderConfig(
    vocab_size=23, embed=16, layers=2, heads=4, kv_heads=4, head_dim=4, mlp=20, max_positions=32, positions="learned",
    norm="layer", activation="gelu", bias=True, tied=True,
)  # fmt: skip
UNTIED_GPT2 = dataclasses.replace(GPT2, tied=False)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True)
CONFIGS = {"llama": LLAMA, "llama-tied": TIED, "gpt2": UNTIED_GPT2, "gpt2-tied": GPT2, "qwen3": QWEN3}
UP = "model.layers.1.mlp.up_proj.weight"


def ref(config=LLAMA):
    return LanguageModel(random_params(0, decoder.init, config), config)


def guide(trunk=LLAMA, **changes):
    config = ValueConfig(trunk, **changes)
    return ValueModel(random_params(0, value.init, config), config)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of references by name, and "guide", made once; tests change copies."""
    root = tmp_path_factory.mktemp("made")
    for name, config in CONFIGS.items():
        hf.export_ref(ref(config), root / name)
    hf.export_guide(guide(distribution="categorical", atoms=(0.0, 0.5, 1.0)), root / "guide")
    hf.export_guide(guide(type="q"), root / "q-guide")
    return root


@pytest.fixture
def copy(made, tmp_path):
    """copy(name, **entries) -> a folder of one's own, with some entries of its config.json changed (None: taken out)."""

    def copy(name="llama", **entries):
        folder = shutil.copytree(made / name, tmp_path / name)
        config = json.loads((folder / "config.json").read_text()) | entries
        config = {name: entry for name, entry in config.items() if entry is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    return str(error.value)


def load_refusal(folder, load=hf.load_ref):
    message = refusal(load, folder, dtype="float32")
    assert str(folder) in message
    assert message.count(". ") == 0 and "\n" not in message, "one sentence"
    return message


# --- What an export holds -------------------------------------------------------------------------------------------


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
    for words in (
        "Word problems.",
        "AutoModelForCausalLM.from_pretrained",
        "| reward | 0.3612 |",
        "| problems | 500 |",
    ):
        assert words in card
    assert card.startswith("---\nlibrary_name: transformers")


@pytest.mark.parametrize(
    "law, entry, words",
    [
        (dict(), dict(distribution="bernoulli", atoms=[], v_min=0.0, v_max=1.0), "sigmoid(outputs)"),
        (dict(distribution="scalar"), dict(distribution="scalar", atoms=[], v_min=None, v_max=None), "its mean"),
        (
            dict(distribution="categorical", atoms=(-1.0, 0.0, 2.0)),
            dict(distribution="categorical", atoms=[-1.0, 0.0, 2.0], v_min=-1.0, v_max=2.0),
            "a `softmax` over the rewards -1.0, 0.0, 2.0",
        ),
    ],
)
def test_a_guide_says_what_its_outputs_stand_for(law, entry, words, tmp_path):
    hf.export_guide(guide(**law), tmp_path, tokenizer=tokenizer(), trained_on="Rollouts.", metrics={"auc": 0.9})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["qsharp"] == {"type": "v", **entry}
    assert config["architectures"] == ["LlamaForTokenClassification"]
    assert transformers.AutoConfig.from_pretrained(tmp_path).num_labels == (len(entry["atoms"]) or 1)
    card = (tmp_path / "README.md").read_text()
    for part in (
        words,
        "AutoModelForTokenClassification.from_pretrained",
        "qsharp generate",
        "Rollouts.",
        "| auc | 0.9",
    ):
        assert part in card
    assert not (tmp_path / "generation_config.json").exists()


def test_a_q_type_says_so_in_its_card(made):
    assert "AutoModelForCausalLM" in (made / "q-guide" / "README.md").read_text()
    assert json.loads((made / "q-guide" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("largest_file", [10**9, 3000])
def test_what_is_written_is_read_back_bit_by_bit(name, largest_file, tmp_path):
    model = ref(CONFIGS[name])
    hf.export_ref(model, tmp_path, largest_file=largest_file)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (tmp_path / "model.safetensors.index.json").exists()
    assert (largest_file == 3000) == (tmp_path / "model.safetensors.index.json").exists()
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
        "README.md", "config.json", "model.safetensors", "notes.txt"
    ]  # fmt: skip
    hf.load_guide(tmp_path, dtype="float32")

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
        (dict(heads=3, kv_heads=3), "no class of transformers computes it"),
    ],
)
def test_a_model_without_a_class_in_transformers_is_refused_before_anything_is_written(changes, message, tmp_path):
    config = dataclasses.replace(LLAMA, **changes)
    assert message in refusal(hf.export_ref, LanguageModel({}, config), tmp_path / "new")
    assert message in refusal(hf.export_guide, ValueModel({}, ValueConfig(config)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_q_type_with_several_outputs_a_token_is_refused(tmp_path):
    config = ValueConfig(LLAMA, type="q", distribution="categorical", atoms=(0.0, 1.0))
    message = refusal(hf.export_guide, ValueModel({}, config), tmp_path / "new")
    assert message.startswith("a Q-type guide with several outputs a token has no form in transformers")


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
    ],
)
def test_a_gpt2_that_is_not_computed_here(entries, message, copy):
    assert message in load_refusal(copy("gpt2", **entries))


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


# --- Where the bytes go ---------------------------------------------------------------------------------------------

SHARDED = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from helpers import assert_trees_equal
from qsharp_jax.models import hf
from qsharp_jax.models.hf import files

mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
read = files.Tensors.read
count = []
files.Tensors.read = lambda self, *args: (values := read(self, *args), count.append(values.nbytes))[0]

for name in ("llama", "gpt2"):
    folder = Path(sys.argv[1]) / name
    for unstacked in (True, False):
        plain = hf.load_ref(folder, dtype="float32", unstacked=unstacked).params
        def spec(path, leaf):
            # Every axis that two or four devices divide, but for a stacked leaf's layers.
            stacked = not unstacked and path[0].key == "layers"
            axes = ["fsdp", "tensor"][: leaf.ndim - stacked] if leaf.ndim - stacked > 1 else ["tensor"]
            shape = leaf.shape[stacked:]
            spec = [axis if size % 2 == 0 else None for axis, size in zip(axes, shape)]
            return NamedSharding(mesh, P(*[None] * stacked, *spec))
        shardings = jax.tree.map_with_path(spec, plain)
        count.clear()
        sharded = hf.load_ref(folder, dtype="float32", unstacked=unstacked, shardings=shardings).params
        for leaf, sharding in zip(jax.tree.leaves(sharded), jax.tree.leaves(shardings)):
            assert leaf.sharding == sharding, (leaf.sharding, sharding)
        assert_trees_equal(sharded, plain)
        # Every byte of the weights once, though each lies on one device or on several.
        assert sum(count) == sum(leaf.nbytes for leaf in jax.tree.leaves(plain)), sum(count)
    everywhere = hf.load_ref(folder, dtype="float32", shardings=NamedSharding(mesh, P())).params
    assert_trees_equal(everywhere, hf.load_ref(folder, dtype="float32").params)
print("right")
"""


def run(program, *args):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", program, *map(str, args)], capture_output=True, text=True, env=env)


def test_sharded_parameters_are_read_slice_by_slice_each_byte_once(made):
    done = run(SHARDED, made)
    assert done.stdout.endswith("right\n"), done.stderr


# 4.6 GB in bfloat16: a model made in minutes, loaded as it is and in the other form.
BIG = DecoderConfig(
    vocab_size=64_000, embed=4096, layers=8, heads=32, kv_heads=8, head_dim=128, mlp=14_336, max_positions=32,
    dtype="bfloat16",
)  # fmt: skip
MEASURE = """
import resource, sys
import jax, jax.numpy as jnp
from qsharp_jax.models import hf

jnp.zeros(3).block_until_ready()
def now():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
before = now()
params = hf.load_ref(sys.argv[1], dtype="bfloat16", unstacked=sys.argv[2] == "unstacked").params
model = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
assert model > 4e9
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(peak - before - model)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["unstacked", "stacked"])
def test_loading_takes_no_more_than_the_weights_and_one_tensor(form, tmp_path):
    """On a CPU the device's memory is the host's: what is above the model itself is what loading takes."""
    from qsharp_jax.models.hf import config as configs
    from qsharp_jax.models.hf import files, load, names

    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), BIG))
    expected = load._expected(shapes, names.decoder_places("llama"))
    dtype = np.dtype(jax.numpy.bfloat16)
    noise = np.random.default_rng(0).normal(size=2**20).astype(dtype)

    def tensor(name, shape):
        return name, dtype, shape, lambda: np.resize(noise, shape)

    try:
        files.write(tmp_path, [tensor(*item) for item in expected.items()], largest_file=2 * 10**9)
        entries = configs.entries(BIG, "llama", classifier=False, tied=False, dtype="bfloat16")
        (tmp_path / "config.json").write_text(json.dumps(entries))
        done = run(MEASURE, tmp_path, form)
        assert done.returncode == 0, done.stderr
    finally:
        shutil.rmtree(tmp_path)
    largest = max(2 * np.prod(shape) for shape in expected.values())
    print(f"{form}: {int(done.stdout) / 1e9:.2f} GB beyond the weights")
    assert int(done.stdout) < largest + 1e9
