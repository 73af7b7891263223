"""Reward functions of TRL's signature: what they are given, what they return, and what becomes of those that fail."""

import asyncio
import functools
import hashlib
import inspect
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from repository import PYTHONPATH

from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import reward_worker
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.rewards import FEWEST, RewardJudge, parse_function, source_hash

PROGRAM = """
import asyncio
import os
import subprocess
import sys
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

CLIENT = {}

async def client(completions):  # as a client's connections, it belongs to the loop of its first call
    loop = CLIENT.setdefault("loop", asyncio.get_running_loop())
    reply = loop.create_future()
    loop.call_soon(reply.set_result, 1.0)
    return [await reply]

async def leaves(completions):
    sys.exit(3)

def reads(completions):
    read = subprocess.run(["cat"], capture_output=True).stdout
    try:
        input()
    except EOFError:
        return [0.5 + len(read)]

def sometimes(completions, **kwargs):
    return [None if c == "skip" else 1.0 for c in completions]

def odd(completions, **kwargs):
    return {"raise": lambda: 1 / 0, "nan": lambda: [float("nan")], "two": lambda: [1.0, 2.0], "text": lambda: "x",
            "hang": lambda: time.sleep(60), "exit": lambda: os._exit(1), "good": lambda: [1.0],
            "fork": lambda: [os.fork(), time.sleep(60)],
            "none": lambda: [None], "dict": lambda: {"reward": 1.0}, "print": lambda: print("hello") or [0.5]}[completions[0]]()
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


@pytest.mark.parametrize("workers", [0, 1])
def test_asynchronous_functions_are_called_in_one_loop_as_a_client_needs_it(program, workers):
    judge = judge_of(program, "client", "logging", workers=workers)
    assert [j.reward for j in judge([problem()] * 3, ["abc"] * 3)] == [1.25] * 3

    async def cell():
        return judge([problem()] * 2, ["abc"] * 2)

    assert [j.reward for j in asyncio.run(cell())] == [1.25] * 2
    judge.close()


def test_an_asynchronous_function_that_exits_leaves_the_loop_to_others(program):
    function = reward_worker.load(str(program), "leaves")
    for _ in range(2):
        with pytest.raises(SystemExit):
            reward_worker.call(function, {"completions": ["abc"]})
    judge = judge_of(program, "logging", workers=0)
    assert judge([problem()], ["abc"])[0].reward == 0.25


def test_a_function_that_reads_input_gets_none_and_no_requests(program):
    judge = judge_of(program, "reads", seconds=20.0)
    assert [j.reward for j in judge([problem()] * 3, ["abc"] * 3)] == [0.5] * 3
    judge.close()


def test_an_error_of_this_package_is_not_placed_in_the_package(program, capsys):
    judge = judge_of(program, "odd", workers=0)
    assert judge([problem()] * 2, ["dict", "raise"])[0].reward is None
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("(odd: TypeError: it returned a dict, not a list of one reward)")
    assert re.search(rf"\(odd: ZeroDivisionError: division by zero, {program}, line \d+\)$", second)


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


def most_words(completions, most=0):
    return [float(len(completions[0].split()) <= most)]


def no_commas(completions, most=0):
    return ["," not in completions[0]]


class Most:
    def __init__(self, most, words=()):
        self.most, self.words, self.client = most, words, object()

    def __call__(self, completions):
        return [1.0]

    def score(self, completions):
        return [2.0]


class Other(Most):
    pass


def test_the_hash_of_a_reward_is_that_of_all_it_is_made_of():
    assert source_hash(most_words) == hashlib.sha256(inspect.getsource(most_words).encode()).hexdigest()
    rewards = [
        most_words, no_commas, functools.partial(most_words), functools.partial(most_words, most=40), functools.partial(most_words, most=50),
        functools.partial(most_words, None, most=40), functools.partial(no_commas, most=40), functools.partial(Most(40), most=40), Most(40), Most(50), Other(40),
        Most(40).score, Most(50).score, Most(40, no_commas), Most(40, most_words), Most(40, functools.partial(most_words, most=40)),
    ]  # fmt: skip
    assert len({source_hash(reward) for reward in rewards}) == len(rewards)
    for _ in range(2):  # objects anew, at other addresses
        assert source_hash(Most(40)) == source_hash(Most(40)) and source_hash(Most(40).score) == source_hash(Most(40).score)
    partials = [functools.partial(most_words, **order) for order in (dict(most=4, a=1), dict(a=1, most=4))]
    assert source_hash(partials[0]) == source_hash(partials[1])
    assert source_hash(len) is None and source_hash(functools.partial(len)) is None


def test_a_reward_that_holds_itself_and_one_that_holds_a_large_array_are_hashed():
    class Own:
        def __init__(self, words):
            self.words, self.scorers = words, {"own": self.score}
            self.scorers["all"] = self.scorers

        def score(self, prompts, completions):
            return [1.0]

    words = np.zeros(5000)
    others = words.copy()
    others[2500] = 1
    assert source_hash(Own(words)) == source_hash(Own(words.copy())) is not None
    assert len({source_hash(Own(words)), source_hash(Own(others)), source_hash(Own(words).score)}) == 3


def test_the_hash_of_a_reward_is_the_same_in_every_process(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import functools\n"
        "from qsharp_jax.tasks.rewards import source_hash\n"
        "def f(completions, words, at): return [1.0]\n"
        "print(source_hash(functools.partial(f, words={w * 3 for w in 'abcdefgh'}, at=(object(), f))))\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONPATH": PYTHONPATH, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(printed) == 1 and len(printed.pop()) == 65
