"""One file of reward functions, unchanged, under `qsharp run` and under TRL's GRPOTrainer."""

import dataclasses
import os
import re
import subprocess

import bpe
import hf_folders
import pytest
from commands import results
from repository import ROOT

from qsharp_jax import cli
from qsharp_jax.data.records import read_rounds
from qsharp_jax.models import hf
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.rewards import RewardJudge

EXAMPLE = ROOT / "examples" / "trl_reward"
NAMES = ("brief", "on_topic")
SMALL = [
    f"--config.{change}"
    for change in (
        "rounds=1", "collect.prompts=20", "collect.samples=2", "collect.batch_size=16", "evaluate.batch_size=16",
        "evaluate.problems=6", "evaluate.samples=2", "evaluate.etas=0.1,", "generate.max_new_tokens=16",
        "fit.epochs=1", "fit.batch_size=16", "fit.accumulate=1", "fit.evaluate_every=4",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shape = dataclasses.replace(hf_folders.LLAMA, vocab_size=300, max_positions=256)
    hf.export_ref(hf_folders.ref(shape), folder, tokenizer=bpe.make())
    return folder


def test_the_functions_are_called_as_trl_calls_them():
    functions = [(str(EXAMPLE / "rewards.py"), name) for name in NAMES]
    judge = RewardJudge(functions, [1.0, 1.0], workers=0, seconds=30.0, most_failures=0.0)
    problem = Problem("0" * 16, "What do you know about art?", "", {"topic": "art"})
    assert judge.submit(problem, "art is long", tokens=[1] * 64)().reward == 1.0
    assert judge.submit(problem, "no", tokens=[1])().reward == 1.0


@pytest.mark.slow
def test_a_guide_is_trained_on_them(model, tmp_path):
    functions = [word for name in NAMES for word in ("--reward", f"{EXAMPLE / 'rewards.py'}:{name}")]
    arguments = ["--ref", str(model), "--prompts", str(EXAMPLE / "prompts.jsonl"), *functions]
    assert cli.main(["run", *arguments, "--workdir", str(tmp_path), *SMALL]) == 0
    for rollout in read_rounds(tmp_path / "rollouts", [1]):
        assert rollout.reward == pytest.approx(1 - (len(rollout.response_tokens) - 1) / 63)
    assert {row["method"] for row in results(tmp_path)} >= {"pi_ref", "qsharp"}


@pytest.mark.slow
@pytest.mark.skipif("QSHARP_TRL_PYTHON" not in os.environ, reason="needs a Python with trl, by QSHARP_TRL_PYTHON")
def test_a_policy_is_trained_on_them_by_trl(model, tmp_path):
    command = [os.environ["QSHARP_TRL_PYTHON"], str(EXAMPLE / "grpo.py"), str(model)]
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"\{'rewards/brief/mean': ([\d.]+), .*'on_topic': [\d.]+", done.stdout)
    assert len(steps) == 3 and all(0 < float(mean) <= 1 for mean in steps), done.stdout
