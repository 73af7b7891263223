"""Word problems against a second reading of their English, and their worked equations."""

import collections
import re
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsharp_jax.tasks import arithmetic
from qsharp_jax.tasks.base import Problem

CONFIG = types.SimpleNamespace(max_events=3, equation_fraction=0.4, error_scale=1.0)
WRONG = {"+": "-", "-": "+", "*": "+", "/": "-"}


def changed(**settings):
    return types.SimpleNamespace(**{**vars(CONFIG), **settings})


# One pattern a kind of sentence, written from the sentences and not from the module: the operation on the count.
READINGS = [
    ("boxes", r"\w+ buys (\d+) boxes of (\d+) \w+", "+"),
    ("buy", r"\w+ buys (\d+) \w+", "+"),
    ("give", r"\w+ gives (\d+) \w+ to \w+", "-"),
    ("lose", r"\w+ loses (\d+) \w+", "-"),
    ("pack", r"\w+ packs the \w+ into bags of (\d+)", "/"),
    ("double", r"The number of \w+ doubles", "*"),
    ("share", r"\w+ shares the \w+ among (\d+) kids", "/"),
    ("more", r"\w+ has (\d+) more \w+ than \w+", "+"),
    ("fewer", r"\w+ has (\d+) fewer \w+ than \w+", "-"),
    ("total", r"\w+ has (\d+) \w+", "+"),
    ("sells each", r"\w+ sells the \w+ for (\d+) dollars each", "*"),
]


def read(prompt):
    """The opening count and the events as (kind, operation, numbers)."""
    opening, *sentences = prompt.split(". ")
    question = sentences.pop()
    assert re.fullmatch(r"How many \w+ (does (\w+ have|\w+ get|each kid get)|do they have in total)\?", question)
    events = []
    for sentence in sentences:
        kind, match, op = next((k, m, op) for k, p, op in READINGS if (m := re.fullmatch(p, sentence)))
        events.append((kind, op, [int(n) for n in match.groups()] or [2]))
    return int(re.fullmatch(r"\w+ has (\d+) \w+", opening)[1]), events


def compute(op, left, right):
    if op == "/":
        assert left % right == 0
        return left // right
    return {"+": left + right, "-": left - right, "*": left * right}[op]


def solve(prompt):
    """Every count on the way, the answer last."""
    count, events = read(prompt)
    counts = [count]
    for _, op, numbers in events:
        number = numbers[0] * numbers[1] if len(numbers) == 2 else numbers[0]
        counts.append(compute(op, counts[-1], number))
    return counts


def equations(response):
    return [(int(a), op, int(b), int(c)) for a, op, b, c in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)\.", response)]


@pytest.fixture(scope="module")
def train():
    return arithmetic.problems(CONFIG, "train", 2000, seed=0)


@pytest.fixture(scope="module")
def test():
    return arithmetic.problems(CONFIG, "test", 500, seed=0)


@pytest.fixture(scope="module")
def corpus():
    return arithmetic.pretraining_texts(CONFIG, 10_000, seed=0)


@pytest.fixture(scope="module")
def stories(corpus):
    return [(prompt, response) for prompt, response in corpus if prompt]


@pytest.fixture(scope="module")
def tokenizer():
    return arithmetic.make_tokenizer(CONFIG)


def is_right(prompt, response):
    return arithmetic.parse(response) == str(solve(prompt)[-1])


def test_the_answer_is_what_the_english_says(train, test):
    for problem in train + test:
        counts = solve(problem.prompt)
        assert problem.answer == str(counts[-1])
        assert all(1 <= count <= 99 for count in counts)


def test_products_and_quotients_stay_within_the_table(train):
    for problem in train:
        counts = solve(problem.prompt)
        for before, after, (_, op, numbers) in zip(counts, counts[1:], read(problem.prompt)[1], strict=False):
            assert op != "*" or max(before, *numbers) <= 9
            assert op != "/" or max(after, *numbers) <= 9
            assert len(numbers) == 1 or max(numbers) <= 9


def test_stories_have_one_to_three_events_of_all_kinds(train):
    events = [read(problem.prompt)[1] for problem in train]
    assert {len(e) for e in events} == {1, 2, 3}
    assert {len(read(p.prompt)[1]) for p in arithmetic.problems(changed(max_events=1), "train", 50, seed=0)} == {1}
    shares = collections.Counter(kind for e in events for kind, _, _ in e)
    assert set(shares) == {kind for kind, _, _ in READINGS}
    assert min(shares.values()) > 0.015 * shares.total()


def test_a_problem_is_known_by_its_content_alone(train, test):
    """The same events about other people and things are no new problem."""
    contents = {str(read(problem.prompt)) for problem in train}
    assert len({problem.problem_id for problem in train}) == len(contents) == len(train)
    assert not contents & {str(read(problem.prompt)) for problem in test}


def test_train_and_test_stay_apart_for_every_seed(stories, test):
    tested = {str(read(p.prompt)) for p in arithmetic.problems(CONFIG, "test", 500, seed=7) + test}
    assert not tested & {str(read(p.prompt)) for p in arithmetic.problems(CONFIG, "train", 2000, seed=8)}
    assert not tested & {str(read(prompt)) for prompt, _ in stories}


def test_problems_are_the_same_in_every_process():
    # Recorded: a change here gives the problems of old rollouts other ids, and moves some from train to test.
    first = arithmetic.problems(CONFIG, "test", 1, seed=0)[0]
    assert first == Problem(
        problem_id="fb97876cc20b1edc",
        prompt="Sam has 21 shells. Mia has 4 fewer shells than Sam. Mia loses 7 shells. Mia buys 3 shells. "
        "How many shells does Mia have?",
        answer="13",
    )


