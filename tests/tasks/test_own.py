"""A task from outside the package: prompts in files, split by their hashes, and Python files that give both."""

import datetime
import json

import pyarrow
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict

from qsharp_jax.configs import own as recipe
from qsharp_jax.system.chat import as_text
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import base, own, registry

ROWS = [{"prompt": f"Tell me about number {i}.", "number": i} for i in range(60)]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def config(**changes) -> ConfigDict:
    return ConfigDict({**recipe.get_config().task.to_dict(), **changes})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def both(task):
    return [own.problems(task, split, 1000, seed=0) for split in base.SPLITS]


def test_a_fifth_of_the_prompts_is_held_out_whatever_the_rest_of_the_file(tmp_path):
    train, test = both(config(prompts=write(tmp_path / "a.jsonl", ROWS)))
    assert {p.prompt for p in train} | {p.prompt for p in test} == {row["prompt"] for row in ROWS}
    assert not {p.problem_id for p in train} & {p.problem_id for p in test} and 5 <= len(test) <= 20
    assert all(p.columns == {"number": int(p.prompt.split()[-1][:-1])} and p.answer == "" for p in train)
    _, fewer = both(config(prompts=write(tmp_path / "b.jsonl", ROWS[::2])))
    assert {p.prompt for p in fewer} == {p.prompt for p in test} & {row["prompt"] for row in ROWS[::2]}


def test_repeated_prompts_stay_in_one_split_with_ids_of_their_own(tmp_path):
    train, test = both(config(prompts=write(tmp_path / "a.jsonl", ROWS + [row | {"number": -1} for row in ROWS])))
    assert len({p.problem_id for p in train + test}) == 2 * len(ROWS)
    assert not {p.prompt for p in train} & {p.prompt for p in test}


def test_parquet_and_messages(tmp_path):
    rows = [*ROWS[:20], {"prompt": "x", "number": 3}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    same = both(config(prompts=write(tmp_path / "a.jsonl", rows)))
    assert both(config(prompts=str(tmp_path / "a.parquet"))) == same
    (chat,) = (p for part in both(config(prompts=write(tmp_path / "c.jsonl", [{"prompt": CHAT}, *ROWS]))) for p in part
               if not isinstance(p.prompt, str))  # fmt: skip
    assert chat.prompt == CHAT and as_text(chat.prompt) == "system: Be brief.\nuser: Hello"


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "[1, NaN]"])
def test_a_number_that_json_does_not_have_is_refused_before_it_is_in_a_record(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a"}}\n{{"prompt": "b", "score": {text}}}\n')
    with pytest.raises(UserError, match=r"a.jsonl, line 2: the column 'score' holds (nan|-inf|a list); write it as"):
        both(config(prompts=str(tmp_path / "a.jsonl")))
    program = tmp_path / "task.py"
    program.write_text(f"import json\ndef problems(split):\n    return [{{'prompt': 'a', 's': json.loads('{text}')}}]\n")
    with pytest.raises(UserError, match="cannot read the problems of .*not JSON compliant"):
        both(config(file=str(program)))


@pytest.mark.parametrize("value", [datetime.datetime(2024, 1, 2), b"ab", [b"ab"]])
def test_a_column_that_records_cannot_hold_is_named(tmp_path, value):
    rows = [row | {"when": value} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    words = f"a.parquet, row 1: the column 'when' holds a {type(value).__name__}; write it as"
    with pytest.raises(UserError, match=words):
        both(config(prompts=str(tmp_path / "a.parquet")))


def test_a_python_file_gives_prompts_and_reward(tmp_path):
    program = tmp_path / "task.py"
    program.write_text(
        "def problems(split):\n"
        "    return [{'prompt': f'{split} {i}', 'want': i} for i in range(4)]\n"
        "def reward(completions, want):\n"
        "    return [float(c == str(w)) for c, w in zip(completions, want)]\n"
    )
    task = config(file=str(program), rewards=(), weights=())
    own.check(task)
    train, test = both(task)
    assert {p.prompt for p in test} == {f"test {i}" for i in range(4)} and len(train) == 4
    judge = own.judge(task)
    assert judge(test, [str(p.columns["want"]) for p in test])[0].reward == 1.0
    judge.close()
    assert own.files(task) == [program]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no file .*a.jsonl"),
        ("", "a.jsonl has no prompts; write rows with a column prompt"),
        ('{"prompt": "b"}\n' * 30, "of the 30 prompts of .*a.jsonl none is left to train on: one in five different"),
        ('{"prompt": "x", "finished": 1}\n', "line 1: rewards have an argument 'finished' of their own; rename that"),
        ("{\n", "a.jsonl, line 1, is not a JSON object"),
        ('{"question": "x"}\n', "line 1: there is no field 'prompt', but question"),
        ('{"prompt": " "}\n', "line 1: the field 'prompt' is ' '; it must be a text"),
        ('{"prompt": [{"role": "user"}]}\n', "the prompt has a message .* it must have a role and a content"),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}\n', "the prompt's last message must be the user's"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(tmp_path, content, words):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises((UserError, ValueError), match=words):
        own.problems(config(prompts=str(path)), "train", 10, seed=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "has no function 'problems'"),
        ("def problems(split):\n    return [1]", r"\(TypeError: problems\('train'\) gave a int, not a dict\)"),
        ("def problems(split):\n    return open('/none')", "FileNotFoundError.*task.py, line 2"),
        ("def problems(split):\n    return [{'prompt': 'x', 'y': {1, 2}}]", "not JSON serializable"),
    ],
)
def test_a_python_file_that_fails_is_refused(tmp_path, text, words):
    (tmp_path / "task.py").write_text(text)
    with pytest.raises(UserError, match=f"cannot read the problems of .*{words}"):
        own.problems(config(file=str(tmp_path / "task.py")), "train", 10, seed=0)


