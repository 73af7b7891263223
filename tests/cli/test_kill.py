"""A run that is killed again and again, wherever it happens to be, ends as one that never was."""

import json
import multiprocessing
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
from helpers import ARITHMETIC, assert_trees_equal, without_seconds

from qsharp_jax import cli
from qsharp_jax.data.records import read_rounds
from qsharp_jax.run import models
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir

KILLS = 20
SMALL = [
    f"--config.{change}"
    for change in (
        "rounds=2",
        "pretrain.steps=40", "pretrain.batch_size=16", "pretrain.save_every=5", "pretrain.length_bucket=96",
        "collect.prompts=16", "collect.samples=2", "collect.batch_size=8", "collect.shard_rows=8",
        "generate.max_new_tokens=24",
        "fit.epochs=4", "fit.batch_size=8", "fit.length_bucket=96", "fit.save_every=3", "fit.log_every=3",
        "fit.holdout=0.2", "fit.evaluate_every=2", "fit.patience=3",
        "evaluate.problems=8", "evaluate.samples=2", "evaluate.batch_size=16", "evaluate.etas=0.1,",
    )
]  # fmt: skip


# Its words need all of the context; the model is as small as its heads allow.
CONFIG = f"""
import runpy

def get_config():
    c = runpy.run_path({str(ARITHMETIC)!r})["get_config"]()
    c.model.update(embed=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=32)
    return c
"""
# Processes are forked from one that has imported these: to import takes longer than a run's own work.
PRELOADED = ["qsharp_jax.algorithms.qsharp", "qsharp_jax.run.pretrain", "qsharp_jax.report", __name__]
FORKS = multiprocessing.get_context("forkserver")


def run(config: str, workdir: str) -> None:
    """In a process of its own."""
    sys.exit(cli.main(["run", "--config", config, "--workdir", workdir, *SMALL]))


def start(workdir: Path) -> multiprocessing.Process:
    config = workdir.parent / "config.py"
    config.write_text(CONFIG)
    process = FORKS.Process(target=run, args=(str(config), str(workdir)))
    process.start()
    return process


def new_workdir(path: Path, like: Path) -> Path:
    """With the programs that were compiled for another run, if they were."""
    if like.exists():
        shutil.copytree(like / "programs", path / "programs")
    return path


def reached(workdir: Path) -> str:
    """The files last written, of all that a run goes on from, and what was being written."""
    files = [path for name in ("ref", "rollouts", "guide", "samples") for path in (workdir / name).rglob("*")]
    if not files:
        return "nothing"
    newest = max(files, key=lambda path: path.stat().st_mtime_ns).relative_to(workdir)
    kept = next((part for part in newest.parts if "tmp" in part), None)
    return "/".join(newest.parts[:3]) + (" (half-written)" if kept else "")


def assert_same_run(actual: Path, expected: Path) -> None:
    """Weights bit for bit, rollouts, samples, results."""
    runs = [Session(Workdir(path, json_config(path))) for path in (actual, expected)]
    assert_trees_equal(*(models.load_ref(run).params for run in runs))
    for number in (1, 2):
        assert_trees_equal(*(models.load_guide(run, number).params for run in runs))
    records = [read_rounds(path / "rollouts", [1, 2]) for path in (actual, expected)]
    assert records[0] == records[1]
    rows = [without_seconds(json.loads((path / "results.json").read_text())) for path in (actual, expected)]
    assert rows[0] == rows[1]
    for file in sorted((expected / "samples").iterdir()):
        texts = [(path / "samples" / file.name).read_text() for path in (actual, expected)]
        if file.suffix == ".jsonl":
            texts = [without_seconds([json.loads(line) for line in text.splitlines()]) for text in texts]
        assert texts[0] == texts[1], file.name


def json_config(path: Path):
    with Workdir.open(path) as workdir:
        return workdir.config


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_as_one_that_never_was(tmp_path, monkeypatch):
    """At seeded moments, spread over the time that a run takes: one that ends before its kill is followed by another."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Else the folder's own path is a part of every program's key, and no workdir has another's programs.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
    FORKS.set_forkserver_preload(PRELOADED)
    shutil.copy(ARITHMETIC.parent / "meshes.py", tmp_path)  # configs look meshes up beside themselves
    straight, again = tmp_path / "straight", tmp_path / "again"
    seconds = float("inf")
    for workdir in (straight, again):  # the first compiles; the other may have had to wait for the machine
        began = time.monotonic()
        process = start(new_workdir(workdir, straight))
        process.join()
        assert process.exitcode == 0
        seconds = min(seconds, time.monotonic() - began)
    assert_same_run(again, straight)

    moments, kills, whole, workdir = random.Random(0), 0, 0, new_workdir(tmp_path / "0", straight)
    while whole == 0 or kills < KILLS:
        process = start(workdir)
        process.join(moments.uniform(0, seconds) if kills < KILLS else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            print(f"kill {kills}: {reached(workdir)}", flush=True)
            continue
        assert process.exitcode == 0
        assert_same_run(workdir, straight)
        whole += 1
        workdir = new_workdir(tmp_path / str(whole), straight)
    print(f"{kills} kills in {whole} runs of {seconds:.0f} s each, all of which ended the same", flush=True)
