"""`generate` and `score` of models in folders divided over eight fake devices, against one device.

The devices are made by a process of its own, which is this file run as a script: XLA reads their number when it starts.
"""

import json
import sys

import numpy as np
from helpers import refusal
from processes import printed_on_fake_devices

from qsharp_jax import cli
from qsharp_jax.run import config as configs

MESH = ["--mesh=cpu", "--config.mesh.devices_per_host=8", "--config.mesh.decode.data=4", "--config.mesh.decode.tensor=2"]


def commands(ref: str, guide: str, folder: str, mesh: list[str]) -> list[int]:
    """Generate, and score what was generated; return the exit codes."""
    models, name = ["--ref", ref, "--guide", guide, "--dtype=float32"], "mesh" if mesh else "one"
    generated = f"{folder}/{name}.jsonl"
    settings = ["--eta=0.1", "--samples=3", "--max-new-tokens=8", "--prompt-format=plain", f"--output={generated}"]
    scored = [f"--input={folder}/one.jsonl", f"--output={folder}/{name}_scored.jsonl", "--prompt-format=plain"]
    return [
        cli.main(["generate", *models, *mesh, *settings, "How many eggs?", "Sam"]),
        cli.main(["score", *models, *mesh, *scored]),
    ]


if __name__ == "__main__":
    print(json.dumps(commands(*sys.argv[1:], MESH)))


def test_responses_and_scores_on_a_mesh_are_those_of_one_device(models, tmp_path):
    paths = [*map(str, (*models, tmp_path))]
    assert commands(*paths, []) == [0, 0]
    assert printed_on_fake_devices(__file__, *paths)[0] == [0, 0]

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


def test_a_mesh_is_a_preset_for_the_devices_here():
    assert "there is no mesh 'cuda_9'" in refusal(configs.mesh_section, "cuda_9", [])
    assert "there is no setting --config.fit.epochs" in refusal(configs.mesh_section, "cpu", ["--config.fit.epochs=2"])
    assert configs.mesh_section("cpu", MESH[1:]).decode.tensor == 2
