"""Prompts in the forms that users have them in, and those that would be read by their keys."""

import pytest
from helpers import refusal

from qsharp_jax.notebook import inputs

CHAT = [{"role": "user", "content": "How many eggs?"}]
BOTH = pytest.mark.parametrize("read", [inputs.to_prompts, inputs.to_rows])


def test_prompts_are_texts_chats_and_rows_with_one_of_them():
    given = ["Sam", CHAT, {"prompt": "Mia", "best": 3}, {"prompt": CHAT}]
    assert inputs.to_prompts(given) == ["Sam", CHAT, "Mia", CHAT]
    assert inputs.to_rows(given) == [{"prompt": "Sam"}, {"prompt": CHAT}, *given[2:]]


def test_prompts_of_a_data_set():
    data = pytest.importorskip("datasets").Dataset.from_dict({"prompt": ["Sam", "Mia"], "best": [3, 5]})
    assert inputs.to_prompts(data) == inputs.to_prompts(data["prompt"]) == ["Sam", "Mia"]
    assert inputs.to_rows(data) == [{"prompt": "Sam", "best": 3}, {"prompt": "Mia", "best": 5}]


@BOTH
def test_one_chat_is_no_list_of_prompts(read):
    assert "prompt 1 is one message of a chat; give each chat as a list" in refusal(read, CHAT)


@BOTH
def test_columns_are_no_prompts(read):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    columns = {"prompt": ["Sam", "Mia"]}
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict(columns))
    for given, name in ((columns, "dict"), (splits, "DatasetDict"), (pandas.DataFrame(columns), "DataFrame")):
        assert f"prompts is a {name}, whose keys are no prompts; give a list" in refusal(read, given)
    assert read(pandas.DataFrame(columns).to_dict("records")) == read(["Sam", "Mia"])


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("Sam", "prompts is one text, 'Sam'; give a list"),
        (["Sam", 3], "prompt 2 is 3; give a text"),
        ([{"text": "Sam"}], "prompt 1 is {'text': 'Sam'}; give a text"),
        ([["Sam"]], "prompt 1: the prompt has a message 'Sam'"),
        ([[*CHAT, {"role": "assistant", "content": "Two."}]], "prompt 1: the prompt's last message must be the user's"),
    ],
)
def test_what_is_no_prompt_is_refused(prompts, words):
    assert words in refusal(inputs.to_prompts, prompts)
