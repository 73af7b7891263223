"""docs/notebook.ipynb, executed with a small model, and what its functions give and refuse."""

import ast
import dataclasses
import json
import os

import bpe
import hf_folders
import numpy as np
import pytest
from commands import refused
from helpers import refusal
from repository import ROOT
from safetensors.numpy import load_file

import qsharp_jax as q
from qsharp_jax import cli
from qsharp_jax.models import hf
from qsharp_jax.notebook import evaluating, generating, training
from qsharp_jax.run import config as configs
from qsharp_jax.system import loggers

NOTEBOOK = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SMALL = {
    "rounds": 1, "generate.max_new_tokens": 6, "generate.top_k_candidates": 10, "generate.prompt_bucket": 16,
    "collect.samples": 4, "collect.shard_rows": 40, "fit.epochs": 1, "fit.batch_size": 16, "fit.accumulate": 1,
    "fit.evaluate_every": 0, "fit.patience": 0, "fit.optimizer.learning_rate": 0.02, "evaluate.etas": (0.1,),
}  # fmt: skip
LATE = 120  # calls of the reward before an interrupt: in the third shard of rollouts


def execute(cell, names):
    """Run a cell as Jupyter does: the value of an expression at its end is what it shows."""
    tree = ast.parse("".join(cell["source"]))
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(last, "cell", "eval"), names)


def source_of(cell):
    return "".join(cell["source"])


def interrupted(reward, calls):
    """The notebook's reward, with less for longer answers, whose user interrupts the kernel once."""

    def no_commas(completions, **columns):
        calls.append(completions)
        if len(calls) == LATE:
            raise KeyboardInterrupt
        return [value - len(completions[0]) / 20 for value in reward(completions, **columns)]

    return no_commas


