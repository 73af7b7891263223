"""`generate` and `score` of models in folders divided over eight fake devices of two processes, against one device.

The processes are the command line: XLA reads the number of devices when it starts.
"""

import json
import re

import numpy as np
import pytest
from helpers import refusal
from processes import free_port, start

from qsharp_jax import cli
from qsharp_jax.run import config as configs

MESH = [
    "--mesh=cpu", "--config.mesh.hosts=2", "--config.mesh.devices_per_host=4", "--config.mesh.decode.data=4",
    "--config.mesh.decode.tensor=2",
]  # fmt: skip

GLOO = set("Gloo Rank is connected to peer ranks Expected number of".split())  # words of its message


def commands(ref, guide, folder, name) -> list[list[str]]:
    """Generate, and score what one device generated."""
    models, scored = ["--ref", ref, "--guide", guide, "--dtype=float32", "--prompt-format=plain"], f"{name}_scored"
    settings = ["--eta=0.1", "--samples=3", "--max-new-tokens=8", f"--output={folder}/{name}.jsonl"]
    files = [f"--input={folder}/one.jsonl", f"--output={folder}/{scored}.jsonl"]
    return [["generate", *models, *settings, "How many eggs?", "Sam"], ["score", *models, *files]]


def by_two(words: list[str], mesh: list[str] = MESH) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each of two processes with four devices each."""
    meet = [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    command = ["-m", "qsharp_jax.cli", *words, *mesh, *meet]
    started = [start(*command, f"--process={index}", devices=4) for index in range(2)]
    outputs = [process.communicate(timeout=240) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


@pytest.mark.slow
def test_responses_and_scores_of_two_hosts_are_those_of_one_device(models, tmp_path):
    """The first writes all of them; a command that is repeated completes its file."""
    paths = [*map(str, (*models, tmp_path))]
    for words in commands(*paths, "one"):
        assert cli.main(words) == 0
    (tmp_path / "mesh.jsonl").write_text("".join((tmp_path / "one.jsonl").open().readlines()[1:3]))
    for words in commands(*paths, "mesh"):
        for code, output, errors in by_two(words):
            # Gloo's threads may write into each other's lines.
            assert code == 0 and set(re.findall(r"[A-Za-z]+", output)) <= GLOO, (output, errors)

    def lines(name):
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    for name in ("", "_scored"):
        ones, others = lines(f"one{name}"), lines(f"mesh{name}")
        assert len(ones) == len(others) == 6
        for one, other in zip(ones, others, strict=True):
            assert one["tokens"] == other["tokens"]
            for key in ("ref_log_probs", "log_probs", "kl", "values"):
                numbers = (np.asarray(line.get(key, ()), float) for line in (other, one))  # None is nan
                np.testing.assert_allclose(*numbers, atol=1e-4, err_msg=key)


@pytest.mark.slow
def test_two_hosts_need_a_mesh_over_the_devices_of_both(models, tmp_path):
    (words, _) = commands(*map(str, (*models, tmp_path)), "mesh")
    for code, _, errors in by_two(words, ["--mesh=cpu", "--config.mesh.hosts=2", "--config.mesh.devices_per_host=4"]):
        assert code == 2 and "Traceback" not in errors
        assert "2 processes have 8 devices, and the mesh for decoding" in errors or "give sizes that" in errors


def test_a_mesh_is_a_preset_for_the_devices_here():
    assert "there is no mesh 'cuda_9'" in refusal(configs.mesh_section, "cuda_9", [])
    assert "there is no setting --config.fit.epochs" in refusal(configs.mesh_section, "cpu", ["--config.fit.epochs=2"])
    assert configs.mesh_section("cpu", MESH[1:]).decode.tensor == 2
