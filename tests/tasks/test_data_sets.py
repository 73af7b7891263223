"""The problems of GSM8K, MATH, AIME and QuALITY as the model sees them, and what is a gold answer."""

import pytest
import small_data
from helpers import refusal
from small_data import settings

from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import aime, gsm8k, math, quality
from qsharp_jax.tasks.base import Problem


def first(task, folder, split="test"):
    (problem,) = task.problems(settings(folder), split, 1, 0)
    return problem


def test_gsm8k(tmp_path):
    """A thousand has a comma in the file, and none in the answer."""
    folder = small_data.write_gsm8k(tmp_path, train=20)
    problems = {p.prompt: p.answer for p in gsm8k.every_problem(str(folder))}
    assert len(problems) == 32
    question = "Sam has 1,001 eggs and finds 3. How many has he?"
    assert problems[f"Problem:\n\n{question} Write your answer inside \\boxed{{}}.\n\nSolution:"] == "1004"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("so it is 4.\n#### 1,080", "1080"),
        ("#### -5", "-5"),
        ("72", "72"),
        (" 2.50 ", "2.50"),
        ("1\n#### 2\n#### 3", "3"),
    ],
)
def test_gold_answers_of_gsm8k(answer, expected):
    assert gsm8k.gold(answer) == expected


@pytest.mark.parametrize("answer", ["", "####", "#### x", "#### 5 eggs", "it is 5", "#### 5\nor so"])
def test_no_gold_answers_of_gsm8k(answer):
    with pytest.raises(ValueError, match="does not end in a number"):
        gsm8k.gold(answer)


def test_math(tmp_path):
    """The training file's answers stand in the last box of the solution."""
    folder = small_data.write_math(tmp_path, train=10)
    train, test = first(math, folder, "train"), first(math, folder)
    number = train.prompt.partition("frac{")[2].partition("}")[0]
    assert train.answer == rf"\frac{{{number}}}{{7}}"
    assert test.problem_id.startswith("test/algebra/") and test.answer in test.prompt


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"solution": "It is 5."}, "has no answer in a box"),
        ({"solution": r"It is \boxed{5"}, "has no answer in a box"),
        ({"answer": r"\frac{1}{2"}, "has braces that do not match"),
        ({"answer": "1}{2"}, "has braces that do not match"),
        ({"answer": ""}, "the field 'answer' is ''"),
        ({"solution": r"It is \boxed{}."}, "has no answer in a box"),
        ({}, "there is no field 'solution', but problem"),
    ],
)
def test_no_gold_answers_of_math(tmp_path, fields, words):
    path = small_data.write_lines(tmp_path / "math" / "train.jsonl", [{"problem": "What?", **fields}])
    message = refusal(first, math, tmp_path, "train")
    assert f"{path}, line 1" in message and words in message


def test_an_empty_answer_is_called_so():
    for answer in ("", " \n"):
        with pytest.raises(ValueError, match="^the answer is empty$"):
            math.gold(answer)
    assert math.gold(r" \emptyset ") == r"\emptyset" and math.gold("{}") == "{}"


def test_aime(tmp_path):
    """It has ids of its own; the guide learns from MATH."""
    folder = small_data.write_aime(small_data.write_math(tmp_path))
    assert [(p.problem_id, p.answer) for p in aime.every_problem(str(folder))] == [
        ("60", "20"),
        ("61", "21"),
        ("62", "22"),
    ]
    assert aime.problems(settings(folder), "train", 27, 3) == math.problems(settings(folder), "train", 27, 3)
    assert aime.gold("025") == "25" and aime.gold("000") == "0"
    for answer in ("1000", "-1", "2.5", "x", ""):
        with pytest.raises(ValueError, match="is not an integer from 0 to 999"):
            aime.gold(answer)


def test_quality(tmp_path):
    folder = small_data.write_quality(tmp_path)
    problems = quality.every_problem(str(folder))
    assert len(problems) == 20 * 2 * 2 + 3
    *_, last = problems
    article = "Once upon a time there was the story d.\n" * 3
    choices = "(A) choice 1 of 2\n(B) choice 2 of 2\n(C) choice 3 of 2\n(D) choice 4 of 2"
    assert last.prompt == (
        f"Problem:\n\n{article}\n\nQuestion 2 of 1?\n\n{choices}\n\n Write your answer inside \\boxed{{}}.\n\nSolution:"
    )
    assert last.answer == "A" and last.problem_id.endswith("/d_1_2")
    assert [p.answer for p in problems[-3:]] == ["B", "C", "A"]


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"\boxed{B}", "B"), (r"\boxed{b}", "B"), (r"\boxed{(C)}", "C"), (r"\boxed{\text{D}}", "D"),
        (r"\boxed{\textbf{(A)}}", "A"), (r"\boxed{A. The moon}", "A"), (r"\boxed{B) He left}", "B"),
        (r"A or \boxed{C}", "C"), (r"\boxed{A}. No: \boxed{C}", "C"), (r"\boxed{A} or \boxed{C}", None), (r"\boxed{E}", None), (r"\boxed{Because}", None), (r"\boxed{1}", None), ("B", None),
        (r"\boxed{B", None), (r"\boxed{\text{Apples}}", None),
        (r"\boxed{A sense of duty}", None), (r"\boxed{a sense of duty}", None), (r"\boxed{\text{A sense of duty}}", None),
        (r"\boxed{(A sense of duty)}", None), (r"\boxed{A-levels}", None), (r"\boxed{D'Artagnan}", None), (r"\boxed{B, C}", None),
        (r"\boxed{A: The moon}", "A"), (r"\boxed{A ) The moon}", "A"), (r"\boxed{\text{A} The moon}", "A"), (r"\boxed{ A }", "A"), (r"\boxed{B He left}", "B"),
        (r"\boxed{A, because he left}", "A"), (r"\boxed{B; he left}", "B"), (r"\boxed{A - he left}", "A"), (r"\boxed{[C]}", None), (r"\boxed{B]}", "B"), (r"\boxed{$B$}", None), (r"\boxed{B$}", "B"), ("\\boxed{A\nThe moon}", "A"), (r"\boxed{A, B}", None), ("\\boxed{D \u2014 he left}", "D"),
    ],
)  # fmt: skip
def test_letters(response, letter):
    assert quality.parse(response) == letter
    assert quality.reward(Problem("p", "", "B"), response) == float(letter == "B")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gold_label": 5}, "the gold label is '5'"),
        ({"gold_label": None}, "the gold label is 'None'"),  # as in the test file, which has no labels
        ({"options": ["a", "b", "c"]}, "'options' must be a list of 4 texts"),
        ({"question": 3}, "the field 'question' is 3"),
    ],
)
def test_no_questions_of_quality(tmp_path, change, words):
    row = small_data.quality_row("d", 1)
    row["questions"][1].update(change)
    small_data.write_lines(
        tmp_path / "quality" / "QuALITY.v1.0.1.htmlstripped.dev", [small_data.quality_row("c", 1), row]
    )
    message = refusal(first, quality, tmp_path)
    assert "line 2, question 2" in message and words in message
    if "gold_label" in change:
        assert "/d_1_1: " in message
    row["questions"] = "none"
    small_data.write_lines(tmp_path / "quality" / "QuALITY.v1.0.1.htmlstripped.dev", [row])
    with pytest.raises(UserError, match="line 1: the field 'questions' must be a list of objects"):
        first(quality, tmp_path)
