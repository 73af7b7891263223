"""A guide trained, used, saved and measured by the functions of a notebook, with a reward that no file has."""

import dataclasses
import json

import bpe
import hf_folders
import numpy as np
import pytest
from commands import refused
from helpers import refusal
from safetensors.numpy import load_file

import qsharp_jax as q
from qsharp_jax import cli
from qsharp_jax.models import hf

CONFIG = {
    "rounds": 1, "collect.samples": 2, "collect.batch_size": 16, "collect.shard_rows": 20, "generate.max_new_tokens": 6,
    "generate.prompt_bucket": 16, "fit.epochs": 1, "fit.batch_size": 16, "fit.accumulate": 1, "fit.optimizer.learning_rate": 0.02, "fit.evaluate_every": 0,
    "fit.patience": 0, "evaluate.etas": (0.1,), "evaluate.batch_size": 16,
}  # fmt: skip
SAMPLING = q.Sampling(eta=0.05, max_new_tokens=6)
PROMPTS = [{"prompt": f"How many eggs has Sam {i}?", "best": i % 7} for i in range(45)]
SAMPLES = 32  # to two prompts: as many rows as an evaluation decodes at once, by the same program
LATE = 60  # calls of the reward before the first interrupt
calls = []


def length(completions, best, **kwargs):
    """The nearer to the best length, the better."""
    calls.append(completions)
    if len(calls) == LATE:
        raise KeyboardInterrupt
    return [-abs(len(completion) - 2 * n) / 10 for completion, n in zip(completions, best)]


def ends(finished, **kwargs):
    return [float(finished[0])]


def train(ref, folder, prompts=PROMPTS, reward=(length, ends), **changes):
    return q.train_guide(
        ref, prompts, reward, workdir=folder, eta=0.2, **{"weights": (1, 0.5), "config": CONFIG} | changes
    )