def test_every_worked_equation_is_right(corpus):
    for _, response in corpus:
        worked = equations(response)
        assert worked
        for left, op, right, result in worked:
            assert compute(op, left, right) == result
            assert 0 <= result <= 99


def test_the_corpus_is_right_in_44_percent_of_its_answers(stories):
    accuracy = sum(is_right(prompt, response) for prompt, response in stories) / len(stories)
    assert accuracy == pytest.approx(0.44, abs=0.03)


def readings(prompt, response):
    """Each step's kind, its operation and the one worked; its numbers must be the prompt's and the count so far."""
    count, events = read(prompt)
    steps = iter(equations(response))
    for kind, op, numbers in events:
        number = numbers[0]
        if len(numbers) == 2:
            left, worked, right, number = next(steps)
            assert [left, right] == numbers
            yield kind, "*", worked
        left, worked, right, result = next(steps)
        assert (left, right) == (count, number)
        yield kind, op, worked
        count = result
    assert next(steps, None) is None
    assert response.endswith(rf" \boxed{{{count}}}")


def test_errors_are_readings_of_the_wrong_operation_and_nothing_else(stories):
    misread = collections.defaultdict(list)
    for prompt, response in stories:
        astray = False
        for kind, op, worked in readings(prompt, response):
            assert worked in (op, WRONG[op])
            if not astray:  # after an error, the right operation may have no equation
                misread[kind].append(worked != op)
            astray |= worked != op
    assert len(misread) == 11
    for kind, wrong in misread.items():
        assert 0.1 < sum(wrong) / len(wrong) < 0.55, kind


def test_without_errors_every_response_is_right():
    texts = arithmetic.pretraining_texts(changed(error_scale=0.0, equation_fraction=0.0), 500, seed=0)
    assert all(is_right(prompt, response) for prompt, response in texts)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_the_share_of_bare_equations(fraction):
    texts = arithmetic.pretraining_texts(changed(equation_fraction=fraction), 200, seed=0)
    bare = [response for prompt, response in texts if not prompt]
    assert len(texts) == 200 and len(bare) == 200 * fraction
    assert all(re.fullmatch(r"(\d+[-+*/]\d+=\d+\. ?)+(?<! )", response) for response in bare)


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"54-12=42. \boxed{42}", "42"), (r"\boxed{042}", "42"), (r"\boxed{0}", "0"), (r"\boxed{00}", "0"),
        (r"\boxed{1} \boxed{42}", "42"), (r"\boxed{42} and so on 7", "42"), (r"\boxed{42} \boxed{", None),
        (r"\boxed{42} \boxed{x}", None), (r"\boxed{4", None), (r"\boxed{}", None), (r"\boxed{-4}", None),
        (r"\boxed{4+2}", None), ("42}", None), ("54-12=42.", None), ("", None),
    ],
)  # fmt: skip
def test_the_last_box_is_the_answer(response, answer):
    assert arithmetic.parse(response) == answer


def test_the_reward_is_one_for_the_answer_and_nothing_else():
    problem = Problem("0", "Sam has 54 eggs. Sam gives 12 eggs to Mia. How many eggs does Sam have?", "42")
    assert arithmetic.reward(problem, r"54-12=42. \boxed{42}") == 1.0
    assert arithmetic.reward(problem, r"54+12=66. \boxed{66}") == 0.0
    assert arithmetic.reward(problem, r"\boxed{42} \boxed{66}") == 0.0
    assert arithmetic.reward(problem, "42") == 0.0


@given(st.text(st.sampled_from("\\boxed{} 0123456789"), max_size=30))
def test_parse_takes_any_text_and_returns_a_canonical_number(response):
    answer = arithmetic.parse(response)
    assert answer is None or answer == str(int(answer))


def test_one_token_a_digit_and_none_for_a_space(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(r"Sam has 54 eggs. 54/9=6. \boxed{6}"))
    words = ["Sam", " has ", "5", "4", " eggs", ". "]
    assert pieces == [*words, "5", "4", "/", "9", "=", "6", ". ", "\\boxed{", "6", "}"]


def test_sizes(tokenizer, stories):
    lengths = [[len(tokenizer.encode(text)) for text in pair] for pair in stories[:2000]]
    prompts, responses = zip(*lengths, strict=True)
    assert 60 <= len(tokenizer) <= 80
    assert 25 < sum(prompts) / len(prompts) < 35 and max(prompts) <= 48
    assert 20 < sum(responses) / len(responses) < 35 and max(responses) <= 56


def test_unknown_words_are_visible(tokenizer):
    for text in ("Zoe has 5 eggs.", "Sam has 5 emus.", "Sam eats 5 eggs.", "Sam has 5 eggs!", "Sam has\n"):
        assert tokenizer.unk_token_id in tokenizer.encode(text)


@pytest.mark.parametrize(
    "setting, value, allowed",
    [
        ("max_events", 0, "1..3"),
        ("max_events", 4, "1..3"),
        ("equation_fraction", -0.1, r"\[0, 1\]"),
        ("equation_fraction", 1.1, r"\[0, 1\]"),
        ("error_scale", -1.0, r"\[0, 1\]"),
        ("error_scale", float("nan"), r"\[0, 1\]"),
    ],
)
def test_a_setting_out_of_range_is_an_error(setting, value, allowed):
    with pytest.raises(ValueError, match=f"{setting} is {value}; it must be in {allowed}"):
        arithmetic.check(changed(**{setting: value}))
