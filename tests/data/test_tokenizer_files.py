"""Tokenizers out of folders of every family: the ids of `tokenizers` itself, and what contradictory files give."""

import dataclasses
import io
import json
from types import SimpleNamespace

import bpe
import hf_folders
import pytest
import tokenizers
from helpers import refusal
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.models import hf
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import arithmetic

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")
# Nothing of these is special, and a tokenizer may have no token for some of it.
TEXTS = [
    "Sam has 54 eggs. Sam gives 12 eggs to Mia.", "", " ", "  two  blanks ", "a\n\n b\t c", "Élodie: 😀!",
    "e\u0301 and \ufb01", "日本 2026", "It's 1,000.50 + x_1 <tool> </tool>", "def f(x):\n    return x",
]  # fmt: skip
SPECIAL = "<s>user\nHow many eggs?</s> <tool>x</tool>  <pad>y <s>"
TRAINING = [*TEXTS, "Sam has twelve eggs, and Mia has none."] * 3


def trained(core: tokenizers.Tokenizer, *special: str, alphabet=(), **options) -> tokenizers.Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*special], initial_alphabet=[*alphabet], show_progress=False, **options
    )
    core.train_from_iterator(TRAINING, trainer)
    return core


def llama3() -> tokenizers.Tokenizer:
    """Byte-level, with bos put by the post-processor, and numbers in groups of three."""
    core = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    pattern = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trained(core, "<s>", "</s>", alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    core.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])]
    )
    return core


