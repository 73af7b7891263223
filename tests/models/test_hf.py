"""Checkpoints of every family against PyTorch's `transformers`: what is computed, in and out of its folders.

The models are small, drawn at random with biases and norms far from their initial values, and made by `transformers`.
"""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from helpers import assert_trees_equal
from marks import slow
from numpy_decoder import random_params

from qsharp_jax.decoding import generate
from qsharp_jax.models import cpu_form, decoder, hf, value
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import Sampling

torch = pytest.importorskip("torch", reason="parity is judged by PyTorch, which the test extra installs")
torch.set_num_threads(1)  # the models are small


V, CONTEXT = 61, 160
LLAMA = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None,
    pad_token_id=None,
)  # fmt: skip
GPT2 = dict(
    vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=None, eos_token_id=None
)  # fmt: skip
# Of the four wavelengths of a head (6, 30, 140 and 660 tokens) one is kept, one stretched by a share, two wholly.
SCALED = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
GEMMA = LLAMA | dict(num_hidden_layers=3, head_dim=12, sliding_window=8, query_pre_attn_scalar=12)
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "llama": lambda: transformers.LlamaConfig(**LLAMA, rope_parameters=SCALED),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=24),
    # A decode step of three rows has fewer tokens' experts than experts.
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **LLAMA, head_dim=12, moe_intermediate_size=24, num_experts=12, num_experts_per_tok=3, norm_topk_prob=True
    ),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, head_dim=12, sliding_window=8),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**LLAMA | dict(num_hidden_layers=3), no_rope_layers=[1, 0, 1]),
    "phi3": lambda: transformers.Phi3Config(
        **LLAMA, rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5)
    ),
}
# The other choice of heads, and what else one config class can say.
MORE = {
    "gpt2-untied": lambda: transformers.GPT2Config(
        **GPT2, tie_word_embeddings=False, n_inner=40, layer_norm_epsilon=0.1
    ),
    "llama-tied": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True, head_dim=12, rms_norm_eps=0.1),
    "qwen2-untied": lambda: transformers.Qwen2Config(
        **LLAMA, rope_parameters=dict(rope_type="default", rope_theta=1e6)
    ),
    "qwen3-tied": lambda: transformers.Qwen3Config(
        **LLAMA, head_dim=8, tie_word_embeddings=True, rope_parameters=SCALED
    ),
    "qwen3_moe-tied": lambda: transformers.Qwen3MoeConfig(
        **LLAMA, head_dim=12, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=True
    ),
    "qwen3-window": lambda: transformers.Qwen3Config(
        **LLAMA, use_sliding_window=True, max_window_layers=1, sliding_window=8
    ),
    # Every position is in the window, whose layers have rotary positions of their own even so.
    "gemma3_text-scaled": lambda: transformers.Gemma3TextConfig(
        **GEMMA | dict(sliding_window=CONTEXT, query_pre_attn_scalar=20, tie_word_embeddings=False),
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=500.0, factor=8.0),
            sliding_attention=dict(rope_type="default", rope_theta=50.0),
        ),
    ),
    "smollm3-window": lambda: transformers.SmolLM3Config(
        **LLAMA, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=8
    ),
    "phi3-window": lambda: transformers.Phi3Config(**LLAMA | dict(num_key_value_heads=4), sliding_window=8),
}
EVERY = FAMILIES | MORE
# Rows of several lengths, padded at the end; the longest goes three times past the context before the scaling.
LENGTHS = (100, 37, 5, 1)
TOKENS = np.random.default_rng(0).integers(0, V, (len(LENGTHS), max(LENGTHS)))
POSITIONS = np.broadcast_to(np.arange(max(LENGTHS)), TOKENS.shape)
MASK = np.int32(POSITIONS < np.array(LENGTHS)[:, None])

