"""Reward functions of TRL's signature: what they are given, what they return, and what becomes of those that fail."""

import asyncio
import re
import time

import pytest

from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.rewards import FEWEST, RewardJudge, parse_function

PROGRAM = """
import os
import time

def short(prompts, completions, **kwargs):
    return [float(len(completion) < 6) for completion in completions]

def names(completions, topic):  # no **kwargs: it gets the columns that it names
    return [float(t in c) for t, c in zip(topic, completions)]

def ended(prompts, completions, finished, **kwargs):
    return [float(f) for f in finished]

def of_chat(prompts, completions, **kwargs):
    return [float(p[-1]["content"] == c[0]["content"]) for p, c in zip(prompts, completions)]

def ids(completion_ids):
    return [float(sum(ids)) for ids in completion_ids]

async def logging(completions, completion_ids, log_extra, log_metric, **kwargs):  # as TRL allows
    log_extra("words", [len(c.split()) for c in completions])
    log_metric("tokens", float(len(completion_ids[0])))
    return [0.25 for _ in completions]

def sometimes(completions, **kwargs):
    return [None if c == "skip" else 1.0 for c in completions]

def odd(completions, **kwargs):
    return {"raise": lambda: 1 / 0, "nan": lambda: [float("nan")], "two": lambda: [1.0, 2.0], "text": lambda: "x",
            "hang": lambda: time.sleep(60), "exit": lambda: os._exit(1), "good": lambda: [1.0],
            "fork": lambda: [os.fork(), time.sleep(60)],
            "none": lambda: [None], "print": lambda: print("hello") or [0.5]}[completions[0]]()
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(PROGRAM)
    return path


def judge_of(program, *names, workers=1, weights=None, seconds=30.0, most_failures=1.0):
    functions = [parse_function(f"{program}:{name}") for name in names]
    weights = weights or [1.0] * len(names)
    return RewardJudge(functions, weights, workers=workers, seconds=seconds, most_failures=most_failures)


def problem(prompt="Say it.", **columns):
    return Problem("0" * 16, prompt, "", columns)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_function_gets_lists_of_one_and_columns_by_name(program, workers):
    judge = judge_of(program, "short", "names", weights=[2.0, -0.5], workers=workers)
    problems = [problem(topic="tea"), problem(topic="rain")]
    assert [j.reward for j in judge(problems, ["tea", "a long one, on rain"])] == [2.0 - 0.5, -0.5]
    judge.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_messages_and_whether_a_response_finished(program, workers):
    chat = problem([{"role": "system", "content": "Echo."}, {"role": "user", "content": "hi"}])
    judge = judge_of(program, "of_chat", "ended", workers=workers)
    assert judge.submit(chat, "hi", finished=False)().reward == 1.0
    assert judge.submit(chat, "no", finished=True)().reward == 1.0
    assert judge.submit(chat, "no", finished=False)().reward == 0.0
    judge.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_else_trl_passes_by_name(program, workers):
    judge = judge_of(program, "ids", "logging", workers=workers)
    assert judge.submit(problem(), "abc", tokens=[3, 1, 4])().reward == 8.25
    judge.close()


def test_a_function_that_returns_none_does_not_apply(program):
    judge = judge_of(program, "sometimes", "short")
    assert [j.reward for j in judge([problem()] * 2, ["skip", "abc"])] == [1.0, 2.0]
    judge.close()


def test_one_that_forks_and_hangs_is_not_waited_for(program):
    """The forks hold the worker's pipe open; they end with it."""
    judge, begin = judge_of(program, "odd", seconds=0.5), time.monotonic()
    assert [j.reward for j in judge([problem()] * 2, ["fork", "good"])] == [None, 1.0]
    assert time.monotonic() - begin < 40
    judge.close()


def test_an_asynchronous_function_is_called_where_a_loop_runs_as_in_a_notebook(program):
    judge = judge_of(program, "logging", workers=0)

    async def cell():
        return judge([problem()], ["abc"])

    assert [j.reward for j in asyncio.run(cell())] == [0.25]


@pytest.mark.parametrize(
    ("response", "words"),
    [
        ("raise", "ZeroDivisionError: division by zero, .*rewards.py, line"),
        ("nan", "it returned nan"),
        ("two", "it returned 2 rewards for 1 response"),
        ("text", "it returned a str, not a list of one reward|could not convert"),
        ("none", "it returned None"),
        ("exit", "took more than 2 s, or ended its process"),
        ("hang", "took more than 2 s, or ended its process"),
    ],
)
def test_one_that_fails_gives_no_reward_and_names_the_prompt(program, capsys, response, words):
    judge = judge_of(program, "odd", seconds=2.0)
    judgements = judge([problem("Say this."), problem("Say that.")], [response, "good"])
    assert [j.reward for j in judgements] == [None, 1.0], "the next response is judged by a worker that is replaced"
    error = capsys.readouterr().err
    assert re.search(rf"no reward for a response to the prompt 'Say this\.' \(odd: .*({words})", error), error
    judge.close()


def test_what_a_function_prints_is_no_reply(program):
    judge = judge_of(program, "odd")
    assert judge([problem()], ["print"])[0].reward == 0.5
    judge.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_failures_stop_the_run(program, workers):
    judge = judge_of(program, "odd", workers=workers, most_failures=0.5)
    assert all(j.reward is None for j in judge([problem()] * (FEWEST - 1), ["nan"] * (FEWEST - 1)))
    with pytest.raises(UserError, match=f"{FEWEST} of {FEWEST} responses have no reward.*odd: it returned nan"):
        judge([problem()], ["nan"])
    judge.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("short", "the reward is 'short'; write it as FILE.py:NAME"),
        ("rewards.py:", "the reward is 'rewards.py:'"),
    ],
)
def test_a_function_that_is_written_wrong_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_function(words)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (PROGRAM, "shrot", "has no function 'shrot'; it has short, names, ended"),
        ("def f(:", "f", "SyntaxError"),
        ("import no_such_package", "f", "ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_refused_at_once(tmp_path, workers, text, name, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=f"cannot load the reward function {name} .*{message}"):
        judge_of(tmp_path / "mine.py", name, workers=workers).check()


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="there is no file nowhere.py; give the reward function's Python file"):
        judge_of("nowhere.py", "short")


def test_a_module_s_function(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text("def half(completions):\n    return [0.5 for _ in completions]\n")
    monkeypatch.chdir(tmp_path)
    judge = RewardJudge([("own_rewards", "half")], [1.0], workers=1, seconds=30.0, most_failures=0.0)
    assert judge([problem()], ["x"])[0].reward == 0.5
    judge.close()
