"""`qsharp judge`: files of responses judged, without a model; and what it says to bad input."""

import json

import pytest
import small_data
from commands import refused

from qsharp_jax import cli


def judge(tmp_path, task: str, records, *arguments) -> list[dict]:
    source, output = small_data.write_lines(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    given = ("judge", "--task", task, "--input", source, "--output", output, *arguments)
    assert cli.main([str(argument) for argument in given]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]


def test_judged_lines_are_the_same_lines(tmp_path, capsys):
    """In their order, with whatever else they hold; an answer may be as in the data set, or a number."""
    records = [
        {"response": r"\boxed{1,080}", "answer": "so\n#### 1080", "note": "é\u2028"},
        {"answer": 5, "response": r"\boxed{6}", "reward": 1.0},
        {"response": "It is 5", "answer": "5"},
        {"response": r"\boxed{5.0}", "answer": "5", "problem_id": "p"},
        {"response": r"\boxed{4}", "answer": "5", "problem_id": "p"},
    ]
    judged = judge(tmp_path, "gsm8k", records)
    assert [(line["reward"], line["parsed"]) for line in judged] == [
        (1.0, "1,080"), (0.0, "6"), (0.0, None), (1.0, "5.0"), (0.0, "4")
    ]  # fmt: skip
    for line, record in zip(judged, records, strict=True):
        assert {key: line[key] for key in record if key != "reward"} == {
            k: v for k, v in record.items() if k != "reward"
        }
        assert list(line) == [*record, *(key for key in ("reward", "parsed") if key not in record)]
    said = capsys.readouterr().err
    assert "5 responses to 4 problems: mean reward over problems 0.3750" in said  # 1, 0, 0 and (1 + 0) / 2
    assert "1 without an answer" in said


def test_answers_are_looked_up_in_the_data_set(tmp_path):
    folder = small_data.write_aime(tmp_path / "data")
    records = [{"problem_id": "61", "response": r"\boxed{021}"}, {"problem_id": "60", "response": r"\boxed{21}"}]
    judged = judge(tmp_path, "aime", records, "--data", folder)
    assert [line["reward"] for line in judged] == [1.0, 0.0]


def test_tasks_of_strings(tmp_path):
    judged = judge(tmp_path, "arithmetic", [{"response": r"2+3=5. \boxed{05}", "answer": "5"}])
    assert judged == [{"response": r"2+3=5. \boxed{05}", "answer": "5", "reward": 1.0, "parsed": "5"}]
    judged = judge(tmp_path, "quality", [{"response": r"\boxed{(B)}", "answer": 2}])
    assert (judged[0]["reward"], judged[0]["parsed"]) == (1.0, "B")


GOOD = {"response": r"\boxed{5}", "answer": "5"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"response": ', 'line 2: expected a JSON object with a text "response"'),
        ("[1]", 'line 2: expected a JSON object with a text "response"'),
        ('{"response": 5, "answer": "5"}', 'line 2: expected a JSON object with a text "response"'),
        ('{"response": "\\ud800", "answer": "5"}', 'line 2: expected a JSON object with a text "response"'),
        ('{"response": "x"}', 'line 2: expected an "answer", a text or a number, or else a text "problem_id"'),
        ('{"response": "x", "answer": null}', 'line 2: expected an "answer"'),
        ('{"response": "x", "answer": true}', 'line 2: expected an "answer"'),
        ('{"response": "x", "problem_id": 7}', 'line 2: expected an "answer"'),
        ('{"response": "x", "answer": "five"}', "line 2: the answer 'five' does not end in a number"),
        ('{"response": "x", "problem_id": "no"}', "line 2: there is no problem 'no' in the task's data"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, capsys, line, words):
    source, output = small_data.write_lines(tmp_path / "in.jsonl", [GOOD]), tmp_path / "out.jsonl"
    source.write_text(source.read_text() + line + "\n")
    output.write_text("what was there")
    folder = small_data.write_gsm8k(tmp_path)
    message = refused(capsys, "judge", "--task", "gsm8k", "--input", source, "--output", output, "--data", folder)
    assert words in message and str(source) in message
    assert output.read_text() == "what was there"


def test_bad_arguments(tmp_path, capsys):
    source, output = small_data.write_lines(tmp_path / "in.jsonl", [GOOD]), tmp_path / "out.jsonl"
    given = ("--input", source, "--output", output)
    assert "did you mean 'gsm8k'" in refused(capsys, "judge", "--task", "gsm8", *given)
    assert "is the input itself" in refused(capsys, "judge", "--task", "gsm8k", "--input", source, "--output", source)
    assert "the task own has no answers" in refused(capsys, "judge", "--task", "own", *given)
    empty = small_data.write_lines(tmp_path / "empty.jsonl", [])
    assert "is empty" in refused(capsys, "judge", "--task", "gsm8k", "--input", empty, "--output", output)
    by_id = small_data.write_lines(tmp_path / "ids.jsonl", [{"response": "x", "problem_id": "p"}])
    message = refused(capsys, "judge", "--task", "star_graph", "--input", by_id, "--output", output)
    assert "no fixed set of problems" in message
