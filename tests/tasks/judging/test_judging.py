"""Judgements and classes of answers: cheap where strings decide, by algebra elsewhere, and checked on the real data."""

import itertools
import json
import random
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import REAL, needs_real_data

from qsharp_jax.tasks import finite, registry
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.judging import Judge, Judgement


@pytest.fixture(scope="module")
def judge():
    return Judge(registry.get("math"), workers=2)


def boxes(*answers):
    return [rf"So it is $\boxed{{{answer}}}$." for answer in answers]


def test_judgements_come_in_order(judge):
    problems = [Problem(str(i), "", answer) for i, answer in enumerate(["12", "12", r"\frac{1}{2}", "x", "12", "3"])]
    responses = [*boxes("12", "13", "0.5", "y"), "It is 12.", r"\boxed{3"]
    assert judge(problems, responses) == [
        Judgement(1.0, "12"), Judgement(0.0, "13"), Judgement(1.0, "0.5"), Judgement(0.0, "y"), Judgement(0.0, None),
        Judgement(0.0, None),
    ]  # fmt: skip


def without_workers(monkeypatch) -> Judge:
    def start(*arguments):
        raise AssertionError("asks a worker")

    monkeypatch.setattr("qsharp_jax.tasks.workers._Worker.__init__", start)
    return Judge(registry.get("gsm8k"))


@given(st.integers(), st.integers())
def test_whole_numbers_are_compared_as_such(a, b):
    """Whatever zeros they are written with; no worker is asked."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        judge = without_workers(monkeypatch)
        problem = Problem("p", "", str(a))
        assert judge([problem] * 3, boxes(a, b, f"{'-' * (a < 0)}00{abs(a)}")) == [
            Judgement(1.0, str(a)), Judgement(float(a == b), str(b)), Judgement(1.0, f"{'-' * (a < 0)}00{abs(a)}")
        ]  # fmt: skip


def test_whole_numbers_are_what_math_verify_says_they_are(judge):
    numbers = ["0", "7", "-7", "007", "12345678901234567890", "12345678901234567891", "100", "1000", "-0"]
    for gold, answer in itertools.product(numbers, repeat=2):
        assert judge._pool().same(gold, answer).result() == (int(gold) == int(answer)), (gold, answer)


@pytest.mark.parametrize("hostile", ["{" * 100_000, "}" * 100_000, "9" * 100_000, r"\boxed{" * 20_000, "(" * 100_000])
def test_an_answer_that_is_too_long_is_none(monkeypatch, hostile):
    (judgement,) = without_workers(monkeypatch)([Problem("p", "", "3")], [rf"\boxed{{{hostile}}}"])
    assert judgement.reward == 0.0


def test_the_same_question_is_asked_once(judge, monkeypatch):
    asked = []
    same = judge._pool().same
    monkeypatch.setattr(judge._pool(), "same", lambda gold, answer: asked.append((gold, answer)) or same(gold, answer))
    problem = Problem("p", "", r"\sqrt{8}")
    assert [j.reward for j in judge([problem] * 16, boxes(*[r"2\sqrt{2}", r"2^{3/2}"] * 8))] == [1.0] * 16
    assert sorted(asked) == sorted([(r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt{8}", r"2^{3/2}")])


def test_tasks_of_strings_judge_themselves(monkeypatch):
    """In this process: `parse` and `reward` are asked, and no worker."""
    task = types.SimpleNamespace(
        SYMBOLIC=False, parse=lambda response: response[-1:] or None,
        reward=lambda problem, response: 0.5 * response.endswith(problem.answer),
    )  # fmt: skip
    judge, problem = Judge(task), Problem("p", "", "b")
    assert judge([problem] * 3, ["ab", "ba", ""]) == [Judgement(0.5, "b"), Judgement(0.0, "a"), Judgement(0.0, None)]
    answers = [["b", "01", "1", None]]
    assert judge.classes([problem], answers) == answers


def test_classes(judge):
    """Right answers are spelled as the problem's, wrong ones as the first of their kind; each problem by itself."""
    problems = [Problem("p", "", r"\frac{1}{2}"), Problem("q", "", "7")]
    answers = [
        [None, "0.5", "2/3", r"\frac{2}{3}", r"\frac12", "0.5", r"\frac{4}{6}", "x"],
        [r"\frac12", "0.5", "007", "8", "7", None],
    ]
    assert judge.classes(problems, answers) == [
        [None, r"\frac{1}{2}", "2/3", "2/3", r"\frac{1}{2}", r"\frac{1}{2}", "2/3", "x"],
        [r"\frac12", r"\frac12", "7", "8", "7", None],
    ]


@given(
    st.lists(st.sampled_from("abcdef"), max_size=8),
    st.sets(st.sampled_from(list(itertools.combinations("abcdef", 2)))),
)
def test_classes_are_closed_under_sameness(answers, pairs):
    """Answers that are the same by way of others are one class, against a walk over the graph; right answers are not drawn in."""
    judge, first = Judge(registry.get("math")), {answer: place for place, answer in reversed([*enumerate(answers)])}
    same = {tuple(sorted(pair, key=lambda answer: first.get(answer, 99))) for pair in pairs}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            judge, "_same", lambda a, b: types.SimpleNamespace(result=lambda: a == b or (a, b) in same)
        )  # as `math_verify`, it is asked in one direction
        (spelled,) = judge.classes([Problem("p", "", "a")], [answers])
    right = {"a"} | {answer for answer in first if ("a", answer) in same}
    expected = {}
    for answer in first:
        reached, found = {answer}, set()
        while found != reached:
            found = set(reached)
            reached |= {b for pair in pairs for a, b in (pair, pair[::-1]) if a in found} & first.keys() - right
        expected[answer] = "a" if answer in right else min(reached, key=first.get)
    assert spelled == [expected[answer] for answer in answers]


