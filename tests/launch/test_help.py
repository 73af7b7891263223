"""The launchers' `--help` names every option that they take."""

import math
import re
import shlex

import pytest
from repository import ROOT

from qsharp_jax.models.config import make
from qsharp_jax.run import checks
from qsharp_jax.run import config as configs


@pytest.mark.parametrize("program, fewest", [("tpu.sh", 9), ("cuda.sh", 6)])
def test_help_is_complete(world, program, fewest):
    done = world.run(program, "--help")
    text = (world.repo / "launch" / program).read_text()
    options = [
        line.split(")")[0].strip() for line in text.splitlines() if line.strip().startswith("--") and ") " in line
    ]
    assert done.returncode == 0 and len(options) >= fewest
    for option in options:
        assert option.split(" |")[0] in done.stdout


def examples(text: str) -> list[list[str]]:
    """The words of each command that launches a run."""
    joined = text.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in joined if line.strip().startswith("bash launch/")]
    return [words for words in commands if "--config" in words]


@pytest.mark.parametrize(("source", "several"), [("launch/tpu.sh", 1), ("launch/cuda.sh", 2), ("docs/cloud.md", 2)])
def test_the_examples_have_meshes_of_their_machines(source, several):
    """Two boxes or nodes have eight GPUs each; the mesh has as many devices, and divides the model and its batches."""
    count = 0
    for words in examples((ROOT / source).read_text()):
        launch, run = words[: words.index("--")], words[words.index("--") + 1 :]
        given = dict(zip(launch, launch[1:]))
        hosts = int(given.get("--slurm") or len(given.get("--hosts", "-").split(",")))
        here = 8 if hosts > 1 else 1
        if "--type" in given:
            hosts, here = int(re.fullmatch(r"v5e-(\d+)", given["--type"])[1]) // 4, 4
        config = configs.load(ROOT / run[run.index("--config") + 1], [word for word in run if "--config." in word])
        checks.check(config)
        mesh, model = config.mesh, make(config.model.size, vocab_size=100)
        assert (mesh.hosts, mesh.devices_per_host) == (hosts, here)
        assert math.prod(mesh.fit.values()) == hosts * here and math.prod(mesh.decode.values()) == here
        assert model.heads % mesh.decode.tensor == model.kv_heads % mesh.decode.tensor == 0
        assert model.heads % mesh.fit.tensor == 0
        count += hosts > 1
    assert count == several