def llama2(*, legacy: bool) -> tokenizers.Tokenizer:
    """Sentencepiece's blanks, by a normalizer or by a pre-tokenizer, and bytes where the vocabulary ends."""
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    trained(core, "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), limit_alphabet=40)
    plain = json.loads(core.to_str())  # the bytes are entries of the model, not added tokens
    plain["added_tokens"] = plain["added_tokens"][:3]
    core = tokenizers.Tokenizer.from_str(json.dumps(plain))
    if legacy:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.pre_tokenizer = None
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return core


def qwen() -> tokenizers.Tokenizer:
    """NFC, every digit its own token, no bos, and added tokens of which some are no special ones."""
    core = tokenizers.Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trained(core, "</s>", "<s>", alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    core.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", rstrip=True, normalized=False)])
    core.add_special_tokens([AddedToken("<pad>", lstrip=True)])
    return core


def unigram() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(TRAINING, trainer)
    return core


KINDS = {
    "llama3": llama3, "llama2": lambda: llama2(legacy=True), "metaspace": lambda: llama2(legacy=False), "qwen": qwen,
    "unigram": unigram,
}  # fmt: skip


@pytest.fixture(scope="module")
def cores() -> dict[str, tokenizers.Tokenizer]:
    return {name: make() for name, make in KINDS.items()}


def save(folder, core: tokenizers.Tokenizer, family: str = "llama", **config):
    """A folder's files but for the weights."""
    core.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": family, "eos_token_id": core.token_to_id("</s>")}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def assert_same_ids(folder, texts=TEXTS):
    """Ids and texts by `Tokenizer` are what `tokenizers` makes of the folder's file, there and back, in pieces or not."""
    text, own = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for written in texts:
        ids = own.encode(written, add_special_tokens=False).ids
        assert text.encode_response(written) == [*ids, own.token_to_id("</s>")], written
        assert text.encode_prompt(written) == own.encode(written).ids, written
        assert text.decode(ids) == own.decode(ids) == "".join(text.decode_stream([token] for token in ids)), written
    assert text.entries == {token: entry for entry, token in own.get_vocab().items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_folder_s_own_file_in_every_family(tmp_path, cores, kind, family):
    texts = TEXTS if kind != "unigram" else [text for text in TEXTS if text.isascii() and "\n" not in text]
    assert_same_ids(save(tmp_path, cores[kind], family, eos_token="</s>"), texts)
    if kind != "unigram":
        own = cores[kind].encode(SPECIAL, add_special_tokens=False).ids
        assert Tokenizer.load(tmp_path).encode_response(SPECIAL)[:-1] == own
        assert cores[kind].token_to_id("<s>") in own


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize(
    "name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer"]
)
def test_the_class_that_a_folder_names_does_not_matter(tmp_path, cores, name, family):
    for kind in ("llama2", "qwen"):
        assert_same_ids(save(tmp_path, cores[kind], family, tokenizer_class=name, eos_token="</s>", bos_token="<s>"))


@pytest.mark.parametrize("kind", ["qwen", "llama2", "metaspace"])
def test_blanks_and_lines_are_kept_there_and_back(tmp_path, cores, kind):
    text = Tokenizer.load(save(tmp_path, cores[kind], "qwen2", eos_token="</s>"))
    ids = text.encode_response("Sam has  54 eggs.\n 日本")
    assert text.decode(ids) == "".join(text.decode_stream([token] for token in ids)) == "Sam has  54 eggs.\n 日本"


@pytest.mark.parametrize("kind", ["qwen", "llama2", "metaspace"])
def test_the_texts_of_single_tokens_join_to_the_text(tmp_path, cores, kind):
    """SentencePiece's decoder drops the blank of a first token; a token alone is not the first."""
    text = Tokenizer.load(save(tmp_path, cores[kind], "qwen2", eos_token="</s>"))
    ids = text.encode_response("Sam has  54 eggs.\n")
    assert "".join(map(text.decode_one, ids)).removesuffix("</s>").lstrip(" ") == "Sam has  54 eggs.\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_s_tokenizer_comes_back(tmp_path, cores, family):
    name = {"gpt2": "gpt2", "qwen3": "qwen3"}.get(family, "llama")
    for kind, core in cores.items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>")
        shape = dataclasses.replace(
            hf_folders.CONFIGS[name], vocab_size=core.get_vocab_size(), qkv_bias=family == "qwen2", layers=1
        )
        hf.export_ref(hf_folders.ref(shape), tmp_path, tokenizer=tokenizer)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
        assert_same_ids(tmp_path, ["Sam has 54 eggs.", " Mia has none."])
        assert Tokenizer.load(tmp_path).encode_prompt("Sam has 54 eggs.") == core.encode("Sam has 54 eggs.").ids, kind


@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_s_words_are_read_as_words_in_every_family(tmp_path, family):
    task = SimpleNamespace(max_events=3, equation_fraction=0.4, error_scale=1.0)
    text = Tokenizer(arithmetic.make_tokenizer(task))
    text.for_export().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    loaded = Tokenizer.load(tmp_path)
    for prompt, response in arithmetic.pretraining_texts(task, 20, seed=0):
        assert loaded.encode_prompt(prompt) == text.encode_prompt(prompt)
        assert loaded.decode(loaded.encode_response(response)) == response
    with pytest.raises(UserError, match="does not have 'dragons'"):
        loaded.encode_prompt("Sam has 54 dragons.")


def test_what_the_file_puts_before_a_text_counts_whatever_the_other_files_say(tmp_path, cores, capsys):
    for config in ({}, {"bos_token": "<s>"}, {"bos_token": "<s>", "add_bos_token": True}):
        text = Tokenizer.load(save(tmp_path, cores["llama3"], **config))
        assert text.encode_prompt("Sam") == cores["llama3"].encode("Sam").ids
    assert text.prefix_ids == (0,) and capsys.readouterr().err == ""
    for kind, adds, words in (("llama3", False, "a token"), ("qwen", True, "nothing")):
        text = Tokenizer.load(save(tmp_path, cores[kind], bos_token="<s>", add_bos_token=adds))
        assert text.encode_prompt("Sam") == cores[kind].encode("Sam").ids
        error = capsys.readouterr().err
        assert f"add_bos_token is {json.dumps(adds)}, but tokenizer.json puts {words} before a text" in error


def test_what_the_file_puts_after_a_text_is_left_out_of_prompts_with_a_warning(tmp_path, cores, capsys):
    core = tokenizers.Tokenizer.from_str(cores["qwen"].to_str())
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 0)])
    text = Tokenizer.load(save(tmp_path, core))
    assert text.encode_prompt("Sam") == core.encode("Sam").ids[:-1]
    assert "appends '</s>' to every text" in capsys.readouterr().err


def test_eos_is_the_config_s_where_the_tokenizer_names_none(tmp_path, cores):
    text = Tokenizer.load(save(tmp_path, cores["llama3"], "gpt2"))
    assert text.hf_tokenizer.eos_token == "</s>" and text.encode_response("Sam")[-1] == 1 and text.stop_ids == (1,)
    for listed in (None, [], -1, 2**40, [10**6, 1]):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": listed}))
        assert Tokenizer.load(tmp_path).hf_tokenizer.eos_token == ("</s>" if listed == [10**6, 1] else None)


