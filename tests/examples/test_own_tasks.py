"""The examples' tasks: rewards of answers judged by hand, splits that share nothing, and the recipe's settings."""

import runpy

import pytest
from repository import ROOT

from qsharp_jax.run import checks
from qsharp_jax.run import config as configs


def program(name: str) -> dict:
    return runpy.run_path(str(ROOT / "examples" / name / "task.py"))


@pytest.mark.parametrize(
    ("constraint", "kept", "broken"),
    [
        ("Answer in exactly two sentences.", "Owls hunt at night. They see well!", "Owls hunt at 9.30 p.m. or so"),
        ("Use at most 15 words.", "Coins are small and round.", " ".join(["coin"] * 16)),
        ("Do not use any commas.", "Salt is white.", "Salt, like sugar, is white."),
        ("End your answer with a question.", "It is a bridge. Would you cross it? ", "Would you? I would."),
        ("Start your answer with the word Once.", " Once there was a fox.", "There was once a fox."),
    ],
)
def test_a_constraint(constraint, kept, broken):
    reward = program("constraints")["reward"]
    completions, names = [kept, broken, kept], [constraint] * 3
    assert reward([""] * 3, completions, names, finished=[True, True, False]) == [1, 0, 0]


def test_the_constraints_in_the_evaluation_harness_are_those_of_the_task():
    """The functions that lm_eval.yaml names."""
    harness = runpy.run_path(str(ROOT / "examples" / "constraints" / "lm_eval_functions.py"))
    (split,) = harness["dataset"]().items()
    assert split[0] == "test" and split[1].to_list() == program("constraints")["problems"]("test")
    doc = {"prompt": "", "constraint": "Do not use any commas."}
    assert [harness["score"](doc, [text]) for text in ("Salt is white.", "Salt, it is.")] == [{"kept": 1}, {"kept": 0}]


@pytest.mark.parametrize("name", ["constraints", "sentiment"])
def test_the_splits_share_no_prompt(name):
    if name == "sentiment":
        pytest.importorskip("vaderSentiment", reason="sentiment's reward needs vaderSentiment")
    problems = program(name)["problems"]
    train, test = ({problem["prompt"] for problem in problems(split)} for split in ("train", "test"))
    assert train and test and not train & test


def test_sentiment():
    pytest.importorskip("vaderSentiment", reason="sentiment's reward needs vaderSentiment")
    task, prompts = program("sentiment"), ["I thought the zoo was"] * 2
    good, bad = task["reward"](prompts, [" wonderful, and we loved it.", " a horrible, sad place."])
    assert -1 <= bad < -0.3 and 0.3 < good <= 1
    assert task["positive"](prompts, [" wonderful, and we loved it.", " a horrible, sad place."]) == [1, 0]


def test_more_things_are_for_training_alone(monkeypatch):
    pytest.importorskip("vaderSentiment", reason="sentiment's reward needs vaderSentiment")
    monkeypatch.syspath_prepend(ROOT / "examples" / "sentiment")
    more, task = runpy.run_path(str(ROOT / "examples" / "sentiment" / "more_things.py")), program("sentiment")
    prompts = [problem["prompt"] for problem in more["problems"]("train")]
    assert len(prompts) == len(set(prompts)) == 960 and more["problems"]("test") == task["problems"]("test")
    assert not {*prompts} & {problem["prompt"] for problem in task["problems"]("test")}


@pytest.mark.parametrize("name", ["constraints", "sentiment"])
def test_the_recipes_take_all_prompts(name):
    if name == "sentiment":
        pytest.importorskip("vaderSentiment", reason="sentiment's reward needs vaderSentiment")
    config = configs.load(ROOT / "examples" / name / "config.py", [])
    checks.check_settings(config)
    problems = program(name)["problems"]
    assert (config.collect.prompts, config.evaluate.problems) == (len(problems("train")), len(problems("test")))
