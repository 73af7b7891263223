"""The data sets' files: what is read, what is refused with its place, and that splits are disjoint and stay the same."""

import json
import random

import datasets
import pytest
import small_data
from helpers import refusal
from small_data import REAL, needs_real_data, settings

from qsharp_jax.tasks import aime, finite, gsm8k, math, quality

WRITE = {
    "gsm8k": small_data.write_gsm8k,
    "math": small_data.write_math,
    "aime": lambda folder: small_data.write_aime(small_data.write_math(folder)),
    "quality": small_data.write_quality,
}
TASKS = {"gsm8k": gsm8k, "math": math, "aime": aime, "quality": quality}


@pytest.fixture(params=list(TASKS))
def task_and_folder(request, tmp_path):
    return TASKS[request.param], WRITE[request.param](tmp_path)


def ids(problems):
    return [problem.problem_id for problem in problems]


def sentence(call, *arguments) -> str:
    message = refusal(call, *arguments)
    assert "\n" not in message and message.count(". ") == 0, "one sentence"
    return message


def test_splits_are_disjoint_and_do_not_depend_on_the_runs_seed(task_and_folder):
    """Nine tenths to learn from and a tenth to validate on, by `split_seed` alone; the run's seed orders them."""
    task, folder = task_and_folder
    config = settings(folder)
    validation_config = settings(folder)
    validation_config.evaluate_on = "validation"
    source = math if task is aime else task
    everything = finite.read(source.TRAIN, str(folder))
    size = len(everything)
    held_out = round(0.1 * size)
    train = task.problems(config, "train", size - held_out, 1)
    validation = task.problems(validation_config, "test", held_out, 1)
    assert sorted(ids(train) + ids(validation)) == sorted(ids(everything))
    again = task.problems(config, "train", size - held_out, 2)
    assert ids(again) != ids(train) and set(ids(again)) == set(ids(train))
    assert task.problems(config, "train", 3, 1) == train[:3]
    other = settings(folder)
    other.split_seed = 1
    assert set(ids(task.problems(other, "train", size - held_out, 1))) != set(ids(train))
    test = task.problems(config, "test", 3, 0)
    assert not set(ids(test)) & set(ids(everything))
    with pytest.raises(ValueError, match=f"there are {size - held_out} train problems, not the {size} asked for"):
        task.problems(config, "train", size, 0)


@needs_real_data
def test_the_papers_sizes_on_the_real_files():
    config, validation = settings(REAL), settings(REAL)
    validation.evaluate_on = "validation"
    train, held_out = gsm8k.problems(config, "train", 6726, 0), gsm8k.problems(validation, "test", 747, 0)
    assert not set(ids(train)) & set(ids(held_out)) and len(gsm8k.problems(config, "test", 1319, 0)) == 1319
    for split, count, chosen in (("train", 6727, config), ("test", 748, validation), ("test", 1320, config)):
        with pytest.raises(ValueError, match=f"not the {count} asked for"):
            gsm8k.problems(chosen, split, count, 0)
    assert len(math.problems(config, "test", 500, 0)) == 500 and len(aime.problems(config, "test", 30, 0)) == 30


def test_the_paper_s_sizes_of_math(tmp_path):
    """Its 7,500 training problems are not at hand; the split is by their number."""
    small_data.write_math(tmp_path, train=7500)
    config = settings(tmp_path)
    assert len(math.problems(config, "train", 6750, 0)) == 6750
    config.evaluate_on = "validation"
    assert len(math.problems(config, "test", 750, 0)) == 750
    with pytest.raises(ValueError, match="there are 750 validation problems, not the 751"):
        math.problems(config, "test", 751, 0)


def test_two_writers_of_an_article_are_in_one_split(tmp_path):
    """A question to learn from would give away the text of one that is held out."""
    folder = small_data.write_quality(tmp_path)
    train = quality.problems(settings(folder), "train", 72, 0)
    texts = {problem.prompt.split("\n")[2] for problem in train}
    assert len(texts) == 18  # of 20 articles


def test_a_problem_that_is_there_twice_has_two_ids(tmp_path):
    row = small_data.gsm8k_row(1, 2)
    small_data.write_lines(tmp_path / "gsm8k" / "test.jsonl", [row, small_data.gsm8k_row(5, 6), row])
    first, _, second = finite.read(gsm8k.TEST, str(tmp_path))
    assert second.problem_id == first.problem_id + "-2" and second.prompt == first.prompt


def test_a_repeated_problem_is_in_the_split_of_the_first(tmp_path):
    """The splits have the sizes that they would have without repeats, and repeats of a problem stay together."""
    rows = [small_data.gsm8k_row(n, n + 1) for n in range(60)]
    small_data.write_lines(tmp_path / "gsm8k" / "train.jsonl", rows + rows[:30] + rows[:10])
    for seed in range(5):
        config = settings(tmp_path)
        config.split_seed = seed
        train = gsm8k.problems(config, "train", 90, 0)
        config.evaluate_on = "validation"
        validation = gsm8k.problems(config, "test", 10, 0)
        assert len({*ids(train), *ids(validation)}) == 100
        assert not {p.prompt for p in train} & {p.prompt for p in validation}


