"""Between text and token ids: what is added, what is taken away, and the words that a vocabulary does not have."""

import datetime
import itertools
import json
from types import SimpleNamespace

import bpe
import pytest
import tokenizers
from helpers import refusal
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qsharp_jax.data.tokenizer import Tokenizer, check_same_tokens
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import registry

CONFIGS = {
    "arithmetic": SimpleNamespace(max_events=3, equation_fraction=0.4, error_scale=1.0),
    "star_graph": SimpleNamespace(degree=2, path_length=3, num_nodes=12, pretrain_on="walks"),
}
TEXTS = {name: Tokenizer(registry.get(name).make_tokenizer(config)) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("name", TEXTS)
def test_a_prompt_starts_with_bos_a_response_ends_with_eos_and_nothing_else_is_added(name):
    text, (prompt, response) = TEXTS[name], registry.get(name).pretraining_texts(CONFIGS[name], 1, seed=3)[0]
    bos, eos = text.hf_tokenizer.bos_token_id, text.hf_tokenizer.eos_token_id
    first, last = text.encode_prompt(prompt), text.encode_response(response)
    assert first[0] == bos and last[-1] == eos and text.stop_ids == (eos,)
    special = set(text.hf_tokenizer.all_special_ids)
    assert special.isdisjoint(first[1:]) and special.isdisjoint(last[:-1])
    assert max(first + last) < text.vocab_size


@pytest.mark.parametrize("name", TEXTS)
def test_decoding_gives_the_text_back_without_special_tokens(name):
    """On hundreds of the task's own texts, whole, cut before the stop token, and with padding behind it."""
    text = TEXTS[name]
    pad = text.hf_tokenizer.pad_token_id
    for prompt, response in registry.get(name).pretraining_texts(CONFIGS[name], 200, seed=0):
        tokens = text.encode_response(response)
        assert text.decode(tokens) == text.decode(tokens[:-1]) == text.decode([*tokens, pad, pad]) == response
        assert text.decode(text.encode_prompt(prompt)) == prompt
    assert text.encode_prompt("") == [text.hf_tokenizer.bos_token_id] and text.decode([]) == ""


@pytest.mark.parametrize("name", TEXTS)
def test_blanks_around_a_task_s_prompt_do_not_matter(name):
    text, (prompt, response) = TEXTS[name], registry.get(name).pretraining_texts(CONFIGS[name], 1, seed=3)[0]
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


SENTENCES = ["Sam has 12 eggs.", "", " two  blanks ", "Élodie said: 😀!\n\nbye", "日本", "a<|eot|>b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bpe.save(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("bos", [True, False])
def test_a_plain_prompt_is_what_the_tokenizer_itself_makes_of_it(tmp_path, bos):
    text, own = Tokenizer.load(bpe.save(tmp_path, bos=bos)), bpe.make(bos=bos)
    for sentence in SENTENCES:
        assert text.encode_prompt(sentence) == own(sentence)["input_ids"]
        assert text.encode_response(sentence) == [*own(sentence, add_special_tokens=False)["input_ids"], bpe.EOS]
    assert (text.encode_prompt("") == [bpe.BOS]) == bos


def test_a_chat_prompt_is_one_turn_and_its_response_ends_the_next(folder):
    text, own = Tokenizer.load(folder, prompt_format="chat"), bpe.make()
    written = "<|bos|><|role|>user\nSam has 12 eggs.<|eot|>\n<|role|>assistant\n"
    assert text.encode_prompt("Sam has 12 eggs.") == own(written, add_special_tokens=False)["input_ids"]
    assert text.encode_response("Yes.") == [*own("Yes.", add_special_tokens=False)["input_ids"], bpe.EOT]
    turns = [{"role": "user", "content": "Sam"}, {"role": "assistant", "content": "Yes."}]
    whole = own(own.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    assert whole[:-1] == text.encode_prompt("Sam") + text.encode_response("Yes.")  # but for a line's end


def test_bos_is_not_put_before_a_text_that_has_it_already(folder, capsys):
    """A plain prompt may start with bos, as a chat template's text does; said once, however many prompts there are."""
    text, own = Tokenizer.load(folder), bpe.make(bos=False)
    written = own.apply_chat_template([{"role": "user", "content": "Sam"}], tokenize=False, add_generation_prompt=True)
    for prompt in (written, "<|bos|>", "<|bos|>a", "<|bos|><|bos|>"):
        assert text.encode_prompt(prompt) == own(prompt)["input_ids"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "starts with '<|bos|>' already" in line
    assert Tokenizer.load(folder, prompt_format="chat").encode_prompt("Sam") == text.encode_prompt(written)
    for prompt in ("a<|bos|>", "<|eos|>", ""):
        assert text.encode_prompt(prompt) == [bpe.BOS, *own(prompt)["input_ids"]]
    assert capsys.readouterr().err == ""
    without = Tokenizer(own, prefix_ids=())
    assert without.encode_prompt("<|bos|>a") == own("<|bos|>a")["input_ids"] and capsys.readouterr().err == ""


DATED = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "Today Date: {{ date_string }}\n{{ messages[0].content }}{% if messages|length > 1 %}{{ messages[1].content }}<|eot|>{% endif %}"
)


def test_a_template_s_date_is_the_tokenizer_s_and_not_the_clock_s(tmp_path):
    bpe.save(tmp_path, template=DATED)

    def prompt(**changes) -> str:
        text = Tokenizer.load(tmp_path, prompt_format="chat", **changes)
        assert text.end_of_turn == bpe.EOT
        return text.decode(text.encode_prompt("Sam"))

    assert prompt(date=datetime.date(2024, 2, 29)) == "Today Date: 29 Feb 2024\nSam"
    today = datetime.date.today()
    assert prompt() in [f"Today Date: {day:%d %b %Y}\nSam" for day in (today, today + datetime.timedelta(1))]
    own = Tokenizer.load(tmp_path).hf_tokenizer  # which reads the clock
    assert prompt(date=today) == own.apply_chat_template([{"role": "user", "content": "Sam"}], tokenize=False)
    bpe.save(tmp_path, template="{{ strftime_now('%Y-%m-%dT%H:%M:%S %A') }}{{ messages[-1].content }}<|eot|>")
    assert prompt(date=datetime.date(2026, 1, 31)) == "2026-01-31T00:00:00 SaturdaySam"


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
        assert set(Tokenizer.load(tmp_path, prompt_format=prompt_format).stop_ids) == expected
    assert Tokenizer.load(tmp_path, stop_ids=[5, 4]).stop_ids == (5, 4)


@pytest.mark.parametrize(
    ("own", "base", "expected"),
    [
        ({}, {"generation_config": [7, 9], "config": 8}, {7, 9}),  # what PEFT and TRL save
        ({"config": 6}, {"generation_config": 7}, {7}),
        ({"generation_config": 5}, {"generation_config": 7}, {5}),
        ({}, {"config": 8}, {8}),
        ({}, {}, set()),
    ],
)
def test_an_adapter_s_stop_ids_are_its_base_s_where_it_lists_none(tmp_path, own, base, expected):
    bpe.save(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    for folder, files in (("adapter", own), ("base", base)):
        for name, stop_ids in files.items():
            (tmp_path / folder / f"{name}.json").write_text(json.dumps({"eos_token_id": stop_ids}))
    text = Tokenizer.load(tmp_path / "adapter", base=tmp_path / "base")
    assert set(text.stop_ids) == {bpe.EOS, bpe.EOT} | expected


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
    assert Tokenizer(bpe.make(template=template)).end_of_turn == end


def test_ids_are_counted_to_the_last_entry_added_ones_among_them():
    tokenizer = bpe.make()
    before = Tokenizer(tokenizer).vocab_size
    tokenizer.add_tokens(["<|new|>"])
    text = Tokenizer(tokenizer)
    assert text.vocab_size == before + 1 == len(tokenizer) and text.encode_response("<|new|>")[0] == before


def test_special_tokens_past_the_embedding_are_never_drawn_and_no_prompt_has_them():
    tokenizer = bpe.make()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>", "extra_special_tokens": ["<|image|>"]})
    text = Tokenizer(tokenizer, embedding_rows=rows)
    assert text.vocab_size == text.needed_rows == rows and Tokenizer(tokenizer).vocab_size == rows + 2
    assert text.encode_prompt("Sam has 12 eggs.") == Tokenizer(bpe.make()).encode_prompt("Sam has 12 eggs.")
    chat = Tokenizer(tokenizer, "chat", embedding_rows=rows)
    for encode in (text.encode_prompt, chat.encode_prompt, text.encode_response):
        message = refusal(encode, "an <|image|> of eggs")
        assert "has the token '<|image|>', which is not in the model's embedding; remove it" in message
        assert message.count(". ") == 0
    check_same_tokens(text, Tokenizer(bpe.make()))  # a guide need not know what is never drawn
    with pytest.raises(UserError, match="2 of"):
        check_same_tokens(Tokenizer(tokenizer), Tokenizer(bpe.make()))


def test_an_embedding_needs_the_ids_of_texts_templates_and_stops():
    rows = len(bpe.make())
    ordinary, end, written = bpe.make(), bpe.make(), bpe.make(template="<|image|>" + bpe.TEMPLATE)
    ordinary.add_tokens(["dragons"])
    for tokenizer in (end, written):
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|image|>"]})
    for tokenizer, stop_ids in ((ordinary, None), (end, (rows,)), (written, None)):
        assert Tokenizer(tokenizer, stop_ids=stop_ids, embedding_rows=rows).needed_rows == rows + 1
    end.eos_token = "<|image|>"
    assert Tokenizer(end, embedding_rows=rows).needed_rows == rows + 1


@pytest.mark.parametrize("sizes", [(1,), (2, 1), (5,), (100,)])
def test_pieces_make_up_the_text_and_never_show_half_a_character(folder, sizes):
    text = Tokenizer.load(folder)
    for sentence in SENTENCES[:-1]:
        tokens, blocks, size = text.encode_response(sentence), [], itertools.cycle(sizes)
        while sum(map(len, blocks)) < len(tokens):
            begin = sum(map(len, blocks))
            blocks.append(tokens[begin : begin + next(size)])
        pieces = list(text.decode_stream(blocks))
        assert "".join(pieces) == text.decode(tokens) == sentence
        assert not any("\ufffd" in piece for piece in pieces)
        for count, _ in enumerate(blocks, start=1):  # as soon as it is sure
            sure = text.decode(sum(blocks[:count], [])).rstrip("\ufffd")
            assert "".join(pieces[:count]) == sure
    assert "".join(text.decode_stream([text.encode_response("😀")[:2]])) == "\ufffd"  # cut for good


@pytest.mark.parametrize("name", TEXTS)
def test_a_task_s_tokenizer_saved_for_other_programs_puts_bos_by_itself(name, tmp_path):
    text = TEXTS[name]
    prompt = registry.get(name).pretraining_texts(CONFIGS[name], 1, seed=3)[0][0]
    text.for_export().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(prompt)["input_ids"] == text.encode_prompt(prompt)
    assert Tokenizer.load(tmp_path).encode_prompt(prompt) == text.encode_prompt(prompt)
    assert text.hf_tokenizer("")["input_ids"] == []  # the task's own is as it was
    with pytest.raises(UserError, match="does not have"):
        Tokenizer.load(tmp_path).encode_prompt(prompt + "Ω")


def test_guides_go_with_the_reference_whose_tokens_they_know():
    ref = Tokenizer(bpe.make())
    check_same_tokens(ref, Tokenizer(bpe.make(bos=False, template=None)))
    more = bpe.make()
    more.add_tokens(["<pad>"])
    check_same_tokens(ref, Tokenizer(more))
    message = refusal(check_same_tokens, Tokenizer(more), ref)
    assert f"1 of {ref.vocab_size + 1} entries differ" in message
    assert f"id {ref.vocab_size} is '<pad>' in the reference and nothing in the guide" in message


# The special tokens of Llama 3 and of Llama 3.1 and 3.2, in their order, without most of the placeholders.
RESERVED = [f"<|reserved_special_token_{n}|>" for n in range(8)]
OLD = ["<|begin|>", "<|end|>", *RESERVED[:4], "<|role|>", "<|/role|>", RESERVED[4], "<|eot|>", *RESERVED[5:]]
NEW = [*OLD[:4], "<|pad|>", RESERVED[2], "<|role|>", "<|/role|>", "<|eom|>", "<|eot|>", "<|python|>", *RESERVED[3:5]]
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}<|role|>{{ turn.role }}<|/role|>{{ turn.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant<|/role|>{% endif %}"
)


def llama(special: list[str], *, names: dict[str, str] | None = None, **changes) -> Tokenizer:
    """A tokenizer with special tokens from id 4 on, behind the four of `bpe`; `names` renames entries of the model."""
    core = json.loads(bpe.make(bos=False).backend_tokenizer.to_str())
    core["added_tokens"] = []
    for n, entry in enumerate(special):
        old = next(name for name, token in core["model"]["vocab"].items() if token == n)
        core["model"]["vocab"][entry] = core["model"]["vocab"].pop(old)
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        core["added_tokens"].append({"id": n, "content": entry, **flags})
    for old, new in (names or {}).items():
        core["model"]["vocab"][new] = core["model"]["vocab"].pop(old)
    core["model"]["merges"] = []
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(core)), chat_template=LLAMA_TEMPLATE,
        bos_token="<|begin|>", eos_token="<|end|>",
    )  # fmt: skip
    return Tokenizer(tokenizer, **changes)


def test_renamed_special_tokens_that_neither_model_uses_are_counted_in_one_line(capsys):
    renamed = sum(a != b for a, b in zip(OLD, NEW))
    for ref, guide, first in ((OLD, NEW, "'<|reserved_special_token_2|>'"), (NEW, OLD, "'<|pad|>'")):
        check_same_tokens(llama(ref), llama(guide))
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{renamed} special tokens that neither model uses have other names" in line
        assert f"id 4 is {first} in the reference" in line
    check_same_tokens(llama(OLD), llama(OLD))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("ref", "guide", "count", "first"),
    [
        (dict(), dict(names={"q": "日"}), 1, "is 'q' in the reference and '日'"),  # that text can become
        (dict(), dict(special=NEW, names={"q": "日", "j": "本"}), 2, "'本'"),
        (dict(stop_ids=(1, 8)), dict(special=NEW), 1, "id 8 is '<|reserved_special_token_4|>' in the reference"),
        (dict(special=NEW, stop_ids=(1, 8, 9)), dict(), 1, "id 8 is '<|eom|>' in the reference"),
        (dict(), dict(special=[*OLD[:9], "<|over|>", *OLD[10:]]), 1, "id 9 is '<|eot|>' in the reference"),
        (dict(), dict(special=["<|start|>", *OLD[1:]]), 1, "id 0 is '<|begin|>' in the reference"),
    ],
)
def test_tokens_of_texts_templates_and_ends_must_be_the_same(ref, guide, count, first, capsys):
    ref, guide = (llama(**{"special": OLD} | changes) for changes in (ref, guide))
    message = refusal(check_same_tokens, ref, guide)
    assert f"{count} of {len(ref.entries)} entries differ" in message and first in message


def test_a_special_token_that_is_an_ordinary_one_of_the_guide_is_another():
    ordinary, special = llama(NEW).hf_tokenizer, llama(NEW).hf_tokenizer
    ordinary.add_tokens(["more"])
    special.add_special_tokens({"extra_special_tokens": ["<|more|>"]})
    for ref, guide in ((special, ordinary), (ordinary, special)):
        with pytest.raises(UserError, match="1 of"):
            check_same_tokens(Tokenizer(ref), Tokenizer(guide))


def test_what_differs_is_named_but_not_all_of_it():
    tokenizer = bpe.make()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = core["model"]["vocab"]
    names = {token: entry for entry, token in vocabulary.items()}
    vocabulary[names[10]], vocabulary[names[11]] = 11, 10
    vocabulary[names[20]], vocabulary[names[21]] = 21, 20
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(core)))
    message = refusal(check_same_tokens, Tokenizer(tokenizer), Tokenizer(other))
    assert f"id 10 is {names[10]!r} in the reference and {names[11]!r} in the guide" in message
    assert "id 11 is" in message and "id 20 is" in message and "id 21 is" not in message and "4 of" in message


def test_folders_that_cannot_be_are_one_sentence(folder, tmp_path):
    def sentence(**changes) -> str:
        message = refusal(Tokenizer.load, tmp_path, **changes)
        assert "\n" not in message and str(tmp_path) in message
        return message

    assert "has no tokenizer" in sentence()
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    assert "has no tokenizer" in sentence()
    (tmp_path / "tokenizer.json").write_text("{")
    assert "cannot read the tokenizer" in sentence()
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    assert "no chat template" in sentence(prompt_format="chat")
    for content, words in [("{", "damaged"), ("[]", "damaged"), ('{"eos_token_id": "x"}', "eos_token_id")]:
        (tmp_path / "generation_config.json").write_text(content)
        assert words in sentence()
    with pytest.raises(UserError, match="there is no folder"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(UserError, match="stop id 9999"):
        Tokenizer.load(folder, stop_ids=[9999])
    refusing = Tokenizer(bpe.make(template="{{ raise_exception('no users here') }}"), "chat")
    with pytest.raises(UserError, match="no users here"):
        refusing.encode_prompt("hello")
