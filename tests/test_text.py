"""Between text and token ids: what is added, what is taken away, and the words that a vocabulary does not have."""

import itertools
import json
from types import SimpleNamespace

import bpe
import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qsharp_jax import tasks
from qsharp_jax.errors import UserError
from qsharp_jax.text import Text, check_same_tokens

CONFIGS = {
    "arithmetic": SimpleNamespace(max_events=3, equation_fraction=0.4, error_scale=1.0),
    "star_graph": SimpleNamespace(degree=2, path_length=3, num_nodes=12, pretrain_on="walks"),
}
TEXTS = {name: Text(tasks.get(name).make_tokenizer(config)) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("name", TEXTS)
def test_a_prompt_starts_with_bos_a_response_ends_with_eos_and_nothing_else_is_added(name):
    text, (prompt, response) = TEXTS[name], tasks.get(name).pretraining_texts(CONFIGS[name], 1, seed=3)[0]
    bos, eos = text.tokenizer.bos_token_id, text.tokenizer.eos_token_id
    first, last = text.encode_prompt(prompt), text.encode_response(response)
    assert first[0] == bos and last[-1] == eos and text.stop_ids == (eos,)
    special = set(text.tokenizer.all_special_ids)
    assert special.isdisjoint(first[1:]) and special.isdisjoint(last[:-1])
    assert max(first + last) < text.vocab_size


@pytest.mark.parametrize("name", TEXTS)
def test_decoding_gives_the_text_back_without_special_tokens(name):
    """On hundreds of the task's own texts, whole, cut before the stop token, and with padding behind it."""
    text = TEXTS[name]
    pad = text.tokenizer.pad_token_id
    for prompt, response in tasks.get(name).pretraining_texts(CONFIGS[name], 200, seed=0):
        tokens = text.encode_response(response)
        assert text.decode(tokens) == text.decode(tokens[:-1]) == text.decode([*tokens, pad, pad]) == response
        assert text.decode(text.encode_prompt(prompt)) == prompt
    assert text.encode_prompt("") == [text.tokenizer.bos_token_id] and text.decode([]) == ""


@pytest.mark.parametrize("name", TEXTS)
def test_blanks_around_a_task_s_prompt_do_not_matter(name):
    text, (prompt, response) = TEXTS[name], tasks.get(name).pretraining_texts(CONFIGS[name], 1, seed=3)[0]
    assert text.encode_prompt(f" {prompt}\n ") == text.encode_prompt(prompt)
    assert text.encode_response(f"\t{response} ") == text.encode_response(response)
    with pytest.raises(UserError, match="at character 2 of"):
        text.encode_prompt("  § ")


@pytest.mark.parametrize(
    ("name", "prompt", "piece"),
    [
        ("arithmetic", "Sam has 54 dragons. How many dragons does Sam have?", "dragons"),
        ("arithmetic", "Élodie has 54 eggs.", "É"),
        ("arithmetic", "Sam has 54 eggs😀. Mia has 3 eggs.", "😀"),
        ("arithmetic", "Sam has 54 eggs.\nMia has 3 eggs.", "\n"),
        ("star_graph", "1,2|1,3;3,4/1,4=", ";"),
        ("star_graph", "1,2|1,3|3,40/1,40=", "40"),
        ("star_graph", "1,2 |1,3/1,3=", " "),
    ],
)
def test_an_unknown_word_is_named_with_its_place(name, prompt, piece):
    """The first of them, at the character where it stands, counted from 0; a blank is shown for what it is."""
    with pytest.raises(UserError) as caught:
        TEXTS[name].encode_prompt(prompt)
    message = str(caught.value)
    assert repr(piece) in message
    assert f"at character {prompt.index(piece)} " in message


# --- Tokenizers of downloaded models --------------------------------------------------------------------------------

SENTENCES = ["Sam has 12 eggs.", "", " two  blanks ", "Élodie said: 😀!\n\nbye", "日本", "a<|eot|>b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bpe.save(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("bos", [True, False])
def test_a_plain_prompt_is_what_the_tokenizer_itself_makes_of_it(tmp_path, bos):
    text, own = Text.load(bpe.save(tmp_path, bos=bos)), bpe.make(bos=bos)
    for sentence in SENTENCES:
        assert text.encode_prompt(sentence) == own(sentence)["input_ids"]
        assert text.encode_response(sentence) == [*own(sentence, add_special_tokens=False)["input_ids"], bpe.EOS]
    assert (text.encode_prompt("") == [bpe.BOS]) == bos


def test_a_chat_prompt_is_one_turn_and_its_response_ends_the_next(folder):
    text, own = Text.load(folder, prompt_format="chat"), bpe.make()
    written = "<|bos|><|role|>user\nSam has 12 eggs.<|eot|>\n<|role|>assistant\n"
    assert text.encode_prompt("Sam has 12 eggs.") == own(written, add_special_tokens=False)["input_ids"]
    assert text.encode_response("Yes.") == [*own("Yes.", add_special_tokens=False)["input_ids"], bpe.EOT]
    turns = [{"role": "user", "content": "Sam"}, {"role": "assistant", "content": "Yes."}]
    whole = own(own.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    assert whole[:-1] == text.encode_prompt("Sam") + text.encode_response("Yes.")  # but for a line's end


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, {bpe.EOS, bpe.EOT}),
        ({"eos_token_id": 7}, None, {bpe.EOS, bpe.EOT, 7}),
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 8}, {bpe.EOS, bpe.EOT, 7, 9}),
        ({}, {"eos_token_id": 8}, {bpe.EOS, bpe.EOT, 8}),
        ({"eos_token_id": [7, 50256]}, None, {bpe.EOS, bpe.EOT, 7}),  # a config made for another vocabulary
    ],
)
def test_stop_ids_come_from_the_folder_the_tokenizer_and_the_chat_template(tmp_path, generation, config, expected):
    bpe.save(tmp_path, generation_config=generation)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    for prompt_format in ("plain", "chat"):
        assert set(Text.load(tmp_path, prompt_format=prompt_format).stop_ids) == expected
    assert Text.load(tmp_path, stop_ids=[5, 4]).stop_ids == (5, 4)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, None),
        ("{{ raise_exception('no answers') }}", None),
        ("{% for turn in messages %}{{ turn.content }}{% endfor %}", None),
        ("{% for turn in messages %}{{ turn.content.strip() }}\n<|eos|>{% endfor %}", bpe.EOS),
        (bpe.TEMPLATE, bpe.EOT),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes_after_an_answer(template, end):
    assert Text(bpe.make(template=template)).end_of_turn == end