@pytest.fixture(scope="module")
def ref(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ref") / "model"
    shape = dataclasses.replace(hf_folders.LLAMA, layers=1, vocab_size=300, max_positions=128)
    hf.export_ref(hf_folders.ref(shape), folder, tokenizer=bpe.make())
    return q.load(folder)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "workdir"


@pytest.fixture(scope="module")
def run(ref, workdir):
    """A run that was interrupted, with what it had kept."""
    with pytest.raises(KeyboardInterrupt):
        train(ref, workdir)
    kept = {path: path.stat().st_mtime_ns for path in (workdir / "rollouts" / "round_1").glob("shard-*")}
    return train(ref, workdir), kept


def test_an_interrupted_training_goes_on(run, workdir):
    run, kept = run
    assert kept and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert len(calls) < LATE + 2 * len(PROMPTS), "what was judged in the shards that were kept is not judged again"
    assert run.config.collect.eta == 0.2 and run.metrics and run.forecast
    assert run.held_out and all(row in PROMPTS for row in run.held_out)
    hashes = json.loads((workdir / "config.json").read_text())["hashes"]["task"]
    assert {"the reward length (number 1)", "the reward ends (number 2)"} < {*hashes}


def test_a_workdir_takes_other_prompts_and_rewards_for_another_run(run, ref, workdir):
    def longer(completions, **kwargs):
        return [len(completion) for completion in completions]

    longer.__name__ = "length"
    assert "the reward length (number 1) changed" in refusal(train, ref, workdir, reward=(longer, ends))
    assert "a run with other prompts" in refusal(train, ref, workdir, PROMPTS[1:])
    assert "other settings" in refusal(train, ref, workdir, weights=(1, 1))


def test_the_command_line_knows_that_the_reward_was_an_object(run, workdir, capfd):
    for command in (("evaluate",), ("run", "--ref", json.loads((workdir / "config.json").read_text())["ref"])):
        sentence = refused(capfd, *command, "--workdir", workdir)
        assert "the reward length, ends of this run was a Python object" in sentence and "train_guide" in sentence
    assert cli.main(["export", "--workdir", str(workdir), "--what", "guide", "--out", str(workdir / "out")]) == 0


def test_texts_are_those_of_the_tokens(run, ref):
    prompts = ["How many eggs?", [{"role": "user", "content": "Sam has twelve eggs."}]]
    responses = q.generate(ref, run[0].guide, prompts, SAMPLING, samples=SAMPLES, seed=5)
    tokens = [responses.generation.response(row) for row in range(2 * SAMPLES)]
    assert responses.texts == [ref.tokenizer.decode(row) for row in tokens] and len({*responses.texts}) > SAMPLES
    assert responses.prompts == [prompts[0]] * SAMPLES + [prompts[1]] * SAMPLES
    assert (responses.kl > 0).all() and responses._repr_html_().count("<tr>") == 2 * SAMPLES + 1
    streamed = q.stream(ref, run[0].guide, prompts[0], SAMPLING, seed=5)
    assert "".join(streamed) == responses.texts[0], "by another loop of decoding"


def test_a_saved_guide_is_the_same_guide(run, ref, tmp_path):
    run[0].guide.save(tmp_path / "guide")
    loaded = q.load_guide(tmp_path / "guide")
    loaded.save(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("guide", "again"))
    assert first.keys() == again.keys() and all((first[name] == again[name]).all() for name in first)
    answers = [q.generate(ref, guide, ["eggs"] * 2, SAMPLING, samples=SAMPLES) for guide in (run[0].guide, loaded)]
    assert answers[0].texts == answers[1].texts


def test_an_evaluation_has_table_figure_and_intervals(run, ref):
    measured = q.evaluate(
        ref,
        run[0].guide,
        run[0].held_out,
        (length, ends),
        weights=(1, 0.5),
        etas=(0.5, 0.05),
        samples=4,
        sampling=SAMPLING,
    )
    rows = {(row["method"], row["eta"]): row for row in measured.rows}
    assert {*rows} == {("pi_ref", None), ("qsharp", 0.5), ("qsharp", 0.05), ("pass_4", None), ("best_of_4", None)}
    for (method, eta), row in rows.items():
        if method in ("pi_ref", "qsharp"):
            mine = [sample for sample in measured.samples if sample["eta"] == eta]
            assert len(mine) == 4 * len(run[0].held_out)
            assert row["reward"] == pytest.approx(np.mean([sample["reward"] for sample in mine]))
            assert row["kl"] == pytest.approx(np.mean([sample["kl"] for sample in mine]))
            assert row["reward_low"] <= row["reward"] <= row["reward_high"]
            texts = [sample["response"] for sample in mine]
            best = [sample["columns"]["best"] for sample in mine]
            again = [-abs(len(text) - 2 * n) / 10 for text, n in zip(texts, best)]
            assert [sample["reward"] - 0.5 * sample["finished"] for sample in mine] == pytest.approx(again)
    assert rows["qsharp", 0.05]["kl"] > rows["qsharp", 0.5]["kl"] > 0 == rows["pi_ref", None]["kl"]
    assert rows["pi_ref", None]["reward"] <= rows["pass_4", None]["reward"]
    assert measured._repr_html_().count("<tr>") == 6 and "95% intervals" in repr(measured)
    assert measured.figure()._repr_png_().startswith(b"\x89PNG")


def test_what_cannot_work_is_refused(run, ref, tmp_path):
    assert "must be a function" in refusal(train, ref, tmp_path / "new", reward="short")
    assert "prompt 1 is not JSON" in refusal(train, ref, tmp_path / "new", [{"prompt": "x", "column": {1}}])
    assert "no setting --config.fit.epoch" in refusal(train, ref, tmp_path / "new", config={"fit.epoch": 1})
    assert "trains a policy" in refusal(train, ref, tmp_path / "new", config={"algorithm": "reinforce"})
    assert "2 rewards and 1 weights" in refusal(q.evaluate, ref, run[0].guide, ["x"], (length, ends), weights=[1])
    assert "give a list" in refusal(q.generate, ref, None, "one text")
    assert "not a guide's folder" in refusal(q.load_guide, ref.source)