every_config = pytest.mark.parametrize("name", EVERY)
# What tests of one second each compute for more than logits: families that others do not stand for.
DISTINCT = ("gpt2", "llama", "qwen2", "qwen3", "gemma3_text", "qwen3_moe")
forward = jax.jit(decoder.forward, static_argnames="config")
value_forward = jax.jit(value.forward, static_argnames="config")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name, dtype) -> the folder of a model that `transformers` made and saved; each is made once."""

    @functools.cache
    def folder(name, dtype="float32"):
        path = tmp_path_factory.mktemp(name)
        model = transformers.AutoModelForCausalLM.from_config(EVERY[name]())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for leaf_name, leaf in model.named_parameters():
                noise = torch.randn(leaf.shape, generator=generator)
                if leaf.ndim == 1:
                    leaf.copy_(0.1 * noise if "bias" in leaf_name else 1 + 0.3 * noise)
                else:  # small embeddings, so that what a model says is not always the token that it has just seen
                    small = any(word in leaf_name for word in ("wte", "wpe", "embed_tokens"))
                    leaf.copy_(noise * leaf.shape[-1] ** -0.5 * (0.5 if small else 1.5))
        model.to(getattr(torch, dtype)).save_pretrained(path)
        return path

    return folder


def theirs(folder, auto=transformers.AutoModelForCausalLM, **options):
    """Logits [B, T, .] of `transformers`, float32."""
    model = auto.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS), attention_mask=torch.tensor(MASK)).logits.float().numpy()


def logits_of(model):
    hidden, _ = forward(model.params, model.config, TOKENS, MASK, POSITIONS)
    return np.asarray(decoder.logits(model.params, model.config, hidden))


def states(folder, auto=transformers.AutoModelForCausalLM):
    return auto.from_pretrained(folder).state_dict()


def change(folder, **entries):
    """Changes entries of a folder's config.json."""
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))


def assert_same_states(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@every_config
def test_float32_logits_are_those_of_transformers(name, folders, tmp_path):
    """Also of the folder that it is exported to, which `transformers` computes to the same bits."""
    model = hf.load_ref(folders(name), dtype="float32")
    ours, want = logits_of(model), theirs(folders(name))
    hf.export_ref(model, tmp_path)
    np.testing.assert_array_equal(theirs(tmp_path), want)
    assert hf.read_config(tmp_path, "float32") == model.config
    error = np.abs(ours - want)[MASK > 0].max()
    print(f"{name}: float32 error {error:.1e}")  # pytest -rP shows it
    assert want[MASK > 0].std() > 0.3 and error < 1e-4


@pytest.mark.parametrize("name", DISTINCT)
def test_bfloat16_errs_no_more_than_transformers_does(name, folders):
    """Both from the same bfloat16 weights, against the float32 computation with these weights; root mean squares."""
    folder = folders(name, "bfloat16")
    exact = theirs(folder, dtype=torch.float32)

    def error(logits):
        return np.sqrt(np.mean(np.square(logits - exact)[MASK > 0]))

    ours, reference = error(logits_of(hf.load_ref(folder, dtype="bfloat16"))), error(theirs(folder))
    print(f"{name}: bfloat16 error {ours:.2e}, of transformers {reference:.2e}, ratio {ours / reference:.2f}")
    assert reference > 1e-3, "it does compute in bfloat16"
    assert ours < 1.5 * reference


@pytest.mark.parametrize("name", [slow(name) if name in ("smollm3", "phi3") else name for name in FAMILIES])
def test_64_greedy_tokens_are_those_of_transformers(name, folders):
    prompts = [TOKENS[0, :40].tolist(), TOKENS[1, :7].tolist(), TOKENS[2, :1].tolist()]
    ours = generate(
        hf.load_ref(folders(name), dtype="float32"), None, prompts, Sampling(temperature=0.0, max_new_tokens=64),
        rng=0,
    )  # fmt: skip
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model = transformers.AutoModelForCausalLM.from_pretrained(folders(name)).eval()
    want = model.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=64, pad_token_id=0)
    np.testing.assert_array_equal(ours.tokens, want[:, width:].numpy())
    assert len(np.unique(ours.tokens)) > 10, "no model that says one thing only"


