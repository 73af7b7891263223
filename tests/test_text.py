"""Between text and token ids: what is added, what is taken away, and the words that a vocabulary does not have."""

from types import SimpleNamespace

import pytest

from qsharp_jax import tasks
from qsharp_jax.errors import UserError
from qsharp_jax.text import Text

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
