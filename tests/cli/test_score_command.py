"""Files of prompts and responses: every line once and in order whatever the stops, and nothing foreign is touched."""

import json

import bpe
import numpy as np
import pytest
from helpers import refusal

from qsharp_jax.cli import score as command
from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.system.errors import UserError

TEXT = Tokenizer(bpe.make())
ADDED = list(command.ADDED)
RECORDS = [
    {"prompt": "How many eggs?", "response": " Twelve\u2028eggs, 日本."},
    {"prompt_tokens": [0, 5, 7], "response_tokens": [9, 9, 1], "id": 17},
    {"id": "x", "prompt": "Sam", "response": "", "prompt_tokens": [4, 4], "response_tokens": [8]},  # ids come first
    *({"prompt": f"Sam has {n} eggs", "response": "eggs " * n} for n in range(30)),
]


def lines(records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def expected_tokens(record) -> tuple[list[int], list[int]]:
    if "prompt_tokens" in record:
        return record["prompt_tokens"], record["response_tokens"]
    encode = bpe.make()
    return encode(record["prompt"])["input_ids"], [
        *encode(record["response"], add_special_tokens=False)["input_ids"], bpe.EOS
    ]  # fmt: skip


def log_probs(examples, bucket):
    """A number per token that tells which it is, and after which."""
    assert all(len(example) <= bucket < max(2 * len(example), 33) for example in examples)
    return [-np.float32(1) / 3 * (np.asarray(e.response) + len(e.prompt)) for e in examples]


def means(examples, bucket):
    return [np.asarray(e.response, np.float32) / 7 for e in examples]


def score(source, output, prompt_format="plain", **changes):
    """Do what the command does, with scorers that need no model."""
    records = command.read(source)
    scorers = dict(log_probs=log_probs, means=means) | changes
    scores = [*["ref_log_probs"] * bool(scorers["log_probs"]), *["values", "value"] * bool(scorers["means"])]
    done = command.resume(output, records, scores, prompt_format)
    examples = command.encode(records[done:], TEXT, 200, first=done + 1)
    command.write(output, records[done:], examples, prompt_format=prompt_format, rows=1, **scorers)
    return done


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n" + lines(RECORDS) + "  \n", encoding="utf-8")
    return path


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


def test_every_record_comes_back_with_its_scores(source, output):
    assert score(source, output) == 0
    made = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [{key: item for key, item in record.items() if key not in ADDED} for record in made] == RECORDS
    for record in made:
        assert record.get("prompt_format") == (None if "prompt_tokens" in record else "plain")
        prompt, response = expected_tokens(record)
        np.testing.assert_allclose(record["ref_log_probs"], -(np.asarray(response) + len(prompt)) / 3, rtol=1e-6)
        np.testing.assert_allclose(record["values"], np.asarray(response) / 7, rtol=1e-6)
        assert record["value"] == record["values"][-1]
        assert np.float32(record["ref_log_probs"][0]) == -np.float32(1) / 3 * (response[0] + len(prompt))  # every bit


@pytest.mark.parametrize("absent", ["log_probs", "means"])
def test_what_a_model_that_is_not_there_would_add_is_left_out(source, output, absent):
    stale = [record | {"ref_log_probs": [0.5], "values": [7.0], "value": 7.0} for record in RECORDS]
    source.write_text(lines(stale), encoding="utf-8")
    score(source, output, **{absent: None})
    record = json.loads(output.read_text(encoding="utf-8").split("\n")[0])
    scores = {"values", "value"} if absent == "log_probs" else {"ref_log_probs"}
    assert set(record) - set(RECORDS[0]) == {"prompt_format", *scores}
    assert record.get("values", [0.0]) != [7.0] and record.get("ref_log_probs", [0.0]) != [0.5]


@pytest.mark.parametrize("kept", [0, 1, 40, 300, 2500, -2, -1, None])
def test_a_scoring_cut_anywhere_and_repeated_ends_as_one_that_never_stopped(source, output, kept):
    score(source, output)
    whole = output.read_bytes()
    output.write_bytes(whole[:kept])
    done = score(source, output)
    assert output.read_bytes() == whole
    assert done == whole[:kept].count(b"\n")


def test_a_stop_between_two_chunks_loses_what_was_under_way_only(source, output):
    calls = []

    def stopping(examples, bucket):
        calls.append(len(examples))
        if sum(calls) > command.CHUNK:
            raise KeyboardInterrupt
        return means(examples, bucket)

    with pytest.raises(KeyboardInterrupt):
        score(source, output, means=stopping)
    assert output.read_bytes().count(b"\n") == command.CHUNK
    assert score(source, output) == command.CHUNK
    other = output.with_name("other.jsonl")
    score(source, other)
    assert output.read_bytes() == other.read_bytes()


def test_an_output_of_something_else_is_refused_and_left_alone(source, output):
    score(source, output)
    whole = output.read_text(encoding="utf-8")
    first, second = (line + "\n" for line in whole.split("\n")[:2])  # not `splitlines`: a text has one of its others
    for content, words in [
        (second, "line 1, is not of record 1"),
        (first + first, "line 2, is not of record 2"),
        (whole + first, f"line {len(RECORDS) + 1}, is not"),
        ("notes without an end", "ends with a line that is not of record 1"),
        (first + "notes", "ends with a line that is not of record 2"),
        (whole + "{", f"not of record {len(RECORDS) + 1}"),
        ("notes\n", "line 1"),
        ("[1]\n", "line 1"),
        ("7\n", "line 1"),
        (first.replace('"value"', '"worth"'), "line 1"),
        (lines(RECORDS[:1]), "has no scores, where this command gives ref_log_probs and values and value"),
    ]:
        output.write_text(content, encoding="utf-8")
        message = refusal(score, source, output)
        assert words in message and str(output) in message
        assert output.read_text(encoding="utf-8") == content
    output.write_text(first, encoding="utf-8")
    with pytest.raises(UserError, match="where this command gives values and value"):
        score(source, output, log_probs=None)
    with pytest.raises(UserError, match='line 1, was scored with prompt_format "plain", and this command has "chat"'):
        score(source, output, prompt_format="chat")


def test_a_response_generated_in_another_format_is_named(capsys):
    generated = [RECORDS[0] | {"settings": {"prompt_format": prompt_format}} for prompt_format in ("chat", "plain")]
    command._warn_of_other_format([*RECORDS, *generated], "chat", first=1)
    number = len(RECORDS) + 2
    assert f"record {number} was generated with the prompt format plain, and is scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "{", "7", "[]", '{"prompt": "a"}', '{"prompt": "a", "response": 7}', '{"prompt_tokens": [1], "response": "a"}',
        '{"prompt_tokens": [1.0], "response_tokens": [1]}', '{"prompt_tokens": [true], "response_tokens": [1]}',
        '{"prompt": "a", "response": "\\ud83d"}', '{"prompt": "a", "response": "b", "score": NaN}',
    ],
)  # fmt: skip
def test_a_line_that_is_no_record_is_named(source, line):
    source.write_text(lines(RECORDS[:2]) + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 3: expected a JSON object"):
        command.read(source)


@pytest.mark.parametrize(("content", "words"), [(b"\n", "is empty"), (b"\xff\xfe\x00", "UTF-8")])
def test_a_file_without_lines_is_named(source, content, words):
    source.write_bytes(content)
    with pytest.raises(UserError, match=words):
        command.read(source)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt_tokens": [], "response_tokens": [1]}, "no prompt tokens"),
        ({"prompt_tokens": [1], "response_tokens": []}, "no response tokens"),
        ({"prompt_tokens": [1], "response_tokens": [TEXT.vocab_size]}, f"vocabulary of {TEXT.vocab_size}"),
        ({"prompt_tokens": [-1], "response_tokens": [1]}, "outside the vocabulary"),
        ({"prompt_tokens": [1] * 8, "response_tokens": [1] * 3}, "8 prompt and 3 response tokens"),
    ],
)
def test_a_record_that_cannot_be_scored_is_named(record, words):
    message = refusal(command.encode, [RECORDS[1], record], TEXT, 10, first=4)
    assert "record 5" in message and words in message
