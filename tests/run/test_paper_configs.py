"""The rows of the paper's tables, each resolved down to shapes and memory without a weight; and a small run of one."""

import dataclasses
import json
import logging
import re
from collections import Counter
from pathlib import Path

import bpe
import helpers
import jax
import pytest
import small_data
from commands import refused
from repository import CONFIGS

from qsharp_jax import cli, plan
from qsharp_jax.algorithms import value_based
from qsharp_jax.evaluation import measure
from qsharp_jax.models import cpu_form, hf
from qsharp_jax.run import checks, models
from qsharp_jax.run import config as configs
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError

ROWS = sorted(path for task in ("gsm8k", "math", "aime", "quality") for path in (CONFIGS / task).glob("[!_]*.py"))
NO_ROW = CONFIGS / "gsm8k" / "qwen25_coder_05b.py"  # no row of the paper's
ROWS.remove(NO_ROW)
NAMES = ["/".join((path.parent.name, path.stem)) for path in ROWS]

# By the names of the folders that the configs ask for: the published size, and its weights as its card counts them.
MODELS = {
    "Meta-Llama-3-8B-Instruct": ("llama3-8b", 8_030_261_248),
    "Llama-3.1-8B-Instruct": ("llama3.1-8b", 8_030_261_248),
    "Meta-Llama-3-70B-Instruct": ("llama3-70b", 70_553_706_496),
    "Llama-3.1-70B-Instruct": ("llama3.1-70b", 70_553_706_496),
    "Qwen2.5-7B-Instruct": ("qwen2.5-7b", 7_615_616_512),
    "Llama-3.2-1B": ("llama3.2-1b", 1_235_814_400),
    "Llama-3.2-3B": ("llama3.2-3b", 3_212_749_824),
    "Qwen2.5-1.5B": ("qwen2.5-1.5b", 1_543_714_304),
}
LONGEST = {"gsm8k": 512, "math": 1024, "aime": 1024, "quality": 7168}  # tokens of a prompt, generously
MESHES = ("cuda_1", "cuda_8", "v5p_8", "v5e_16")