def test_the_split_of_problems_without_repeats(tmp_path):
    """A tenth of the ids, shuffled by the seed; an id that ends in -2 in the file is no repeat."""
    rows = [{"problem": f"Find {n}.", "answer": str(n), "unique_id": f"{n // 2}-{n % 2 + 1}"} for n in range(40)]
    small_data.write_lines(tmp_path / "math" / "train.jsonl", rows)
    names = sorted(row["unique_id"] for row in rows)
    random.Random("validation/0").shuffle(names)
    config = settings(tmp_path)
    config.evaluate_on = "validation"
    assert set(ids(math.problems(config, "test", 4, 0))) == set(names[:4])
    assert set(ids(math.problems(config, "train", 36, 0))) == set(names[4:])


def test_the_folder_may_be_named_by_the_environment(tmp_path, monkeypatch):
    named, given = small_data.write_gsm8k(tmp_path / "named"), small_data.write_gsm8k(tmp_path / "given", test=3)
    monkeypatch.setenv("QSHARP_DATA", str(named))
    assert len(gsm8k.problems(settings(""), "test", 12, 0)) == 12
    assert len(gsm8k.problems(settings(given), "test", 3, 0)) == 3
    with pytest.raises(ValueError, match="there are 3 test problems"):
        gsm8k.problems(settings(given), "test", 4, 0)


def test_rows_of_the_hub_are_those_of_the_file(tmp_path, monkeypatch):
    """Its configurations follow each other; an address is that of a file of JSON lines."""
    for folder in (small_data.write_math(tmp_path), small_data.write_quality(tmp_path)):
        expected = {task: task.every_problem(str(folder)) for task in TASKS.values() if task in (math, quality)}
    asked = []

    def load_dataset(name, part=None, *, split=None, data_files=None):
        asked.append((name, part, split, data_files))
        files = {"EleutherAI/hendrycks_math": "math/train.jsonl", "HuggingFaceH4/MATH-500": "math500/test.jsonl"}
        path = tmp_path / files[name] if name in files else tmp_path / "quality" / data_files.rpartition("/")[2]
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return rows if part is None else rows[math.SUBJECTS.index(part) :: 7]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for task, problems in expected.items():
        assert sorted(task.every_problem("hub"), key=str) == sorted(problems, key=str)
    assert [part for name, part, *_ in asked if "hendrycks" in name] == list(math.SUBJECTS)
    assert {split for _, _, split, _ in asked} == {"train", "test"}


def test_a_hub_that_cannot_be_reached_says_which_file_would_do(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("QSHARP_DATA", raising=False)
    message = sentence(gsm8k.problems, settings(""), "test", 1, 0)
    assert "cannot load openai/gsm8k (Couldn't reach 'openai/gsm8k' on the Hub)" in message
    assert "DIR/gsm8k/test.jsonl" in message and "--config.task.data=DIR" in message and "QSHARP_DATA=DIR" in message


def read_lines(tmp_path, *lines: str):
    path = tmp_path / "gsm8k" / "test.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(lines))
    return sentence(gsm8k.problems, settings(tmp_path), "test", 1, 0), path


GOOD = json.dumps(small_data.gsm8k_row(1, 2))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([GOOD, "", GOOD[:-5]], ", line 3, is not a JSON object"),
        ([GOOD, "[1, 2]"], ", line 2, is not a JSON object"),
        ([GOOD, '{"question": "How many?"}'], ", line 2: there is no field 'answer', but question"),
        (["{}"], ", line 1: there is no field 'question', but none at all"),
        (['{"question": 5, "answer": "#### 5"}'], ", line 1: the field 'question' is 5; it must be a text"),
        (['{"question": " ", "answer": "#### 5"}'], ", line 1: the field 'question' is ' '; it must be a text"),
        ([" ", ""], " has no problems"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, expected):
    message, path = read_lines(tmp_path, *lines)
    assert str(path) + expected in message


def test_a_gold_answer_that_is_none_is_refused_with_its_problem(tmp_path):
    row = small_data.gsm8k_row(1, 2) | {"answer": "It is three.\n#### three"}
    message, path = read_lines(tmp_path, GOOD, json.dumps(row))
    (problem,) = gsm8k.to_problems(finite.Row("", json.loads(GOOD)))
    assert f"{path}, line 2, problem {problem.problem_id}: " in message and "three' does not end in a number" in message


def test_a_file_that_is_not_there_is_named(tmp_path):
    message = sentence(math.problems, settings(tmp_path), "train", 1, 0)
    assert f"there is no file {tmp_path / 'math' / 'train.jsonl'}" in message
    assert "EleutherAI/hendrycks_math" in message and "--config.task.data=hub" in message
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "train.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in sentence(math.problems, settings(tmp_path), "train", 1, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(evaluate_on="dev"), "evaluate_on is 'dev'; it must be test or validation"),
        (dict(split_seed=0.5), "split_seed is 0.5; it must be an integer"),
        (dict(data=None), "data is None; it must be a folder, hub, or empty"),
    ],
)
def test_a_setting_out_of_range_is_an_error(tmp_path, change, words):
    config = settings(tmp_path)
    vars(config).update(change)
    with pytest.raises(ValueError, match=words):
        gsm8k.check(config)
    with pytest.raises(ValueError, match="split is 'dev'; it must be one of train, test"):
        gsm8k.problems(settings(tmp_path), "dev", 1, 0)
