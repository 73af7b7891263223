"""The command line as a user meets it: a whole small run, its commands one by one, and what it says to bad input."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import CONFIG, FIELDS, PROMPT, SMALL, refused, results, stdout_lines
from repository import ROOT

from qsharp_jax import cli, train
from qsharp_jax.data.records import read_rounds
from qsharp_jax.models import memory
from qsharp_jax.system.errors import UserError
from qsharp_jax.train import checkpoint


def run(workdir, *changes: str) -> int:
    return cli.main(["run", "--config", CONFIG, "--workdir", str(workdir), *SMALL, *changes])


def records(workdir: Path) -> list:
    return [*read_rounds(workdir / "rollouts", [1, 2])]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The workdir of a whole run, which the tests leave as it is."""
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    assert run(workdir) == 0
    return workdir


def run_apart(workdir: Path) -> subprocess.Popen:
    """The same run in a process of its own, where sums are rounded alike: in one that ran others before, they are not."""
    command = [sys.executable, "-m", "qsharp_jax.cli", "run", "--config", CONFIG, "--workdir", str(workdir), *SMALL]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def finished_apart(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "apart"
    assert run_apart(workdir).wait() == 0
    return workdir


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def test_a_run_leaves_everything_it_promises(finished):
    names = {"config.json", "metrics.jsonl", "results.json", "report.md", "frontier.png", "rounds.png", "ref", "guide"}
    names |= {"tensorboard", "calibration.png", "lengths.png", "examples.html"}
    assert names <= {path.name for path in finished.iterdir()}
    methods = [(row["method"], row["eta"], row["round"]) for row in results(finished)]
    assert ("pi_ref", None, 0) in methods and ("cd", 0.1, 2) in methods
    assert [m for m in methods if m[0] == "qsharp"] == [("qsharp", 0.1, 1), ("qsharp", 0.5, 2), ("qsharp", 0.1, 2)]
    assert {"majority_2", "best_of_2", "weighted_majority_2"} <= {method for method, _, _ in methods}


def test_a_finished_run_repeated_computes_nothing_again(finished, capsys):
    kept = ("ref", "guide", "rollouts", "samples")
    before = {path: path.stat().st_mtime_ns for name in kept for path in (finished / name).rglob("*") if path.is_file()}
    assert run(finished) == 0
    after = {path: path.stat().st_mtime_ns for name in kept for path in (finished / name).rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if "tokenizer" not in str(path)} == {
        path: time for path, time in before.items() if "tokenizer" not in str(path)
    }
    assert "| pi_ref" in capsys.readouterr().out


@pytest.fixture(scope="module")
def measured(finished) -> Path:
    """The workdir of a measurement of that run at other etas, which the tests leave as it is."""
    workdir = finished.parent / "measured"
    command = ["evaluate", "--of", str(finished), "--workdir", str(workdir), "--config.evaluate.etas=0.3"]
    assert cli.main(command) == 0
    return workdir


def test_a_run_s_models_are_measured_again_in_a_folder_of_its_own(finished, measured, capfd):
    both = [
        {(row["method"], row["round"], row["eta"]): row for row in results(workdir)} for workdir in (finished, measured)
    ]
    assert {(number, eta) for method, number, eta in both[1] if method == "qsharp"} == {(1, 0.3), (2, 0.3)}
    assert both[0]["pi_ref", 0, None] == both[1]["pi_ref", 0, None]
    assert not (measured / "guide").exists() and not (measured / "ref").exists()
    for command in ("evaluate", "report"):  # by its folder alone
        assert cli.main([command, "--workdir", str(measured)]) == 0
    lines = [
        stdout_lines(capfd, "generate", "--workdir", workdir, "--eta", "0.1", PROMPT) for workdir in (finished, measured)
    ]
    assert [line["values"] for line in lines[0]] == [line["values"] for line in lines[1]]


def test_a_measurement_takes_no_training_and_no_other_run(finished, measured, tmp_path, capsys):
    of, new = ("evaluate", "--of", finished), tmp_path / "new"
    assert f"holds measurements of {finished}; fit there" in refused(capsys, "fit", "--workdir", measured)
    assert f"give --of {finished}" in refused(capsys, "evaluate", "--of", measured, "--workdir", new)
    assert "is a run of its own" in refused(capsys, *of, "--workdir", finished)
    assert "evaluate.etas: [0.3] -> [0.5, 0.1]" in refused(capsys, *of, "--workdir", measured)
    assert "leave --config out" in refused(capsys, *of, "--workdir", new, "--config", CONFIG)
    assert "leave --of out" in refused(capsys, *of, "--workdir", new, "--rejudge")
    assert "--config.fit.epochs: 2 -> 3 would be another run" in refused(
        capsys, *of, "--workdir", new, "--config.fit.epochs=3"
    )
    assert "is not a workdir" in refused(capsys, "evaluate", "--of", tmp_path, "--workdir", new)
    assert not new.exists()


def test_a_measurement_of_a_run_that_is_gone_still_has_its_report(measured, tmp_path, capsys):
    left = shutil.copytree(measured, tmp_path / "left")
    stored = json.loads((left / "config.json").read_text())
    (left / "config.json").write_text(json.dumps(stored | {"of": str(tmp_path / "gone")}))
    assert cli.main(["report", "--workdir", str(left)]) == 0
    assert "where there is no run; put it back" in refused(capsys, "evaluate", "--workdir", left)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)]
)
@pytest.mark.parametrize(
    "reached", ["ref/25", "rollouts/round_1/shard-00000.parquet", "samples/pi_ref.jsonl", "guide/round_2/2"]
)
def test_a_run_stopped_anywhere_and_repeated_ends_as_one_that_never_stopped(
    finished_apart, tmp_path, sign, code, reached
):
    workdir = tmp_path / "stopped"
    process = run_apart(workdir)
    while not (workdir / reached).exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, sign)
    output, _ = process.communicate(timeout=30)  # the time that clouds give
    assert process.returncode == code, output
    assert ("stopped by SIGTERM; run the same command again" in output) == (sign == signal.SIGTERM)
    assert "Traceback" not in output
    assert run_apart(workdir).wait() == 0
    assert records(workdir) == records(finished_apart)
    assert results(workdir) == results(finished_apart)


