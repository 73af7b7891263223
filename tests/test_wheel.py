"""The wheel: built, installed away from the checkout, and run with a recipe by its name."""

import os
import shutil
import subprocess
import sys

import pytest
from repository import ROOT

SMALL = [
    f"--config.{change}"
    for change in (
        "rounds=1",
        "pretrain.steps=2", "collect.prompts=4", "collect.samples=2", "collect.batch_size=8", "fit.epochs=1",
        "fit.batch_size=4", "fit.holdout=0", "evaluate.problems=2", "evaluate.samples=1", "evaluate.etas=0.1",
        "evaluate.batch_size=2", "generate.max_new_tokens=8",
    )
]  # fmt: skip


@pytest.mark.slow
def test_a_wheel_runs_a_recipe_by_its_name_without_the_checkout(tmp_path):
    site, pip = tmp_path / "site", [sys.executable, "-m", "pip", "-q"]
    source = tmp_path / "source"  # so that the build leaves nothing in the checkout
    shutil.copytree(ROOT / "qsharp_jax", source / "qsharp_jax")
    for name in ("setup.py", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    for words in (["--help"], ["run", "--config", "arithmetic", "--workdir", "run", *SMALL]):
        command = [sys.executable, "-m", "qsharp_jax.cli", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.md").is_file()