@dataclasses.dataclass
class Executed:
    names: dict  # of the notebook
    shown: dict  # what a cell showed, by its source
    kept: dict  # the files of rollouts that there were after the interrupt, with their times
    calls: int  # of the reward

    def __getattr__(self, name):
        return self.names[name]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook with a model of one layer, interrupted in the training, whose cell is then run again."""
    folder, names, shown, kept, calls = tmp_path_factory.mktemp("notebook"), {}, {}, {}, []
    monkeypatch = pytest.MonkeyPatch()
    for module in (generating, evaluating):  # one program for all calls
        monkeypatch.setattr(module, "rows_of", lambda *arguments: 64)
    shape = dataclasses.replace(hf_folders.LLAMA, layers=1, vocab_size=300, max_positions=128)
    hf.export_ref(hf_folders.ref(shape), folder / "model", tokenizer=bpe.make())
    for cell in CELLS:
        if "train_guide" in source_of(cell):
            names["no_commas"] = interrupted(names["no_commas"], calls)
            with pytest.raises(KeyboardInterrupt):
                execute(cell, names)
            shards = (folder / "run" / "rollouts" / "round_1").glob("shard-*")
            kept = {path: path.stat().st_mtime_ns for path in shards}
        shown[source_of(cell)] = execute(cell, names)
        if "train_guide" in source_of(cell):
            count = len(calls)
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= {"MODEL": str(folder / "model"), "WORKDIR": str(folder / "run"), "SETTINGS": SMALL}
    yield Executed(names, shown, kept, count)
    monkeypatch.undo()


def test_what_the_cells_show_is_stored_without_the_paths_of_a_machine():
    """From the run with the real model."""
    for cell in CELLS:
        shown = [output for output in cell["outputs"] if output["output_type"] == "execute_result"]
        assert bool(shown) == isinstance(ast.parse(source_of(cell)).body[-1], ast.Expr)
    stored = json.dumps([cell["outputs"] for cell in CELLS])
    assert "image/png" in stored and not any(path in stored for path in ("/tmp", "/home", "/work/", "/root"))


def test_an_interrupted_cell_goes_on_when_it_is_run_again(executed):
    run, prompts = executed.run, executed.prompts
    assert executed.kept and all(path.stat().st_mtime_ns == time for path, time in executed.kept.items())
    learned = 4 * (len(prompts) - len(run.held_out))
    assert executed.calls < LATE + learned, "what was judged in the shards that were kept is not judged again"
    assert run.config.collect.eta == 0.1 and run.metrics and run.forecast
    assert run.held_out and {row["prompt"] for row in run.held_out} < {*prompts}
    own = executed.ref.sampling
    assert run.sampling == dataclasses.replace(executed.sampling, eta=0.1, stop_ids=own.stop_ids, vocab_size=own.vocab_size)
    hashes = json.loads((run.workdir / "config.json").read_text())["hashes"]["task"]
    assert "the reward no_commas" in hashes


def test_a_workdir_takes_other_prompts_and_rewards_for_another_run(executed):
    def train(prompts=executed.prompts, reward=executed.no_commas, **changes):
        settings = {"workdir": executed.run.workdir, "config": SMALL} | changes
        return q.train_guide(executed.ref, prompts, reward, **settings)

    def no_commas(completions, **columns):
        return [0.0]

    assert "the reward no_commas changed since this run began" in refusal(train, reward=no_commas)
    assert "a run with other prompts" in refusal(train, executed.prompts[1:])
    assert "other settings" in refusal(train, eta=0.2)


def test_the_command_line_knows_that_the_reward_was_an_object(executed, capsys, tmp_path):
    folder = executed.run.workdir
    for command in (("evaluate",), ("run", "--ref", executed.MODEL)):
        sentence = refused(capsys, *command, "--workdir", folder)
        assert "the reward no_commas of this run was a Python object" in sentence and "train_guide" in sentence
    assert cli.main(["export", "--workdir", str(folder), "--what", "guide", "--out", str(tmp_path / "out")]) == 0
    first, again = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder.with_name("run-guide")))
    assert first.keys() == again.keys() and all((first[name] == again[name]).all() for name in first)


def test_texts_are_those_of_the_tokens(executed):
    ref, sampling = executed.ref, dataclasses.replace(executed.sampling, eta=0.1)
    prompts = ["How many eggs?", [{"role": "user", "content": "Sam has twelve eggs."}]]
    responses = [q.generate(ref, guide, prompts, sampling, samples=32, seed=5) for guide in (executed.run.guide, executed.guide)]
    assert responses[0].texts == responses[1].texts, "of the guide that was saved"
    first = responses[0]
    assert first.texts == [ref.tokenizer.decode(first.generation.response(row)) for row in range(64)]
    assert len({*first.texts}) > 32 and (first.kl > 0).all()
    assert first.prompts == [prompts[0]] * 32 + [prompts[1]] * 32 and first._repr_html_().count("<tr>") == 65
    streamed = q.stream(ref, executed.guide, prompts[0], sampling, seed=5)
    assert "".join(streamed) == first.texts[0], "by another loop of decoding"


def test_a_guide_is_used_unless_a_sampling_says_otherwise(executed, capsys):
    ref = dataclasses.replace(executed.ref, sampling=dataclasses.replace(executed.run.sampling, eta=float("inf")))
    prompts = executed.run.held_out[:1]
    default = q.generate(ref, executed.guide, prompts, samples=8)
    given = q.generate(ref, executed.guide, prompts, executed.run.sampling, samples=8)
    assert default.texts == given.texts and (default.kl > 0).all()
    assert "".join(q.stream(ref, executed.guide, prompts[0])) == "".join(
        q.stream(ref, executed.guide, prompts[0]["prompt"], executed.run.sampling)
    )
    assert "not used" not in capsys.readouterr().err
    unguided = q.generate(ref, executed.guide, prompts, executed.sampling, samples=8)
    assert "the guide is not used, since the sampling's eta is inf" in capsys.readouterr().err
    assert (unguided.kl == 0).all()
    assert unguided.texts == q.generate(ref, None, prompts, executed.sampling, samples=8).texts
    assert "not used" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", [list, tuple])
def test_several_guides_share_the_tilt(executed, kind):
    """Two halves of a guide are the guide."""
    prompts, halves = executed.prompts[:2], dataclasses.replace(executed.run.sampling, weights=(0.5, 0.5))
    both = q.generate(executed.ref, kind([executed.run.guide, executed.guide]), prompts, halves, samples=8)
    one = q.generate(executed.ref, executed.guide, prompts, executed.run.sampling, samples=8)
    assert both.texts == one.texts
    np.testing.assert_allclose(both.kl, one.kl, rtol=1e-3, atol=1e-4)


def test_an_evaluation_has_table_figure_and_intervals(executed):
    measured, held_out = executed.evaluation, executed.run.held_out
    rows = {(row["method"], row["eta"]): row for row in measured.rows}
    etas = (1.0, 0.3, 0.1)
    assert {*rows} == {("pi_ref", None), ("pass_4", None), ("best_of_4", None), *(("qsharp", eta) for eta in etas)}
    for eta in (None, *etas):
        row = rows["pi_ref" if eta is None else "qsharp", eta]
        mine = [sample for sample in measured.samples if sample["eta"] == eta]
        assert len(mine) == 4 * len(held_out)
        assert row["reward"] == pytest.approx(np.mean([sample["reward"] for sample in mine]))
        assert row["kl"] == pytest.approx(np.mean([sample["kl"] for sample in mine]))
        assert row["reward_low"] <= row["reward"] <= row["reward_high"]
        again = [float("," not in sample["response"]) - len(sample["response"]) / 20 for sample in mine]
        assert [sample["reward"] for sample in mine] == pytest.approx(again)
    assert rows["qsharp", 0.1]["kl"] > rows["qsharp", 1.0]["kl"] > 0 == rows["pi_ref", None]["kl"]
    assert rows["pi_ref", None]["reward"] <= rows["pass_4", None]["reward"]
    assert measured._repr_html_().count("<tr>") == 7 and "95% intervals" in repr(measured)
    assert executed.shown["evaluation.figure()"]._repr_png_().startswith(b"\x89PNG")


def test_columns_weights_and_several_rewards(executed):
    """The reference alone: rewards are called with the columns of their prompts, and added by their weights."""

    def near(completions, best, **columns):
        return [-abs(len(completions[0]) - best[0])]

    def ends(finished, **columns):
        return [float(finished[0])]

    rows = [{"prompt": "How many eggs?", "best": 3}, {"prompt": "Sam", "best": 5}]
    measured = q.evaluate(
        executed.ref, executed.guide, rows, (near, ends), weights=(0.5, 2), etas=(0.1,), samples=32, sampling=executed.sampling
    )
    best = {row["prompt"]: row["best"] for row in rows}
    for sample in measured.samples:
        off = abs(len(sample["response"]) - best[sample["prompt"]])
        assert sample["reward"] == 2 * sample["finished"] - 0.5 * off


def test_the_weight_of_one_guide_is_the_power_of_its_tilt(executed):
    powers = dataclasses.replace(executed.run.sampling, weights=(3.0,))
    rows = executed.run.held_out[:2]
    measured = q.evaluate(executed.ref, executed.guide, rows, executed.no_commas, etas=0.1, samples=2, sampling=powers)
    (row,) = (row for row in measured.rows if row["eta"] is not None)
    assert row["method"] == "qsharp_power" and row["power"] == 3 and row["eta"] == 0.1
    assert "| Q#, power 3 | 0.1 |" in measured.table()
    assert measured.figure()._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(("each", "samples", "words"), [(1, 2, "2 of 2 responses"), (4, 32, "8 of 32 responses")])
def test_an_evaluation_without_rewards_says_what_to_do(executed, each, samples, words):
    calls = []

    def fails(completions, **columns):
        calls.append(completions)
        return [None if len(calls) % each == 0 else 1.0]

    sentence = refusal(
        q.evaluate, executed.ref, executed.guide, ["Sam"], fails, samples=samples, sampling=executed.run.sampling
    )
    assert words in sentence and "call evaluate again" in sentence and "qsharp" not in sentence
    assert len(calls) == samples, "the guide is not sampled"


def test_a_logger_that_does_not_start_is_refused_before_rollouts(executed, tmp_path, monkeypatch):
    def without_login(workdir, config):
        raise RuntimeError("no API key")

    def reward(completions, **columns):
        raise AssertionError("nothing is collected")

    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", without_login)
    settings = {"workdir": tmp_path / "run", "config": SMALL}
    sentence = refusal(q.train_guide, executed.ref, executed.prompts, reward, **settings)
    assert "config.loggers has tensorboard, which does not start (no API key)" in sentence
    assert not (tmp_path / "run" / "rollouts").exists()


def test_what_cannot_work_is_refused(executed, tmp_path):
    def train(prompts=tuple("abcdefghijklmnop"), reward=executed.no_commas, **changes):
        return q.train_guide(executed.ref, prompts, reward, workdir=tmp_path / "new", **changes)

    assert "must be a function" in refusal(train, reward="short")
    assert "prompt 1: the column 'column' holds a set" in refusal(train, [{"prompt": "x", "column": {1}}])
    assert "no setting --config.fit.epoch" in refusal(train, config={"fit.epoch": 1})
    assert "trains a policy" in refusal(train, config={"algorithm": "reinforce"})
    both = (executed.no_commas, executed.no_commas)
    assert "2 rewards and 1 weights" in refusal(q.evaluate, executed.ref, executed.guide, ["x"], both, weights=[1])
    assert "give a list" in refusal(q.generate, executed.ref, None, "one text")
    assert "seed is -1; it must be at least 0" in refusal(q.generate, executed.ref, None, ["x"], seed=-1)
    for change, words in (
        ({"etas": ()}, "etas is []; it must be a list of finite numbers"),
        ({"etas": (0.1, -1)}, "etas is [0.1, -1.0]"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
    ):
        assert words in refusal(q.evaluate, executed.ref, executed.guide, ["x"], executed.no_commas, **change)
    assert "not a guide's folder" in refusal(q.load_guide, executed.MODEL)


@pytest.mark.parametrize(("value", "parsed"), [(["\n", "a, b"], ("\n", "a, b")), ((), ())])
def test_lists_of_texts_become_settings_as_they_are(value, parsed):
    config = configs.load("own", [f"--config.generate.stop={training._word(value)}"])
    assert config.generate.stop == parsed


@pytest.mark.slow
def test_the_notebook_with_a_real_model(tmp_path):
    """Guidance earns more than the model by itself, as in the outputs that are stored."""
    if "QSHARP_NOTEBOOK_MODEL" not in os.environ:
        pytest.skip("QSHARP_NOTEBOOK_MODEL is not set: the path of SmolLM2-135M-Instruct")
    names = {}
    for cell in CELLS:
        execute(cell, names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= {"MODEL": os.environ["QSHARP_NOTEBOOK_MODEL"], "WORKDIR": str(tmp_path / "run")}
    rewards = {(row["method"], row["eta"]): row["reward"] for row in names["evaluation"].rows}
    assert rewards["qsharp", 0.1] > rewards["pi_ref", None] + 0.15