def test_templates_are_those_of_their_files_or_of_the_config(tmp_path, cores):
    save(tmp_path, cores["qwen"], "qwen2", eos_token="</s>", chat_template="<s>{{ messages[0].content }}")
    turn = [{"role": "user", "content": "Sam"}]

    def prompt() -> str:
        text = Tokenizer.load(tmp_path, prompt_format="chat")
        ids = text.encode_prompt("Sam")
        assert ids == text.hf_tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        return text.hf_tokenizer.decode(ids)

    assert prompt() == "<s>Sam"
    named = [{"name": "default", "template": "A{{ messages[0].content }}"}, {"name": "tool_use", "template": "B"}]
    save(tmp_path, cores["qwen"], "qwen2", eos_token="</s>", chat_template=named)
    assert prompt() == "ASam"
    template = "\n  {% if true %}C{% endif %}\n{{ messages[0].content }}{{ eos_token }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    assert prompt() == "\nCSam</s>", "blanks before a block and a line's end after it are not written"
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("D")
    assert prompt() == "\nCSam</s>"


def test_the_config_s_copy_of_the_added_tokens_does_not_change_them(tmp_path, cores):
    """Their flags are those of tokenizer.json, in whatever order and with whatever flags they are listed."""
    own = cores["qwen"].get_added_tokens_decoder()
    listed = {
        token: dict(content=entry.content, lstrip=not entry.lstrip, rstrip=False, special=True, normalized=True)
        for token, entry in own.items()
    }
    save(tmp_path, cores["qwen"], "qwen2", eos_token="</s>", pad_token="<pad>", added_tokens_decoder=listed)
    assert_same_ids(tmp_path)
    text = Tokenizer.load(tmp_path)
    assert text.encode_response(SPECIAL)[:-1] == cores["qwen"].encode(SPECIAL).ids
    assert text.hf_tokenizer.pad_token == "<pad>" and not own[cores["qwen"].token_to_id("<tool>")].special


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(added_tokens_decoder={"1": {"content": "<bos>"}}), "id 1 is '<bos>' in tokenizer_config.json and '<s>'"),
        (dict(added_tokens_decoder={"9999": {"content": "<x>"}}), "id 9999 is '<x>' in tokenizer_config.json and noth"),
        (dict(eos_token="<end>"), "'<end>' is a token in its other files and not in tokenizer.json"),
        (dict(bos_token="<begin>"), "'<begin>' is a token in its other files"),
        (dict(extra_special_tokens=["<|role|>"]), "'<|role|>' is a token in its other files"),
    ],
)  # fmt: skip
def test_files_that_contradict_each_other_are_refused(tmp_path, cores, config, words):
    save(tmp_path, cores["qwen"], "qwen2", **config)
    message = refusal(Tokenizer.load, tmp_path)
    assert words in message and str(tmp_path) in message and message.count(". ") == 0 and "\n" not in message


def test_a_padding_token_that_is_nowhere_else_changes_no_text(tmp_path, cores):
    text = Tokenizer.load(save(tmp_path, cores["qwen"], "qwen2", eos_token="</s>", pad_token="[PAD]"))
    assert text.needed_rows <= cores["qwen"].get_vocab_size() < text.vocab_size, "the embedding need not have it"
    for written in TEXTS:
        assert text.encode_prompt(written) == cores["qwen"].encode(written).ids


@pytest.mark.parametrize(
    "family, name", [("llama", "LlamaTokenizer"), ("mistral", None), ("gemma3_text", "GemmaTokenizer")]
)
def test_a_sentencepiece_model_alone_is_read(tmp_path, family, name):
    sentencepiece = pytest.importorskip("sentencepiece", reason="not installed, though requirements.txt has it")
    special = dict(bos_id=1, eos_id=2, unk_id=0)
    if family == "gemma3_text":
        special = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>")
        special |= dict(add_dummy_prefix=False, user_defined_symbols=["<end_of_turn>"])
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING * 10), model_writer=model, model_type="bpe", vocab_size=340, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2, **special,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "add_bos_token": True}))
    own, text = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), Tokenizer.load(tmp_path)
    assert text.stop_ids == (own.eos_id(),)
    for written in TEXTS:
        if not written.startswith(" "):  # where transformers adds no blank before a text
            assert text.encode_prompt(written) == [own.bos_id(), *own.encode(written)]
            assert text.decode(own.encode(written)) == own.decode(own.encode(written))


def test_a_folder_without_a_file_of_its_own_is_read_by_its_family(tmp_path):
    """GPT-2's old form, vocab.json and merges.txt."""
    core = json.loads(bpe.make(bos=False).backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(core["vocab"]))
    merges = "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in core["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": bpe.EOS}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eos|>"}))
    text, own = Tokenizer.load(tmp_path), bpe.make(bos=False)
    for sentence in ("Sam has 12 eggs.", " two  blanks "):
        assert text.encode_response(sentence) == [*own(sentence)["input_ids"], bpe.EOS]