def test_a_python_file_without_problems_is_refused(tmp_path):
    (tmp_path / "task.py").write_text("def problems(split):\n    return []")
    with pytest.raises(UserError, match=r"problems\('test'\) of .*task.py gives no prompts; return some"):
        own.problems(config(file=str(tmp_path / "task.py")), "test", 10, seed=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "give the prompts, by --prompts FILE"),
        ({"prompts": "a", "file": "b"}, "give the prompts, by --prompts FILE"),
        ({"prompts": "a", "rewards": ()}, "there is no reward; give one by --reward"),
        ({"prompts": "a", "rewards": ("m:f", "m:g"), "weights": (1.0,)}, r"task.weights is \[1.0\]; give one"),
        ({"prompts": "a", "rewards": ("m:f",), "reward_seconds": 0}, "config.task.reward_seconds is 0"),
        ({"prompts": "a", "rewards": ("m:f",), "most_failures": 2}, "config.task.most_failures is 2"),
    ],
)
def test_settings_are_refused(changes, words):
    with pytest.raises((UserError, ValueError), match=words):
        own.check(config(**changes))


def test_paths_of_files_are_made_absolute_and_other_names_left_alone(tmp_path, monkeypatch):
    """A workdir's commands may be typed in another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("rewards.py", "a.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "owner" / "prompts").mkdir(parents=True)
    task = config(prompts="./a.jsonl", rewards=("rewards.py:f", "~/rewards.py:g", "package.rewards:f", "<python>:f"))
    registry.make_absolute(task)
    assert task.prompts == f"{tmp_path}/a.jsonl" and task.file == ""
    assert task.rewards == (f"{tmp_path}/rewards.py:f", f"{tmp_path}/rewards.py:g", "package.rewards:f", "<python>:f")
    task = config(file="rewards.py", prompts="owner/prompts", rewards=["gone.py:f"])
    registry.make_absolute(task)
    assert (task.file, task.prompts, list(task.rewards)) == (f"{tmp_path}/rewards.py", "owner/prompts", ["gone.py:f"])
    monkeypatch.chdir("/")
    assert own.files(task) == [tmp_path / "rewards.py"]


def test_how_many_prompts_there_are(tmp_path):
    task = config(prompts=write(tmp_path / "a.jsonl", ROWS))
    assert [own.available(task, split) for split in base.SPLITS] == list(map(len, both(task)))
