"""`qsharp run` with a model, prompts and a reward of the user's own: what it takes, prints, keeps and refuses."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import bpe
import hf_folders
import numpy as np
import pytest
from commands import refused, results, stdout_lines
from repository import ROOT

from qsharp_jax import cli
from qsharp_jax.data.records import read_rounds
from qsharp_jax.models import hf
from qsharp_jax.run import checks, own
from qsharp_jax.run.own import OwnRun
from qsharp_jax.tasks import base

PROGRAM = """
def short(prompts, completions, topic, **kwargs):
    if "x7" in topic:
        raise ValueError("not this one")
    return [-len(completion) / 10 for completion in completions]

def failing(prompts, completions, **kwargs):
    raise RuntimeError("no model")
"""
SMALL = [
    f"--config.{change}"
    for change in (
        "rounds=1", "collect.prompts=60", "collect.samples=2", "collect.batch_size=16", "collect.shard_rows=60",
        "evaluate.batch_size=16", "evaluate.problems=6", "evaluate.samples=2", "evaluate.etas=0.1,",
        "generate.max_new_tokens=6", "generate.stop=e,o", "generate.prompt_bucket=16", "fit.epochs=1", "fit.batch_size=16", "fit.accumulate=1",
        "fit.evaluate_every=4",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a reference with a chat template, prompts and rewards."""
    root = tmp_path_factory.mktemp("own")
    shape = dataclasses.replace(hf_folders.LLAMA, vocab_size=300, max_positions=128)
    hf.export_ref(hf_folders.ref(shape), root / "ref", tokenizer=bpe.make())
    rows = [{"prompt": f"How many eggs has Sam {i}?", "topic": f"x{i}"} for i in range(70)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "rewards.py").write_text(PROGRAM)
    return root


def command(folder, workdir, *changes, reward="short"):
    named = {
        "--ref": folder / "ref",
        "--prompts": folder / "prompts.jsonl",
        "--reward": f"{folder / 'rewards.py'}:{reward}",
    }
    arguments = [str(word) for pair in named.items() for word in pair]
    return ["run", *arguments, "--workdir", str(workdir), *SMALL, *changes]


@pytest.fixture(scope="module")
def finished(folder):
    workdir = folder / "workdir"
    assert cli.main(command(folder, workdir)) == 0
    return workdir


def test_a_run_learns_from_the_reward_and_reports_no_answers(finished):
    assert {("pi_ref", 0), ("qsharp", 1), ("cd", 1)} <= {(row["method"], row["round"]) for row in results(finished)}
    report = (finished / "report.md").read_text()
    assert "| method" in report and "pass_k is the best reward of k samples of pi_ref, best_of_k" in report
    ours = report.partition("## Examples")[0]
    assert not any(word in ours for word in ("answer", "maj1@", "majority"))
    assert "## Forecast and decoding" in report and "| best_of_4 " not in report, "two samples per prompt"
    forecast = json.loads((finished / "samples" / "forecast_round_1.json").read_text())
    assert [(row["method"], row.get("power"), row["eta"]) for row in forecast] == [
        ("qsharp", None, 0.1),
        *(("qsharp_power", power, 0.1) for power in (2, 3, 4)),
        ("cd", None, 0.1),
    ]
    page = (finished / "examples.html").read_text()
    assert "the answer is" not in page and "no answer" not in page
    stored = json.loads((finished / "value.json").read_text())
    assert stored["distribution"] == "categorical" and 2 <= len(stored["atoms"]) <= 21
    config = json.loads((finished / "config.json").read_text())
    assert config["prompt_format"] == "chat" and config["task"]["name"] == "own"
    assert all(len(entry["sha256"]) == 64 for entry in config["hashes"]["task"].values())