@pytest.mark.slow
def test_each_command_works_alone_on_the_workdir(copied, capsys):
    before, expected = records(copied), results(copied)
    shutil.rmtree(copied / "rollouts" / "round_2")
    shutil.rmtree(copied / "guide" / "round_2")
    shutil.rmtree(copied / "samples")
    for command in ("collect", "fit", "evaluate", "report"):
        assert cli.main([command, "--workdir", str(copied)]) == 0
    assert records(copied) == before
    rows = results(copied)  # `evaluate` measures the last round's guide at every eta, as the end of a run does
    assert [row["reward"] for row in rows] == [row["reward"] for row in expected]


def test_samples_are_judged_again_without_a_model(copied, capsys):
    """A verdict that was changed is said to be, and mended; with neither reference nor guide on the disk."""
    expected = json.loads((copied / "results.json").read_text())
    for folder in ("ref", "guide", "rollouts"):
        shutil.rmtree(copied / folder)
    path = copied / "samples" / "cd_round_2.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    broken = json.loads(first)
    broken["reward"] = 1.0 - broken["reward"]
    path.write_text(json.dumps(broken) + "\n" + "".join(rest))
    assert cli.main(["evaluate", "--workdir", str(copied), "--rejudge"]) == 0
    said = capsys.readouterr().out
    assert "cd_round_2.jsonl: of 16 verdicts 1 changed, and 0 answers are read differently" in said
    assert "pi_ref.jsonl: of 16 verdicts 0 changed" in said and "| CD " in said
    assert json.loads((copied / "results.json").read_text()) == expected
    assert path.read_text().splitlines(keepends=True) == [first, *rest]
    for more in (["--config.seed=1"], ["--config", CONFIG], ["--config.mesh=single"]):
        assert "give --workdir alone" in refused(capsys, "evaluate", "--workdir", copied, "--rejudge", *more)
    several = ["--coordinator", "localhost:1", "--processes", "2", "--process", "0"]
    assert "runs in one process" in refused(capsys, "evaluate", "--workdir", copied, "--rejudge", *several)
    shutil.rmtree(copied / "samples")
    assert "there are no samples of pi_ref" in refused(capsys, "evaluate", "--workdir", copied, "--rejudge")


@pytest.mark.parametrize("asked", [True, False])
def test_a_profile_is_the_trainings_when_asked_for(asked, copied, capsys, monkeypatch):
    def fit(*_, loop, **__):
        raise UserError(f"the trace goes to {loop.profile}")

    monkeypatch.setattr(train, "fit", fit)
    sentence = refused(capsys, "fit", "--workdir", copied, *["--profile"] * asked)
    assert sentence.endswith(f"to {copied / 'profile' / 'round_2' if asked else None}")