@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_configs_of_transformers_4_say_the_same(name, folders, tmp_path):
    """rope_theta and rope_scaling instead of rope_parameters; nothing else of the folder changes."""
    folder = folders(name)
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert hf.read_config(tmp_path, "float32") == hf.read_config(folder, "float32")
    assert hf.read_config(tmp_path, "float32").rope_factor == 8


@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_a_context_before_the_scaling_beside_the_parameters_counts(name, folders, tmp_path):
    """It overrides the one among them, as in `transformers`; a model without that scaling has none."""
    folder = shutil.copytree(folders(name), tmp_path / name)
    change(folder, original_max_position_embeddings=96)
    assert hf.read_config(folder, "float32").rope_original_positions == 96
    want = theirs(folder)
    np.testing.assert_allclose(logits_of(hf.load_ref(folder, dtype="float32"))[MASK > 0], want[MASK > 0], atol=1e-4)
    assert np.abs(want - theirs(folders(name)))[MASK > 0].max() > 0.1
    plain = shutil.copytree(folders("qwen2"), tmp_path / "plain")
    change(plain, original_max_position_embeddings=96)
    assert hf.read_config(plain, "float32") == hf.read_config(folders("qwen2"), "float32")


@pytest.mark.parametrize(
    "name, entries",
    [
        ("qwen2", dict(attention_bias=True, mlp_bias=True)),
        ("qwen3", dict(mlp_bias=True, attention_dropout=0.5, sliding_window=8)),
        ("llama", dict(pretraining_tp=2, sliding_window=None, attention_chunk_size=CONTEXT, is_causal=True)),
        ("llama", dict(sliding_window=8, layer_types=["full_attention"] * 2, quantization_config=None)),
        ("gpt2", dict(reorder_and_upcast_attn=True, attention_bias=True, mlp_bias=True, attn_pdrop=0.5)),
    ],
)
def test_entries_that_change_nothing_in_transformers_change_nothing_here(name, entries, folders, tmp_path):
    folder = shutil.copytree(folders(name), tmp_path / name)
    change(folder, **entries)
    want = theirs(folder)
    np.testing.assert_array_equal(want, theirs(folders(name)))
    np.testing.assert_allclose(logits_of(hf.load_ref(folder, dtype="float32"))[MASK > 0], want[MASK > 0], atol=1e-4)


@pytest.mark.parametrize("name", [*DISTINCT, "phi3", "gpt2-untied", "llama-tied", "qwen2-untied", "qwen3-tied"])
def test_an_exported_reference_is_the_one_that_was_loaded_bit_by_bit(name, folders, tmp_path):
    dtype = "bfloat16" if name in MORE else "float32"
    folder = folders(name, dtype)
    model = hf.load_ref(folder, dtype=dtype)
    hf.export_ref(model, tmp_path)
    assert_same_states(states(tmp_path), states(folder))
    again = hf.load_ref(tmp_path, dtype=dtype)
    assert again.config == model.config
    assert_trees_equal(again.params, model.params)

    stacked = hf.load_ref(folder, dtype=dtype, unstacked=False)
    assert_trees_equal(decoder.unstack(stacked.params, transposed=cpu_form.here()), model.params)
    hf.export_ref(stacked, tmp_path)
    assert_trees_equal(hf.load_ref(tmp_path, dtype=dtype).params, model.params)


def test_weights_may_be_held_in_another_dtype_than_the_files(folders, tmp_path):
    exact, half = (hf.load_ref(folders("llama"), dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert (exact.config.dtype, half.config.dtype) == ("float32", "bfloat16")
    assert_trees_equal(half.params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact.params))
    transformers.AutoModelForCausalLM.from_pretrained(folders("llama"), dtype=torch.float16).save_pretrained(tmp_path)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), exact.params)
    assert_trees_equal(hf.load_ref(tmp_path, dtype="float32").params, rounded)