def test_fit_alone_forecasts_as_the_run_did(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    forecast = workdir / "samples" / "forecast_round_1.json"
    expected = json.loads(forecast.read_text())
    forecast.unlink()
    shutil.rmtree(workdir / "guide")
    capsys.readouterr()
    assert cli.main(["fit", "--workdir", str(workdir)]) == 0
    of_tilt = expected[0]
    words = f"qsharp {of_tilt['reward']:.3f} at {of_tilt['kl']:.2f} nats"
    said = capsys.readouterr().out
    assert f"forecast by {of_tilt['n']} held-out rollouts of pi_ref" in said and words in said
    assert json.loads(forecast.read_text()) == expected


def test_a_reward_that_fails_is_kept_as_none(finished):
    rows = [json.loads(line) for path in (finished / "samples").glob("*.jsonl") for line in path.open()]
    judged = [row for row in rows if "columns" in row]
    assert judged and all((row["reward"] is None) == (row["columns"]["topic"] == "x7") for row in judged)
    collected = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    shares = [row["no_reward"] for row in collected if "no_reward" in row]
    assert all(0 < share < 0.1 for share in shares)


def test_rollouts_and_samples_end_before_stop_strings(finished):
    rollouts = read_rounds(finished / "rollouts", [1])
    samples = [json.loads(line) for path in finished.glob("samples/pi_ref.jsonl") for line in path.open()]
    for text, tokens, ended in [(r.text, r.response_tokens, r.finished) for r in rollouts] + [
        (row["response"], row["tokens"], row["finished"]) for row in samples
    ]:
        whole = bpe.make().decode(tokens, skip_special_tokens=True)
        assert not set(text) & set("eo") and whole.startswith(text)
        assert ended == (whole != text or tokens[-1] in (bpe.EOS, bpe.EOT))
    assert 0.2 < np.mean([rollout.finished for rollout in rollouts]) < 1 and samples


def test_the_same_command_resumes_and_others_find_the_task_again(folder, finished, capsys):
    before = (finished / "results.json").read_bytes()
    assert cli.main(command(folder, finished)) == 0
    assert "Settings for this model" not in capsys.readouterr().out, "the workdir keeps what was chosen"
    (finished / "results.json").unlink()
    assert cli.main(["evaluate", "--workdir", str(finished)]) == 0
    assert cli.main(["evaluate", "--workdir", str(finished), "--rejudge"]) == 0
    assert [row["reward"] for row in results(finished)] == [row["reward"] for row in json.loads(before)]


def test_a_finished_run_needs_its_workdir_alone(finished, capsys):
    before = results(finished)
    assert cli.main(["run", "--workdir", str(finished)]) == 0
    assert "| method" in capsys.readouterr().out and results(finished) == before
    assert own.load(OwnRun(), finished, ["--config.mesh=cuda_1"]).mesh.name == "cuda_1"
    assert "give the --config it was made with" in refused(capsys, "run", "--workdir", finished, "--config.seed=1")


@pytest.mark.slow
def test_a_policy_is_trained_from_a_reference_in_bfloat16(folder, tmp_path):
    """Accelerators have that dtype by default; the policy's own weights are float32."""
    small = (
        "fit.patience=0", "fit.evaluate_every=0", "collect.prompts=8", "collect.samples=4", "policy.batch_size=8",
        "policy.prompts=4",
    )  # fmt: skip
    changes = [f"--config.{change}" for change in ("algorithm=reinforce", "dtype=bfloat16", *small)]
    assert cli.main(command(folder, tmp_path / "w", *changes)) == 0
    assert {row["method"] for row in results(tmp_path / "w")} >= {"pi_ref", "reinforce"}


def test_a_package_of_rewards_is_no_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    overrides = OwnRun(prompts=str(folder / "prompts.jsonl"), rewards=["package:short", "a, b.py:c"]).overrides()
    assert '--config.task.rewards=["package:short", "a, b.py:c"]' in overrides


def test_half_a_surrogate_pair_in_a_prompt_is_refused(folder, tmp_path, capsys):
    rows = [{"prompt": f"Say {i} \ud83d"} for i in range(30)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = command(folder, tmp_path / "w", "--prompts", str(tmp_path / "prompts.jsonl"))
    sentence = refused(capsys, *arguments)
    assert re.search(r"the prompt '.*' has half a surrogate pair at character \d+; remove it", sentence)


def test_generate_needs_no_reward(folder, finished, tmp_path, capfd):
    away = (folder / "rewards.py").rename(tmp_path / "rewards.py")
    try:
        (line,) = stdout_lines(capfd, "generate", "--workdir", finished, "How many eggs?", "--eta", "0.1")
        assert line["values"]
    finally:
        away.rename(folder / "rewards.py")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "arithmetic", "--ref", "x"], "--ref is given in place of --config"),
        ([], "give --config RECIPE, or --ref, --prompts and --reward"),
        (["--ref", "x"], "give the prompts, by --prompts FILE"),
        (["--prompts", "x", "--reward", "x.py:f"], "give the reference model, by --ref"),
        (["--ref", "x", "--prompts", "x"], "give the reward, by --reward FILE.py:NAME"),
        (["--ref", "no_folder", "--prompts", "x", "--reward", "x.py:f"], "no_folder"),
        (["--ref", ".", "--prompts", __file__, "--reward", ""], "the reward is ''; write it as FILE.py:NAME"),
        (["--ref", "x", "--prompts", "x", "--task", "x.py"], "--task gives the prompts too"),
        (["--ref", ".", "--task", "gone.py"], "there is no Python file gone.py; give --task one"),
        (["--ref", ".", "--task", str(ROOT)], f"there is no Python file {ROOT}; give --task one"),
        (["--ref", ".", "--prompts", __file__, "--reward", f"{ROOT}:f"], f"{ROOT} is no Python file, whose name ends"),
        (["--ref", ".", "--prompts", __file__, "--reward", "gone, by.py:f"], "there is no file gone, by.py"),
        (["--ref", ".", "--prompts", "x", "--reward", "x.py:f", "--config.algorithm=a"], "config.algorithm is 'a'"),
        (["--ref", ".", "--prompts", "x", "--reward", "x.py:f", "--processes", "2"], "--processes goes with --coord"),
    ],
)
def test_missing_arguments_are_refused(arguments, words, tmp_path, capsys):
    assert words in refused(capsys, "run", *arguments, "--workdir", tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("reward", "changes", "words"),
    [
        ("shrot", [], "has no function 'shrot'; it has short, failing"),
        ("short", ["--config.fit.holdout=0"], "config.fit.evaluate_every is 4 and config.fit.holdout 0"),
        ("short", ["--config.generate.max_new_tokens=200"], "max_new_tokens is 200; it must be below"),
    ],
)
def test_what_cannot_work_is_refused_before_a_workdir_is_made(folder, tmp_path, capsys, reward, changes, words):
    assert words in refused(capsys, *command(folder, tmp_path / "w", *changes, reward=reward))
    assert not (tmp_path / "w").exists()


