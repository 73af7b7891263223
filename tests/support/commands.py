"""Commands of `qsharp` called in this process: small settings, refusals, and what was printed."""

import json
from pathlib import Path

import helpers
from repository import CONFIGS

from qsharp_jax import cli

CONFIG = str(CONFIGS / "star_graph.py")
SMALL = [
    f"--config.{change}"
    for change in (
        "rounds=2", "task.path_length=3", "task.num_nodes=6",
        "model.embed=32", "model.layers=1", "model.heads=2", "model.kv_heads=2", "model.mlp=32",
        "pretrain.steps=60", "pretrain.batch_size=16", "pretrain.save_every=20", "pretrain.length_bucket=32",
        "collect.prompts=10", "collect.batch_size=10", "collect.shard_rows=5", "generate.prompt_bucket=32",
        "fit.epochs=2", "fit.batch_size=8", "fit.length_bucket=32", "fit.save_every=2", "fit.log_every=2",
        "evaluate.problems=8", "evaluate.samples=2", "evaluate.batch_size=16", "evaluate.etas=0.5,0.1",
    )
]  # fmt: skip
PROMPT = "0,1|1,2|0,3|3,4/0,2="
FIELDS = [
    "prompt", "response", "tokens", "finished", "eta", "seed", "log_probs", "ref_log_probs", "kl", "values", "settings",
]  # fmt: skip


def refused(capsys, *arguments: str) -> str:
    """The one sentence that the command ends with, code 2."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("qsharp: ")]
    assert len(lines) == 1 and "Traceback" not in error
    return lines[0]


def results(workdir: Path) -> list[dict]:
    return helpers.without_seconds(json.loads((workdir / "results.json").read_text()))


def stdout_lines(capfd, *arguments) -> list[dict]:
    capfd.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0

    def not_json(name: str):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=not_json) for line in capfd.readouterr().out.splitlines()]