@pytest.mark.parametrize("name", ["gpt2", "qwen2-untied"])
def test_shards_and_the_base_model_alone_are_the_same_weights(name, folders, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders(name))
    want = hf.load_ref(folders(name), dtype="float32").params
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_trees_equal(hf.load_ref(tmp_path / "shards", dtype="float32").params, want)

    # As the first GPT-2 was published: without "transformer." before the names, and with the causal mask.
    base = {n.removeprefix("transformer."): leaf for n, leaf in model.state_dict().items() if n != "lm_head.weight"}
    if name == "gpt2":
        from safetensors.torch import save_file

        base |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
        model.config.save_pretrained(tmp_path / "base")
        save_file(base, tmp_path / "base" / "model.safetensors")
        assert_trees_equal(hf.load_ref(tmp_path / "base", dtype="float32").params, want)


def random_guide(folder, **changes):
    """A guide on the trunk in a folder, with a random head."""
    trunk = hf.load_trunk(folder, dtype="float32")
    config = ValueConfig(trunk.config, **changes)
    params = value.init(jax.random.key(0), config, trunk.params)
    head = random_params(1, lambda key, config: value.init(key, config)["head"], config)
    return ValueModel(params | {"head": head}, config)


def outputs_of(model):
    return np.asarray(value_forward(model.params, model.config, TOKENS, MASK, POSITIONS)[0])


def classifier_of_the_card(folder):
    """The class by which the model card loads a guide."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("tokenizer =")[0]
    scope = {}
    exec(code.replace("path/to/this/folder", str(folder)), scope)
    return type(scope["guide"])


@pytest.mark.parametrize(
    "name, law",
    [
        ("gpt2", dict(distribution="categorical", atoms=(-1.0, 0.0, 2.5))),
        ("llama", dict(distribution="bernoulli")),
        ("qwen2", dict(distribution="scalar")),
        ("qwen3", dict(distribution="categorical", atoms=(0.0, 1.0))),
        ("gemma3_text", dict(distribution="bernoulli")),
    ],
)
def test_a_v_type_guide_is_a_token_classifier(name, law, folders, tmp_path):
    guide = random_guide(folders(name), **law)
    hf.export_guide(guide, tmp_path)
    auto = classifier_of_the_card(tmp_path)
    assert auto.from_pretrained(tmp_path).config.num_labels == guide.config.outputs
    want = outputs_of(guide)
    np.testing.assert_allclose(theirs(tmp_path, auto)[MASK > 0], want[MASK > 0], atol=1e-4)
    assert want[MASK > 0].std() > 0.3

    again = hf.load_guide(tmp_path, dtype="float32", unstacked=False)
    assert again.config == guide.config
    assert_trees_equal(again.params, guide.params)
    hf.export_guide(hf.load_guide(tmp_path, dtype="float32"), tmp_path / "again")  # unstacked
    assert_same_states(states(tmp_path / "again", auto), states(tmp_path, auto))


@pytest.mark.parametrize("name", ["gpt2", "qwen3-tied"])
def test_a_q_type_guide_is_a_language_model_with_a_head_of_its_own(name, folders, tmp_path):
    guide = random_guide(folders(name), type="q", distribution="bernoulli")
    hf.export_guide(guide, tmp_path)
    logits = theirs(tmp_path)
    want = outputs_of(guide)[:, 1:, 0]  # each token's, read at the token before
    got = np.take_along_axis(logits[:, :-1], TOKENS[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(got[MASK[:, 1:] > 0], want[MASK[:, 1:] > 0], atol=1e-4)

    again = hf.load_guide(tmp_path, dtype="float32", unstacked=False)
    assert again.config == dataclasses.replace(guide.config, trunk=dataclasses.replace(guide.config.trunk, tied=False))
    assert_trees_equal(again.params, guide.params)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_trunk_is_the_language_model_without_its_head(name, folders):
    ref = hf.load_ref(folders(name), dtype="float32", unstacked=False)
    trunk = hf.load_trunk(folders(name), dtype="float32")
    assert isinstance(trunk, LanguageModel) and trunk.config == ref.config
    assert_trees_equal(trunk.params, {key: leaf for key, leaf in ref.params.items() if key != "head"})