def test_generate_writes_a_strict_json_line_for_each_prompt_and_eta(finished, capfd):
    command = ("generate", "--workdir", finished, PROMPT, "0,1|0,2/0,1=", "--eta", "0.5,0.1,inf", "--seed", "3")
    lines = stdout_lines(capfd, *command)
    assert [(line["prompt"], line["eta"]) for line in lines] == [
        (prompt, eta) for prompt in (PROMPT, "0,1|0,2/0,1=") for eta in (0.5, 0.1, None)
    ]
    for line in lines:
        assert list(line) == FIELDS
        assert len(line["tokens"]) == len(line["log_probs"]) == len(line["kl"]) == len(line["values"])
    assert stdout_lines(capfd, *command) == lines


def test_generate_reads_files_and_standard_input(finished, tmp_path, capfd, monkeypatch):
    (tmp_path / "prompts.txt").write_text(PROMPT + "\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    expected = stdout_lines(capfd, "generate", "--workdir", finished, PROMPT)
    for name in ("prompts.txt", "prompts.jsonl"):
        assert stdout_lines(capfd, "generate", "--workdir", finished, "--input", tmp_path / name) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode())))
    assert stdout_lines(capfd, "generate", "--workdir", finished) == expected
    output = tmp_path / "out.jsonl"
    assert cli.main(["generate", "--workdir", str(finished), PROMPT, "--output", str(output)]) == 0
    assert [json.loads(line) for line in output.read_text().splitlines()] == expected


def test_generate_streams_the_text_of_the_line_that_it_would_write(finished, capfd):
    command = ("generate", "--workdir", finished, PROMPT, "--seed", "3")
    (line,) = stdout_lines(capfd, *command)
    assert cli.main([*map(str, command), "--stream"]) == 0
    assert capfd.readouterr().out == line["response"] + "\n"


def test_score_reads_what_generate_wrote(finished, tmp_path, capfd):
    """A line of `generate` has texts of another name for its tokens; a finished response is encoded as it was drawn."""
    made = stdout_lines(capfd, "generate", "--workdir", finished, PROMPT, "--eta", "0.5", "--samples", "4")
    finished_ones = [line for line in made if line["finished"]]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in finished_ones))
    command = ["score", "--workdir", str(finished), "--input", str(source), "--output", str(output)]
    assert cli.main(command) == 0
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(scored) == len(finished_ones) >= 1
    for line, again in zip(finished_ones, scored):
        assert again["ref_log_probs"] == pytest.approx(line["ref_log_probs"], abs=1e-4)
        assert again["values"][:-1] == pytest.approx(line["values"][:-1], abs=1e-4)


def test_a_model_that_no_class_of_transformers_computes_is_not_exported(finished, tmp_path, capsys):
    sentence = refused(capsys, "export", "--workdir", finished, "--what", "ref", "--out", tmp_path / "out")
    assert "token_shift" in sentence and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", [None, "run", "collect", "fit", "generate", "score", "evaluate", "report", "plan", "export"]
)
def test_help_says_how(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"] if command is None else [command, "--help"])
    assert stop.value.code == 0 and "--workdir" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("collect.etta=1", "collect.eta"),
        ("collect.eta=0", "config.collect.eta is 0.0"),
        ("task.degree=1", "degree is 1"),
        ("task.name=star_graf", "did you mean 'star_graph'"),
        ("model.size=huge", "the named sizes are tiny"),
        ("model.kv_heads=3", "multiple"),
        ("fit.epochs=many", "not a whole number"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_made(change, words, tmp_path, capsys):
    sentence = refused(capsys, "run", "--config", CONFIG, "--workdir", tmp_path / "new", *SMALL, f"--config.{change}")
    assert words in sentence
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["fly"], "fly"), (["generate", "--workdir", "x", "--eta", "0"], "eta"), (["run"], "--workdir"), ([], "COMMAND")],
)
def test_arguments_that_cannot_be_are_refused(arguments, words, capsys):
    assert words in refused(capsys, *arguments)


def test_a_workdir_of_another_config_is_left_alone(copied, capsys):
    sentence = refused(capsys, "run", "--config", CONFIG, "--workdir", copied, *SMALL, "--config.seed=9")
    assert "seed: 0 -> 9" in sentence