def test_ids_are_counted_to_the_last_entry_added_ones_among_them():
    tokenizer = bpe.make()
    before = Text(tokenizer).vocab_size
    tokenizer.add_tokens(["<|new|>"])
    text = Text(tokenizer)
    assert text.vocab_size == before + 1 == len(tokenizer) and text.encode_response("<|new|>")[0] == before


@pytest.mark.parametrize("sizes", [(1,), (2, 1), (5,), (100,)])
def test_pieces_make_up_the_text_and_never_show_half_a_character(folder, sizes):
    text = Text.load(folder)
    for sentence in SENTENCES[:-1]:
        tokens, blocks, size = text.encode_response(sentence), [], itertools.cycle(sizes)
        while sum(map(len, blocks)) < len(tokens):
            begin = sum(map(len, blocks))
            blocks.append(tokens[begin : begin + next(size)])
        pieces = list(text.pieces(blocks))
        assert "".join(pieces) == text.decode(tokens) == sentence
        assert not any("\ufffd" in piece for piece in pieces)
        for count, _ in enumerate(blocks, start=1):  # as soon as it is sure
            sure = text.decode(sum(blocks[:count], [])).rstrip("\ufffd")
            assert "".join(pieces[:count]) == sure
    assert "".join(text.pieces([text.encode_response("😀")[:2]])) == "\ufffd"  # cut for good


def test_pieces_of_a_word_level_text():
    text = TEXTS["star_graph"]
    tokens = text.encode_response("0,11,3")
    assert "".join(text.pieces([token] for token in tokens)) == "0,11,3"


@pytest.mark.parametrize("name", TEXTS)
def test_a_task_s_tokenizer_saved_for_other_programs_puts_bos_by_itself(name, tmp_path):
    text = TEXTS[name]
    prompt = tasks.get(name).pretraining_texts(CONFIGS[name], 1, seed=3)[0][0]
    text.for_other_programs().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(prompt)["input_ids"] == text.encode_prompt(prompt)
    assert Text.load(tmp_path).encode_prompt(prompt) == text.encode_prompt(prompt)
    assert text.tokenizer("")["input_ids"] == []  # the task's own is as it was
    with pytest.raises(UserError, match="does not have"):
        Text.load(tmp_path).encode_prompt(prompt + "Ω")


def test_guides_go_with_the_reference_whose_tokens_they_know():
    ref = Text(bpe.make())
    check_same_tokens(ref, Text(bpe.make(bos=False, template=None)))
    more = bpe.make()
    more.add_tokens(["<pad>"])
    check_same_tokens(ref, Text(more))
    with pytest.raises(UserError) as caught:
        check_same_tokens(Text(more), ref)
    assert f"1 of {ref.vocab_size + 1} entries differ" in str(caught.value)
    assert f"id {ref.vocab_size} is '<pad>' in the reference and nothing in the guide" in str(caught.value)


def test_what_differs_is_named_but_not_all_of_it():
    tokenizer = bpe.make()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = core["model"]["vocab"]
    names = {token: entry for entry, token in vocabulary.items()}
    vocabulary[names[10]], vocabulary[names[11]] = 11, 10
    vocabulary[names[20]], vocabulary[names[21]] = 21, 20
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(core)))
    with pytest.raises(UserError) as caught:
        check_same_tokens(Text(tokenizer), Text(other))
    message = str(caught.value)
    assert f"id 10 is {names[10]!r} in the reference and {names[11]!r} in the guide" in message
    assert "id 11 is" in message and "id 20 is" in message and "id 21 is" not in message and "4 of" in message


def test_folders_that_cannot_be_are_one_sentence(folder, tmp_path):
    def sentence(**changes) -> str:
        with pytest.raises(UserError) as caught:
            Text.load(tmp_path, **changes)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
        return str(caught.value)

    assert "has no tokenizer" in sentence()
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    assert "has no tokenizer" in sentence()
    (tmp_path / "tokenizer.json").write_text("{")
    assert "cannot be read" in sentence()
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    assert "no chat template" in sentence(prompt_format="chat")
    for content, words in [("{", "damaged"), ("[]", "damaged"), ('{"eos_token_id": "x"}', "eos_token_id")]:
        (tmp_path / "generation_config.json").write_text(content)
        assert words in sentence()
    with pytest.raises(UserError, match="there is no folder"):
        Text.load(tmp_path / "none")
    with pytest.raises(UserError, match="stop id 9999"):
        Text.load(folder, stop_ids=[9999])
    refusing = Text(bpe.make(template="{{ raise_exception('no users here') }}"), "chat")
    with pytest.raises(UserError, match="no users here"):
        refusing.encode_prompt("hello")