def count(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def job_of(path: Path) -> plan.Job:
    config = configs.load(path, [])
    checks.check_settings(config)
    sizes = dict(ref_size=MODELS[config.ref][0], guide_size=MODELS[config.guide][0])
    return plan.make(config, prompt_tokens=LONGEST[config.task.name], **sizes)


def test_a_small_model_has_the_papers_sampling():
    config, paper = configs.load(NO_ROW, []), configs.load(CONFIGS / "gsm8k" / "qwen25_7b.py", [])
    checks.check_settings(config)
    assert config.task == paper.task and config.evaluate.etas == paper.evaluate.etas
    different = {key for key in config.generate if config.generate[key] != paper.generate[key]}
    assert different == {"max_new_tokens"}


@pytest.mark.parametrize("path", [*ROWS, NO_ROW], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_packed_rows_hold_the_longest_prompt_with_its_response(path):
    config = configs.load(path, [])
    longest = LONGEST[config.task.name] + config.generate.max_new_tokens
    assert config.fit.pack_length == 0 or config.fit.pack_length >= longest


def test_the_rows_are_the_papers():
    pairs = {name: (configs.load(path, []).ref, configs.load(path, []).guide) for name, path in zip(NAMES, ROWS)}
    llamas = {"llama3_8b": "Meta-Llama-3-8B-Instruct", "llama31_8b": "Llama-3.1-8B-Instruct"}
    large = {"llama3_70b": "Meta-Llama-3-70B-Instruct", "llama31_70b": "Llama-3.1-70B-Instruct"}
    qwen = ("Qwen2.5-7B-Instruct", "Qwen2.5-1.5B")
    assert pairs == {
        **{f"{task}/{name}": (ref, "Llama-3.2-1B") for task in ("gsm8k", "math") for name, ref in llamas.items()},
        **{f"math/{name}_{n.lower()}": (ref, f"Llama-3.2-{n}") for name, ref in large.items() for n in ("1B", "3B")},
        **{f"{task}/qwen25_7b": qwen for task in ("gsm8k", "math", "aime", "quality")},
        "quality/llama31_8b": ("Llama-3.1-8B-Instruct", "Llama-3.2-1B"),
    }


@pytest.mark.parametrize("path", ROWS, ids=NAMES)
def test_a_row_has_the_papers_settings(path):
    c = configs.load(path, [])
    generate, collect, optimizer = c.generate, c.collect, c.fit.optimizer
    assert (generate.temperature, generate.top_p, generate.top_k, generate.max_new_tokens) == (0.8, 0.9, 0, 1024)
    assert (generate.top_k_candidates, collect.eta, collect.samples, c.evaluate.samples) == (20, 0.1, 16, 8)
    assert 0.1 in c.evaluate.etas and collect.drop_no_variation and c.rounds == 2 and not c.fit.warm_start
    assert (c.value.type, c.value.distribution, c.prompt_format) == ("v", "bernoulli", "chat")
    assert (c.fit.batch_size, c.fit.epochs) == (32, 5)
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay, optimizer.clip) == ("adamw", 2e-5, 0.01, 5)
    assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", 0)
    assert c.task.name == path.parent.name and c.task.evaluate_on == "test"
    sizes = {"gsm8k": (6726, 1319), "math": (6750, 500), "aime": (6750, 30)}
    if c.task.name in sizes:
        assert (collect.prompts, c.evaluate.problems) == sizes[c.task.name]


@pytest.mark.parametrize("path", ROWS, ids=NAMES)
def test_a_row_down_to_shapes_and_memory(path):
    """Each model has the weights that its card counts; an 8B reference fits on one GPU of 80 GB, a 70B one on eight."""
    job = job_of(path)
    config = job.config
    assert count(job.ref.params) == MODELS[config.ref][1]
    width = job.guide.config.trunk.embed
    assert count(job.guide.params) == MODELS[config.guide][1] + width + 1  # a head of one logit in place of none
    presets = configs.presets(path)
    large = "70B" in config.ref
    for name in MESHES:
        found = [f"{use} {needed(count_, job, presets[name])}" for use, count_ in USES.items()]
        print(f"{path.parent.name}/{path.stem} on {name}, a chip: {', '.join(found)}")
    reasons = {name: plan.problem(job, presets[name]) for name in ("cuda_1", "cuda_8")}
    assert reasons["cuda_8" if large else "cuda_1"] is None
    assert not large or "would take" in reasons["cuda_1"]


USES = {"fit": plan.fit, "decode": plan.decode}


def needed(count_, job: plan.Job, section: dict) -> str:
    """Of memory; or why the rows or heads cannot be divided so."""
    try:
        return f"{count_(job, section).bytes / 2**30:.1f} of {section['hbm_bytes'] / 2**30:.0f} GiB"
    except UserError as error:
        return f"({error})"


SMALL = [
    f"--config.{change}"
    for change in (
        "collect.prompts=9", "collect.samples=2", "collect.shard_rows=6", "collect.batch_size=8",
        "collect.drop_no_variation=False", "generate.max_new_tokens=24", "fit.epochs=1", "fit.batch_size=6",
        "fit.accumulate=1", "fit.length_bucket=64", "evaluate.problems=4", "evaluate.samples=2",
        "evaluate.batch_size=8", "rounds=1",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a language model that has learned nothing, and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    ref = helpers.random_model(len(bpe.make()), max_positions=256)
    hf.export_ref(ref, folder, tokenizer=bpe.make(), stop_ids=[bpe.EOS, bpe.EOT])
    return folder


@pytest.mark.slow
def test_a_small_run_of_a_row(model, tmp_path, capsys):
    """GSM8K's own format, the chat template and the judge, with a table at the end."""
    folder = small_data.write_gsm8k(tmp_path / "data", train=10, test=4)
    given = [f"--config.ref={model}", f"--config.guide={model}", f"--config.task.data={folder}", *SMALL]
    path, workdir = CONFIGS / "gsm8k" / "llama31_8b.py", tmp_path / "run"
    assert cli.main(["run", "--config", str(path), "--workdir", str(workdir), *given]) == 0
    collected = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    collected = [line for line in collected if line["phase"].endswith("collect")]
    assert [line["rollouts"] for line in collected] == [18]
    assert all(0 <= line["answered"] <= 1 for line in collected)
    samples = [json.loads(line) for line in (workdir / "samples" / "pi_ref.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and {sample["prompt"][:10] for sample in samples} == {"Problem:\n\n"}
    assert {row["method"] for row in json.loads((workdir / "results.json").read_text())} >= {"pi_ref", "qsharp", "cd"}


@pytest.mark.slow
def test_an_accelerator_compiles_few_programs_for_a_row(model, tmp_path, monkeypatch, caplog):
    """Two prefills, and three decodes: by pi_ref, by pi_ref cut to the likeliest tokens, and by the guide."""
    monkeypatch.setattr(cpu_form, "here", lambda: False)
    folder = tmp_path / "data"
    for split, count in {"train": 10, "test": 4}.items():  # of many lengths, in training longer
        questions = ["Sam has eggs. " * i + "How many?" for i in range(count)]
        rows = [{"question": text, "answer": f"#### {i}"} for i, text in enumerate(questions)]
        small_data.write_lines(folder / "gsm8k" / f"{split}.jsonl", rows)
    changes = [f"ref={model}", f"guide={model}", f"task.data={folder}", "rounds=2", "generate.prompt_bucket=16"]
    given = [*SMALL, *(f"--config.{change}" for change in changes)]
    session = Session(Workdir.open(tmp_path / "run", configs.load(CONFIGS / "gsm8k" / "llama31_8b.py", given)))
    ref = models.load_ref(session)
    guide = helpers.random_guide(dataclasses.replace(ref.config, layers=2))
    with caplog.at_level(logging.WARNING, "jax"), jax.log_compiles():
        value_based.collect(session, 1, ref, None)
        value_based.collect(session, 2, ref, guide)
        measure.evaluate(session, ref, {2: guide}, full=True)
    compiled = Counter(re.findall(r"^Compiling jit\((\w+)\)", "\n".join(caplog.messages), re.MULTILINE))
    assert (compiled["prefill"], compiled["decode"]) == (2, 3)


def test_a_data_set_that_cannot_be_read_stops_a_run_before_it_begins(model, tmp_path, capsys):
    folder = small_data.write_gsm8k(tmp_path / "data", train=10, test=4)
    given = [f"--config.ref={model}", f"--config.guide={model}", f"--config.task.data={folder}", *SMALL]
    command = ["run", "--config", CONFIGS / "gsm8k" / "llama31_8b.py", "--workdir", tmp_path / "run", *given]
    assert "there are 9 train problems, not the 10" in refused(capsys, *command, "--config.collect.prompts=10")
    assert "which with config.generate.max_new_tokens = 240" in refused(
        capsys, *command, "--config.generate.max_new_tokens=240"
    )
    path = folder / "gsm8k" / "train.jsonl"
    path.write_text(path.read_text() + '{"question": "x"}\n')
    assert f"{path}, line 11: there is no field 'answer'" in refused(capsys, *command)
    assert not (tmp_path / "run").exists()