@pytest.mark.parametrize("command", ["run", "fit"])
def test_attention_of_other_devices_is_refused_before_anything_is_computed(command, tmp_path, capsys):
    given = [command, "--config", CONFIG, "--workdir", tmp_path / "run", *SMALL]
    assert "config.fit.attention is cudnn, which runs on a gpu, but JAX has a cpu here; give xla" in refused(
        capsys, *given, "--config.fit.attention=cudnn"
    )
    assert "config.fit.length_bucket is 8, but config.fit.attention splash needs a multiple of 128" in refused(
        capsys, *given, "--config.fit.attention=splash", "--config.fit.length_bucket=8"
    )


def test_prompts_that_cannot_be_are_refused(finished, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "0,1"}\n{"text": 1}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "0,1"}\n\n{"prompt": "\\ud83d"}\n')
    generate = ("generate", "--workdir", finished)
    for arguments, words in [
        (["0,1|eggs/0,1="], "'eggs'"),
        (["|".join(["0,1"] * 40)], "positions"),
        (["--input", tmp_path / "empty.txt"], "is empty"),
        (["--input", tmp_path / "none.txt"], "there is no file"),
        (["--input", tmp_path / "broken.jsonl"], "line 2"),
        (["--input", tmp_path / "half.jsonl"], "line 3: expected a JSON object with a text"),
        (["0,1", "--input", tmp_path / "empty.txt"], "not both"),
        (["0,1", "--samples", "0"], "--samples"),
        (["0,1", "--temperature", "-1"], "temperature"),
        (["0,1", "--max-new-tokens", "0"], "max-new-tokens"),
        (["0,1", "--config.seed=1"], "--config"),
    ]:
        assert words in refused(capsys, *generate, *arguments)


def test_too_little_memory_for_a_run_s_models_is_said_before_weights_are_read(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    monkeypatch.setattr(checkpoint.Checkpoints, "restore_params", lambda *_: pytest.fail("it reads"))
    sentence = refused(capsys, "generate", "--workdir", finished, PROMPT)
    for part in ("the reference's weights", "the reference's cache", "the guide's weights", "the guide's cache"):
        assert f"{part} 0.00 GB" in sentence
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": PROMPT, "response": "0,2"}) + "\n")
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert "the guide's weights 0.00 GB are needed" in refused(capsys, "score", "--workdir", finished, *files)


def test_steps_out_of_order_say_what_comes_first(copied, capsys):
    shutil.rmtree(copied / "guide")
    (copied / "results.json").unlink()
    assert "fit" in refused(capsys, "generate", "--workdir", copied, PROMPT)
    alone = ["generate", "--workdir", str(copied), PROMPT, "--eta", "inf", "--output", str(copied / "out.jsonl")]
    assert cli.main(alone) == 0  # pi_ref needs no guide
    capsys.readouterr()
    assert "qsharp evaluate" in refused(capsys, "report", "--workdir", copied)
    assert "round 3" in refused(capsys, "fit", "--workdir", copied, "--round", "3")
    shutil.rmtree(copied / "rollouts")
    assert "qsharp collect" in refused(capsys, "fit", "--workdir", copied)


def test_a_damaged_shard_is_named_and_left_out_only_when_told(copied, capsys):
    shutil.rmtree(copied / "guide" / "round_2")
    shard = copied / "rollouts" / "round_1" / "shard-00001.parquet"  # which the forecast reads as well
    shard.write_bytes(shard.read_bytes()[:100])
    sentence = refused(capsys, "fit", "--workdir", copied)
    assert str(shard) in sentence and "--skip-damaged" in sentence
    assert cli.main(["fit", "--workdir", str(copied), "--skip-damaged"]) == 0


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoints_before_damaged_ones_and_ends_the_same(finished, copied, capsys):
    """The finished reference's and guide's: what is measured anew is that of the run that was never damaged."""
    for folder in (copied / "ref", copied / "guide" / "round_2"):
        last = max((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
        shutil.rmtree(last / "params")
    shutil.rmtree(copied / "samples")
    assert run(copied) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "training resumes from step" in line]
    assert len(said) == 2 and str(copied / "ref") in said[0] and str(copied / "guide" / "round_2") in said[1]
    assert results(copied) == results(finished)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_sentence(finished, capsys):
    assert "disk is full" in refused(capsys, "generate", "--workdir", finished, PROMPT, "--output", "/dev/full")
