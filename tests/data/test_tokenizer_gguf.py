"""Tokenizers in GGUF files: the ids of those that they were made from, and llama.cpp's ids for real models."""

import json
import os
import unicodedata
import urllib.request
from pathlib import Path

import bpe
import gguf_files
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qsharp_jax.data import tokenizer_files
from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.system.errors import UserError

TEXTS = [
    "Sam has 54 eggs. Sam gives 1234567 eggs to Mia.", "", " ", "  two  blanks ", "a\n\n b\t c\r\n\r\n", "Élodie: 😀!",
    "e\u0301 and \ufb01 ²½", "日本 2026 ١٢", "It's I'LL 1,000.50 + x_1 <tool> </tool>", "def f(x):\n    return x\n\n\n",
    "<|im_start|>user\nHow many?<|im_end|>\n <|im_end|><tool>", "\u00a0nbsp \u200b", "!!!\n\n???  ...\n",
]  # fmt: skip
QWEN2 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
LLAMA3 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
KINDS = ("gpt-2", "smollm", "qwen2", "llama-bpe")


def original(kind):
    """A tokenizer as the tokenizer.json of such models has it, trained on the texts."""
    core = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    if kind == "qwen2":
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    }.get(kind) or pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2 if kind == "qwen2" else LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    )
    core.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=bpe.TEMPLATE
    )


def file(folder, tokenizer, kind, **more):
    metadata = gguf_files.tokenizer_metadata(tokenizer, kind, **more)
    return gguf_files.write(folder / "model.gguf", "llama", metadata, {})


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_the_original(kind, tmp_path):
    tokenizer = original(kind)
    ours = tokenizer_files.read(file(tmp_path, tokenizer, kind))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ours(text, add_special_tokens=False)["input_ids"] == ids
        assert ours.decode(ids) == tokenizer.decode(ids)
    assert ours.get_vocab() == tokenizer.get_vocab()
    assert ours.chat_template == bpe.TEMPLATE and ours.eos_token == "<|im_end|>"
    with_bos = kind == "llama-bpe"  # where the file does not say, as llama.cpp has it
    assert ours("eggs")["input_ids"][0] == 0 if with_bos else ours("eggs") == ours("eggs", add_special_tokens=False)
    assert tokenizer_files.has_tokenizer(tmp_path) and tokenizer_files.has_tokenizer(tmp_path / "model.gguf")


def test_a_chat_begins_and_ends_as_the_file_says(tmp_path):
    tokenizer = original("qwen2")
    entries = sorted(tokenizer.get_vocab().values())
    path = file(tmp_path, tokenizer, "qwen2", add_bos_token=True, eot_token_id=entries[-1])
    chat = Tokenizer.load(path, prompt_format="chat")
    assert chat.prefix_ids == (0,) and chat.stop_ids == (1, entries[-1])
    assert Tokenizer.load(path).encode_prompt("eggs")[0] == 0


def test_a_response_ends_at_every_control_token_that_is_known_to_end_one(tmp_path):
    """llama.cpp does so too: files of instruct models name one of them, and the model may write another."""
    tokenizer = original("qwen2")
    special = ["<|endoftext|>", "<|eom_id|>", "<|python_tag|>", "<|done|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.add_tokens(["<|end|>"])  # no control token
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    path = file(tmp_path, tokenizer, "qwen2", eom_token_id=ids["<|done|>"])
    assert set(Tokenizer.load(path).stop_ids) == {1, ids["<|endoftext|>"], ids["<|eom_id|>"], ids["<|done|>"]}


def test_tokens_that_fill_up_the_embedding_are_none(tmp_path):
    metadata = gguf_files.tokenizer_metadata(tokenizer := original("qwen2"), "qwen2")
    for key, more in (("tokens", ["[PAD0]", "[PAD1]"]), ("token_type", [5, 5])):
        metadata[f"tokenizer.ggml.{key}"] = metadata[f"tokenizer.ggml.{key}"] + more
    gguf_files.write(tmp_path / "model.gguf", "qwen2", metadata, {})
    assert Tokenizer.load(tmp_path).vocab_size == len(tokenizer.get_vocab())


def test_the_files_of_a_tokenizer_beside_it_come_first(tmp_path):
    file(tmp_path, original("gpt-2"), "gpt-2")
    bpe.save(tmp_path)
    assert Tokenizer.load(tmp_path).entries[2] == "<|eot|>"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(model="llama"),
            "has a tokenizer of the kind 'llama', 'gpt-2', and 'gpt2' with gpt-2, smollm, qwen2, llama",
        ),
        (dict(pre="default"), "has a tokenizer of the kind 'gpt2', 'default', and"),
        (dict(merges=["a"]), "cannot read the tokenizer in"),
        (dict(token_type=[1]), "cannot read the tokenizer in"),
        (dict(eos_token_id=10_000), "cannot read the tokenizer in"),
    ],
)
def test_tokenizers_that_cannot_be_read(changes, message, tmp_path):
    path = file(tmp_path, original("gpt-2"), "gpt-2", **changes)
    with pytest.raises(UserError) as error:
        tokenizer_files.read(path)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct.Q4_1.gguf", "Qwen2.5-Coder-0.5B-Instruct.gguf"])
def test_ids_of_a_real_model_are_those_of_llama_cpp(name):
    folder = os.environ.get("QSHARP_GGUF")
    if folder is None or not (path := Path(folder) / name).is_file():
        pytest.skip(f"{name} is not in the folder that QSHARP_GGUF names; docs/models.md says how to get it")
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp judges the ids; pip install xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = str(path), 512, False
    server = xllamacpp.Server(params)
    ours = tokenizer_files.read(path)
    root = Path(__file__).parents[2]
    code = [line for file in sorted(root.glob("qsharp_jax/**/*.py")) for line in file.read_text().splitlines()]
    for text in [*TEXTS, *code[:: max(1, len(code) // 1000)]]:
        text = unicodedata.normalize("NFC", text)  # as Qwen's own tokenizer does, and llama.cpp does not
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", json.dumps({"content": text, "parse_special": True}).encode()
        )
        with urllib.request.urlopen(request) as answer:
            assert ours(text, add_special_tokens=False)["input_ids"] == json.load(answer)["tokens"], text