@settings(max_examples=25)
@given(st.lists(st.sampled_from([None, "1/3", "2/6", "0.25", r"\frac14", "1/4", "3", "4", "04"]), max_size=10))
def test_classes_are_those_of_the_values(answers):
    values = {
        None: None, "1/3": 1 / 3, "2/6": 1 / 3, "0.25": 1 / 4, r"\frac14": 1 / 4, "1/4": 1 / 4, "3": 3, "4": 4,
        "04": 4,
    }  # fmt: skip
    (spelled,) = SHARED.classes([Problem("p", "", "0.25")], [answers])
    for (a, one), (b, other) in itertools.product(zip(answers, spelled), repeat=2):
        assert (one == other) == (values[a] == values[b])


SHARED = Judge(registry.get("math"), workers=2)


def solutions(name: str, split: str = "test"):
    """Each problem with its row's own solution."""
    task, file = registry.get(name), {"gsm8k": f"gsm8k/{split}", "math": "math500/test", "aime": "aime24/test"}[name]
    rows = [json.loads(line) for line in (REAL / f"{file}.jsonl").read_text(encoding="utf-8").split("\n") if line]
    problems = [problem for row in rows for problem in task.to_problems(finite.Row(file, row))]
    return problems, [row["answer" if name == "gsm8k" else "solution"] for row in rows]


def in_a_box(worked: str) -> str:
    r"""A solution of GSM8K as a model is asked to write it: "#### 72" as \boxed{72}."""
    steps, _, answer = worked.rpartition("\n#### ")
    return f"{steps}\nThe answer is $\\boxed{{{answer}}}$."


@needs_real_data
@pytest.mark.parametrize("split", ["test", "train"])
def test_all_of_gsm8k_is_right_by_its_own_solutions(split):
    """Commas between thousands are all that is not equal as a string."""
    problems, worked = solutions("gsm8k", split)
    assert len(problems) == {"test": 1319, "train": 7473}[split]
    judgements = SHARED(problems, [in_a_box(text) for text in worked])
    assert [p.problem_id for p, j in zip(problems, judgements) if j.reward != 1.0] == []


@needs_real_data
@pytest.mark.parametrize(("name", "number", "share"), [("math", 500, 0.99), ("aime", 30, 1.0)])
def test_the_solutions_of_math_and_aime_are_right(name, number, share):
    """Responses as models write them, several with other boxes before the last."""
    problems, worked = solutions(name)
    judgements = SHARED(problems, worked)
    failed = [(p.problem_id, p.answer, j.parsed) for p, j in zip(problems, judgements) if j.reward != 1.0]
    print(f"{name}: {len(failed)} of {len(problems)} judged wrong: {failed}")
    assert len(problems) == number and len(failed) <= (1 - share) * number, failed


@needs_real_data
@pytest.mark.parametrize("name", ["gsm8k", "math", "aime"])
def test_an_answer_with_one_digit_changed_is_wrong(name):
    problems, _ = solutions(name)
    draw = random.Random(0)
    changed = []
    for problem in problems:
        number = problem.answer.partition(r"\mbox")[0]
        places = [place for place, character in enumerate(number) if character.isdigit()]
        if places:
            place = draw.choice(places)
            digit = str((int(problem.answer[place]) + draw.randint(1, 9)) % 10)
            changed.append((problem, problem.answer[:place] + digit + problem.answer[place + 1 :]))
    assert len(changed) > 0.9 * len(problems)
    judgements = SHARED([problem for problem, _ in changed], boxes(*(answer for _, answer in changed)))
    assert [(p.answer, answer) for (p, answer), j in zip(changed, judgements) if j.reward] == []


@needs_real_data
@pytest.mark.parametrize("name", ["gsm8k", "math", "aime"])
def test_another_problems_answer_is_wrong(name):
    """Answers differ as far as their values do: compared as numbers where both are, else as texts without blanks and signs of
    layout, which the two must differ in.
    """
    problems, _ = solutions(name)
    others = problems[:]
    random.Random(0).shuffle(others)

    def plain(answer: str) -> str:
        for sign in (" ", r"\!", r"\left", r"\right", "dfrac", "tfrac", "$", r"\$", r"^\circ", ",", r"\%"):
            answer = answer.replace(sign, "frac" if "frac" in sign else "")
        return answer

    pairs = [(p, o) for p, o in zip(problems, others) if plain(p.answer) != plain(o.answer)]
    assert len(pairs) > 0.9 * len(problems)
    judgements = SHARED([p for p, _ in pairs], boxes(*(o.answer for _, o in pairs)))
    assert [(p.answer, o.answer) for (p, o), j in zip(pairs, judgements) if j.reward] == []