def test_a_file_that_is_not_there_is_refused_before_jax_is_imported(folder, tmp_path):
    commands = [
        [*command(folder, tmp_path / "w"), *words]  # the last of an argument is taken; rewards are added
        for words in (
            ["--prompts", "missing.jsonl"], ["--reward", f"{folder / 'rewards.py'}:shrot"], ["--ref", "missing/a/model"]
        )
    ]  # fmt: skip
    program = (
        "import sys; from qsharp_jax import cli\n"
        f"assert [cli.main(command) for command in {commands}] == [2, 2, 2]\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 3, done.stderr


def test_a_reward_that_always_fails_stops_the_run_and_names_a_prompt(folder, tmp_path, capsys):
    assert cli.main(command(folder, tmp_path / "w", reward="failing")) == 2
    *_, sentence = capsys.readouterr().err.strip().splitlines()
    assert re.search(
        r"20 of 20 responses have no reward.*'How many eggs.*RuntimeError: no model, .*rewards.py, line 8", sentence
    )


def test_a_run_does_not_go_on_with_another_reward(folder, finished, capsys):
    (folder / "rewards.py").write_text(PROGRAM + "\n")
    try:
        sentence = refused(capsys, *command(folder, finished))
        assert f"{folder / 'rewards.py'} changed since this run began" in sentence
    finally:
        (folder / "rewards.py").write_text(PROGRAM)


def test_how_many_of_the_prompts_are_used_is_said_where_some_are_not(folder, tmp_path, capsys):
    named = OwnRun(
        ref=str(folder / "ref"), prompts=str(folder / "prompts.jsonl"), rewards=[f"{folder / 'rewards.py'}:short"]
    )
    count = sum(base.split_of(base.content_id(json.dumps(f"How many eggs has Sam {i}?"))) == "train" for i in range(70))
    for prompts, words in ((20, f"20 of {count} training prompts are used (collect.prompts)"), (count, None), (200, None)):
        config = own.load(named, tmp_path / "w", [*SMALL, f"--config.collect.prompts={prompts}", "--config.fit.holdout=0.3"])
        capsys.readouterr()
        checks.check_problems(config)
        assert capsys.readouterr().out == (f"{words}\n" if words else "")


def test_the_defaults_fit_the_model_and_the_longest_prompt(folder, tmp_path, capsys):
    ref = shutil.copytree(folder / "ref", tmp_path / "ref")
    shape = json.loads((ref / "config.json").read_text())
    (ref / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 30, "max_position_embeddings": 1024}))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "How many eggs? " * (i + 1)}) + "\n" for i in range(40)))
    longest = len(bpe.make().encode("How many eggs? " * 40))
    named = OwnRun(ref=str(ref), prompts=str(prompts), rewards=[f"{folder / 'rewards.py'}:short"])
    config = own.load(named, tmp_path / "w", ["--config.generate.max_new_tokens=100"])
    assert (config.value.layers, config.fit.optimizer.learning_rate) == (5, 1e-3)
    assert longest + 100 <= config.fit.pack_length < longest + 200 and config.fit.pack_length % 64 == 0
    assert "  value.layers = 5\n" in capsys.readouterr().out
    assert own.load(named, tmp_path / "w", ["--config.value.layers=12"]).value.layers == 12
    policy = own.load(named, tmp_path / "w", ["--config.algorithm=reinforce"])
    assert (policy.value.layers, policy.policy.optimizer.learning_rate) == (0, 1e-4)
    assert own.load(named, tmp_path / "w", ["--config.mesh=cuda_1"]).mesh.name == "cuda_1"
