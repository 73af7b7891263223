"""GGUF files of every architecture and many types of numbers: the models that PyTorch's `transformers` computes."""

import os
import subprocess
import sys
from pathlib import Path

import gguf_files
import jax
import numpy as np
import pytest
import transformers
from hf_folders import load_refusal, refusal

from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.models import decoder, hf
from qsharp_jax.models.hf import gguf as hf_gguf

torch = pytest.importorskip("torch", reason="parity is judged by PyTorch, which the test extra installs")
torch.set_num_threads(1)  # the models are small

V = 61
TOKENS = np.random.default_rng(0).integers(0, V, (2, 80))
LLAMA = dict(
    vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
# Of the eight wavelengths of a head some are kept, some stretched by a share, some wholly.
SCALED = dict(
    rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=None
    ),
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "llama-scaled": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True, rope_parameters=SCALED),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=24, tie_word_embeddings=True),
    "llama-256": lambda: transformers.LlamaConfig(**LLAMA | dict(hidden_size=256, intermediate_size=256)),
}
TYPES = [
    *((name, "F32") for name in ("gpt2", "llama", "llama-scaled", "qwen2", "qwen3")),
    *(("llama", kind) for kind in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")),
    *(("llama-256", kind) for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")),
    ("gpt2", "Q8_0"), ("qwen2", "Q5_0"), ("qwen3", "Q4_1"),
]  # fmt: skip
forward = jax.jit(decoder.forward, static_argnames="config")


def random_model(name):
    """A model of `transformers` whose norms and biases are far from their initial values."""
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf_name, leaf in model.named_parameters():
            noise = torch.randn(leaf.shape, generator=generator)
            if leaf.ndim == 1:
                leaf.copy_(0.1 * noise if "bias" in leaf_name else 1 + 0.3 * noise)
            else:
                leaf.copy_(1.5 * noise * leaf.shape[-1] ** -0.5)
    return model


def write(path, name="llama", kind="F32", **metadata):
    """Write a random model; returns it with the values of the file."""
    model = random_model(name)
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    tensors, kept = gguf_files.model_tensors(model.config, state, kind)
    if name == "llama-scaled":
        own, scaled = (
            1 / transformers.LlamaModel(config).rotary_emb.inv_freq.numpy()
            for config in (
                transformers.LlamaConfig(**LLAMA, rope_parameters=SCALED | dict(rope_type="default")),
                model.config,
            )
        )
        tensors["rope_freqs.weight"] = (scaled / own, "F32")
    metadata = gguf_files.model_metadata(model.config) | {
        key.replace("__", "."): value for key, value in metadata.items()
    }
    gguf_files.write(path, model.config.model_type, metadata, tensors)
    model.load_state_dict({key: torch.tensor(values) for key, values in kept.items()}, strict=False)
    return model


def logits_of(model, tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = forward(model.params, model.config, tokens, np.ones_like(tokens), positions)
    return np.asarray(decoder.logits(model.params, model.config, hidden))


def theirs(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


@pytest.fixture
def file(tmp_path):
    """A small Llama in float32."""
    write(tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


# --- Parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind", TYPES)
def test_logits_are_those_of_transformers(name, kind, tmp_path):
    model = write(tmp_path / "model.gguf", name, kind)
    hf.check_weights(tmp_path / "model.gguf", "ref")
    for unstacked in (True, False):
        ours = hf.load_ref(tmp_path / "model.gguf", dtype="float32", unstacked=unstacked)
    want = theirs(model, TOKENS)
    assert want.std() > 0.3 and np.abs(logits_of(ours, TOKENS) - want).max() < 1e-4


def test_a_folder_with_one_file_is_that_file(file, tmp_path):
    ours, same = (hf.load_ref(path, dtype="float32") for path in (file, str(tmp_path)))
    jax.tree.map(np.testing.assert_array_equal, ours.params, same.params)
    assert not hf.is_guide(tmp_path)
    trunk = hf.load_trunk(file, dtype="float32").params
    assert "head" not in trunk and trunk["embedding"].shape == (V, 64)


def test_any_slice_is_that_of_the_whole_tensor(tmp_path):
    """Slices as devices read them: permuted rows, transposed matrices, and across the blocks of a type."""
    rng = np.random.default_rng(0)
    for name, kind in (("llama", "Q4_0"), ("gpt2", "Q8_0")):
        model = write(tmp_path / f"{name}.gguf", name, kind)
        with hf_gguf.Tensors(tmp_path / f"{name}.gguf") as tensors:
            for tensor, values in model.state_dict().items():
                if tensor not in tensors.shapes:
                    continue
                for _ in range(4):
                    index = tuple(slice(*sorted(rng.choice(size + 1, 2, replace=False))) for size in values.shape)
                    np.testing.assert_array_equal(tensors.read(tensor, index), values.numpy()[index])


def test_the_stored_dtype_is_bfloat16_where_the_file_is(tmp_path):
    for kind, dtype in (("F32", "float32"), ("F16", "float32"), ("BF16", "bfloat16"), ("Q8_0", "float32")):
        write(tmp_path / "model.gguf", kind=kind)
        assert hf.stored_dtype(tmp_path) == dtype


def test_safetensors_in_the_folder_come_first(file, copy):
    folder = copy()
    file.rename(folder / "other.gguf")
    assert hf.read_config(folder, "float32").embed == 16


# --- Refusals -------------------------------------------------------------------------------------------------------


def test_files_that_are_none(tmp_path):
    assert load_refusal(tmp_path / "none.gguf").startswith("there is no file ")
    (tmp_path / "text.gguf").write_text("This is a text.")
    assert "is damaged or truncated (it does not begin as a GGUF file); download it again" in load_refusal(
        tmp_path / "text.gguf"
    )
    (tmp_path / "empty.gguf").touch()
    assert "is damaged or truncated" in load_refusal(tmp_path / "empty.gguf")
    assert "has 2 GGUF files (empty.gguf, text.gguf); give the path of one" in load_refusal(tmp_path)


@pytest.mark.slow
def test_without_the_package_only_gguf_files_are_refused(file, copy, monkeypatch):
    without = "import sys; sys.modules['gguf'] = None; import qsharp_jax.models.hf"  # as where it is not installed
    subprocess.run([sys.executable, "-c", without], check=True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert load_refusal(file).endswith("which is not installed; install it by `pip install gguf`")
    with pytest.raises(hf_gguf.UserError, match="needs the package gguf"):
        hf_gguf.Tensors(file)
    assert hf.load_ref(copy(), dtype="float32").config.embed == 16


def test_a_file_cut_anywhere_or_with_damaged_bytes(file):
    content = file.read_bytes()
    for length in (3, 20, 30, 200, 1500, len(content) // 2, len(content) - 40):
        file.write_bytes(content[:length])
        assert "is damaged or truncated" in load_refusal(file)
        assert "is damaged or truncated" in refusal(hf.check_weights, file, "ref")
    rng = np.random.default_rng(0)
    for _ in range(40):  # a header of random bytes is refused, if it is not read: nothing else comes out
        damaged = bytearray(content)
        for place in rng.integers(4, 1200, 8):
            damaged[place] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            hf.check_weights(file, "ref")
        except hf_gguf.UserError as error:
            assert str(file) in str(error)


@pytest.mark.parametrize(
    "metadata, message",
    [
        (dict(llama__attention__head_count=0), "is damaged"),
        (dict(llama__attention__head_count="four"), "is damaged"),
        (dict(llama__rope__scaling__type="yarn"), "the rotary positions are scaled by 'yarn', which is not supported"),
        (dict(llama__rope__dimension_count=8), "8 of the 16 dimensions of a head are rotated, which is not supported"),
        (dict(llama__attention__sliding_window=64), "sliding_window is 64, which is not supported"),
        (dict(general__alignment=0), "is damaged or truncated"),
        (dict(llama__block_count=3), "lacks the tensor model.layers.2."),
        (dict(llama__block_count=1), "has the tensor model.layers.1."),
        (dict(llama__feed_forward_length=64), "has the shape (64, 96), but its config requires (64, 64)"),
        (dict(split__count=3), "is one of 3 parts of a model; join them"),
    ],
)
def test_metadata_that_are_not_computed(metadata, message, tmp_path):
    write(tmp_path / "model.gguf", **metadata)
    assert message in load_refusal(tmp_path / "model.gguf")


def test_architectures_types_and_metadata_that_are_unknown(tmp_path):
    path, table = tmp_path / "model.gguf", (np.ones((8, 64), np.float32), "F32")
    gguf_files.write(path, "mamba", {}, {"token_embd.weight": table})
    assert "is of the architecture 'mamba'; gpt2, llama, qwen2, qwen3 can be read" in load_refusal(path)
    gguf_files.write(path, "llama", {}, {"token_embd.weight": table})
    assert "lacks llama.embedding_length in its metadata" in load_refusal(path)
    model = random_model("llama")
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    tensors, _ = gguf_files.model_tensors(model.config, state)
    metadata = gguf_files.model_metadata(model.config)
    gguf_files.write(path, "llama", metadata, tensors | {"blk.0.attn_q.weight": (np.zeros((64, 64), np.int8), "I8")})
    assert "self_attn.q_proj.weight is stored as I8; supported are F32, F16, BF16, Q8_0," in load_refusal(path)
    gguf_files.write(
        path, "llama", metadata, tensors | {"rope_freqs.weight": (np.arange(1, 9, dtype=np.float32), "F32")}
    )
    assert "rope_freqs.weight scales the rotary positions in another way than Llama 3.1's" in load_refusal(path)


# --- Real models ----------------------------------------------------------------------------------------------------

REAL = ("SmolLM2-135M-Instruct.Q4_1.gguf", "Qwen2.5-Coder-0.5B-Instruct.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_real_models_logits_are_those_of_transformers(name):
    folder = os.environ.get("QSHARP_GGUF")
    if folder is None or not (Path(folder) / name).is_file():
        pytest.skip(f"{name} is not in the folder that QSHARP_GGUF names; docs/models.md says how to get it")
    pytest.importorskip("accelerate", reason="transformers opens GGUF files with accelerate; pip install accelerate")
    tokenizer = Tokenizer.load(Path(folder) / name, prompt_format="chat")
    tokens = np.array([tokenizer.encode_prompt("Count to 12.") + tokenizer.encode_response("1 2 3, four five six ...")])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    want = theirs(model, tokens)
    del model
    error = np.abs(logits_of(hf.load_ref(Path(folder) / name, dtype="float32"), tokens) - want).max()
    print(f"{name}: error {error:.1e} of logits up to {np.abs(want).max():.1f}")  # pytest -rP shows it
    assert error < 1e-3
