"""Several processes on one run: how they meet, how one's end ends all, and that they do what one process does.

The processes are this file run as a script, or the command line, with two fake devices each.
"""

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import free_port, start
from repository import ROOT

from qsharp_jax import rollouts
from qsharp_jax.data.records import read_rounds
from qsharp_jax.models import config as model_configs
from qsharp_jax.models import decoder, meshes, sharding, value
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.run import config as configs
from qsharp_jax.sampling import Sampling
from qsharp_jax.system import multihost
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.multihost import Place, find_place

# --- In the other processes -----------------------------------------------------------------------------------------


def main(port: int, index: int, act: str) -> None:
    """Meets the other, and then does what `act` says: `kill 1` is that process 1 is killed, and so on."""

    def explain(error):
        return 2, str(error)

    with multihost.joined(Place("localhost", port, 2, index), 200, explain):
        rows = {"x": np.full((index, 2), 1 / 3), "n": np.arange(index) + 2**40} if index else {}
        print({name: array.tolist() for name, array in multihost.gather_rows(rows).items()}, flush=True)
        print(multihost.gather([index, {"of": index}]), multihost.share(range(5)), flush=True)
        print(multihost.gather([index], hosts_per_group=2), multihost.share(range(5), hosts_per_group=2), flush=True)
        what, _, who = act.partition(" ")
        if act == "decode together":
            print(json.dumps(decoded()), flush=True)
            return
        if what == "kill" and index == int(who):
            os.kill(os.getpid(), 9)
        if what == "refuse" and index == int(who):
            raise UserError("the disk is full")
        if what != "end":
            time.sleep(200)


def decoded() -> dict[str, list]:
    """Responses of a random model under a random guide, on all devices of all processes."""
    shape = model_configs.make("tiny", vocab_size=30, layers=1, embed=32, mlp=64)
    guide_shape = ValueConfig(shape)
    ref = LanguageModel(decoder.init(jax.random.key(0), shape), shape)
    guide = ValueModel(value.init(jax.random.key(1), guide_shape), guide_shape)
    here = dict(hosts=jax.process_count(), devices_per_host=jax.local_device_count())
    decode = dict(data=jax.process_count(), attention_data=1, tensor=jax.local_device_count())
    preset = configs.presets(ROOT / "configs" / "arithmetic.py")["cpu"] | here | dict(decode=decode)
    mesh = meshes.preset_mesh(preset, "decode")
    ref, guide = (sharding.move(model, mesh, sharding.DECODE) for model in (ref, guide))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        found = rollouts.sample(
            ref, guide, [[3 + n, 7, *range(n)] for n in range(9)],
            Sampling(eta=0.05, max_new_tokens=10, top_k_candidates=5, stop_ids=(1,)),
            samples=2, seeds=np.arange(18), batch_size=4,
        )  # fmt: skip
    return {name: getattr(found, name).tolist() for name in ("tokens", "lengths", "kl", "log_probs")}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])


# --- Here -----------------------------------------------------------------------------------------------------------


def both(act: str) -> list[tuple[int, str, str]]:
    """Of each process its exit code, output and errors, and the second's pid in place of ours."""
    port = free_port()
    started = [start(__file__, str(port), str(index), act) for index in range(2)]
    return [(*reversed([process.pid, *process.communicate(timeout=240), process.returncode]),) for process in started]


def test_two_processes_meet_share_and_end():
    for index, (code, errors, output, _) in enumerate(both("end")):
        assert code == 0, errors
        shares = ["range(0, 2)", "range(2, 5)"]
        rows, apart, together = output.splitlines()[-3:]
        assert rows == f"{{'x': [[{1 / 3}, {1 / 3}]], 'n': [{2**40}]}}", "in 64 bits, and only one process had any"
        assert apart == f"[0, {{'of': 0}}, 1, {{'of': 1}}] {shares[index]}"
        assert together == "[0] range(0, 5)"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other_with_its_name(victim):
    found = both(f"kill {victim}")
    code, errors, _, _ = found[1 - victim]
    assert found[victim][0] == -9
    assert code == 2
    name = f"process 1 (pid {found[1][3]} on {socket.gethostname()})" if victim else "process 0 on localhost"
    assert f"qsharp: {name} has died" in errors
    assert "Traceback" not in errors


def test_a_process_that_refuses_to_go_on_ends_the_other_with_its_words():
    first, second = both("refuse 1")
    assert second[:1] == first[:1] == (2,)
    assert second[1].strip().endswith("qsharp: the disk is full")
    assert f"process 1 (pid {second[3]} on {socket.gethostname()}) has ended: the disk is full" in first[1]


@pytest.mark.slow
def test_two_processes_decode_as_one_where_one_cannot_hold_the_model():
    """On a mesh of the devices of both, rows over the processes and heads within each: what a single device gives."""
    expected = decoded()
    for code, errors, output, _ in both("decode together"):
        assert code == 0, errors
        found = json.loads(output.splitlines()[-1])
        assert found["tokens"] == expected["tokens"] and found["lengths"] == expected["lengths"]
        for name in ("kl", "log_probs"):
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4)


def command(*words: str, index: int | None = None, port: int | None = None, **options) -> subprocess.Popen:
    several = [] if index is None else [
        "--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(index)
    ]  # fmt: skip
    return start("-m", "qsharp_jax.cli", *words, *several, **options)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (
            1,
            "the coordinator localhost:{port} could not be reached within 1 s (.*); make sure that process 0 runs",
        ),
        (0, "of 2 processes 1 did not come to port {next} within 1 s; make sure that they were started"),
    ],
)
def test_one_that_waits_in_vain_says_for_what(tmp_path, index, sentence):
    port = free_port()
    process = command(
        "run", "--config", "configs/star_graph.py", "--workdir", str(tmp_path / "run"), "--coordinator-timeout", "1",
        index=index, port=port,
    )  # fmt: skip
    output, errors = process.communicate(timeout=200)
    assert (process.returncode, output) == (2, "")
    [line] = errors.splitlines()
    first, _, last = sentence.format(port=port, next=port + 1).partition("(.*)")
    assert line.startswith(f"qsharp: {first}")
    assert last in line
    assert not (tmp_path / "run").exists()


def test_places():
    assert find_place("gpu1:8476", 4, 3) == Place("gpu1", 8476, 4, 3)
    for coordinator in ("gpu1", "gpu1:", ":80", "gpu1:x", "gpu1:70000"):
        with pytest.raises(UserError, match="give HOST:PORT of the first process, tpu or slurm"):
            find_place(coordinator, 2, 0)
    for count, index in ((None, 0), (2, None), (2, 2)):
        with pytest.raises(UserError, match="needs --processes N, and --process I from 0 to N - 1"):
            find_place("gpu1:80", count, index)
    with pytest.raises(UserError, match="not for slurm"):
        find_place("slurm", 2, 0)


def test_slurm_tells_the_place(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[3-4]" ] && printf "gpu3\\ngpu4\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, text in {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "gpu[3-4]", "SLURM_JOB_ID": "20007"
    }.items():  # fmt: skip
        monkeypatch.setenv(name, text)
    assert find_place("slurm", None, None) == Place("gpu3", 20014, 2, 1)
    monkeypatch.delenv("SLURM_PROCID")
    with pytest.raises(UserError, match="finds no SLURM step around it .*; start it with srun"):
        find_place("slurm", None, None)


@pytest.fixture
def metadata(monkeypatch):
    """A stand-in for the TPU VM's metadata server: the attributes that it is to give."""
    attributes: dict[str, str] = {}

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            found = name in attributes and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode())

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("localhost", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
        yield attributes
        server.shutdown()


def test_tpu_metadata_tells_the_place(metadata, monkeypatch):
    metadata |= {"worker-network-endpoints": "a:1:10.0.0.5,b:2:10.0.0.6", "agent-worker-number": "1"}
    assert find_place("tpu", None, None) == Place("10.0.0.5", 8476, 2, 1)
    # The second of three slices of two hosts.
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "3")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "1")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "10.0.0.1:8080")
    assert find_place("tpu", None, None) == Place("10.0.0.1", 8476, 6, 3)
    metadata["worker-network-endpoints"] = "10.0.0.5,10.0.0.6"  # as newer TPU VMs have it
    assert find_place("tpu", None, None) == Place("10.0.0.1", 8476, 6, 3)
    del metadata["agent-worker-number"]
    with pytest.raises(UserError, match="finds no TPU VM's metadata here"):
        find_place("tpu", None, None)


def test_tpu_metadata_tells_the_slice_where_the_environment_does_not(metadata, monkeypatch):
    """A shell by ssh on a TPU VM has none of the variables; they are lines of an attribute."""
    for name in ("NUM_SLICES", "SLICE_ID", "COORDINATOR_ADDRESS"):
        monkeypatch.delenv(f"MEGASCALE_{name}", raising=False)
    metadata |= {"worker-network-endpoints": "a:1:10.0.0.5,b:2:10.0.0.6", "agent-worker-number": "1"}
    metadata["tpu-env"] = (
        "ACCELERATOR_TYPE: 'v5litepod-8'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'\n"
        "MEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\nno value\n"
    )
    assert find_place("tpu", None, None) == Place("10.0.0.1", 8476, 6, 5)
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "1")
    assert find_place("tpu", None, None) == Place("10.0.0.1", 8476, 6, 3)
    monkeypatch.delenv("MEGASCALE_SLICE_ID")
    metadata["tpu-env"] = "MEGASCALE_COORDINATOR_ADDRESS: ''\nMEGASCALE_NUM_SLICES: ''\nMEGASCALE_SLICE_ID: ''"
    assert find_place("tpu", None, None) == Place("10.0.0.5", 8476, 2, 1)
    metadata["tpu-env"] = "ACCELERATOR_TYPE: 'v5litepod-8'"
    assert find_place("tpu", None, None) == Place("10.0.0.5", 8476, 2, 1)


SMALL = (
    "--config.task.degree=2", "--config.task.path_length=3", "--config.task.num_nodes=6", "--config.model.size=tiny",
    "--config.model.token_shift=False", "--config.model.positions=rope",  # so that it can be exported
    "--config.pretrain.steps=30", "--config.pretrain.batch_size=16", "--config.pretrain.log_every=1",
    "--config.generate.max_new_tokens=7", "--config.generate.top_k_candidates=4", "--config.rounds=2",
    "--config.collect.prompts=24", "--config.collect.samples=2", "--config.collect.batch_size=16",
    "--config.collect.shard_rows=12", "--config.fit.epochs=2", "--config.fit.batch_size=16", "--config.fit.holdout=0.2",
    "--config.fit.log_every=1", "--config.evaluate.problems=9", "--config.evaluate.batch_size=16",
    "--config.evaluate.samples=2", "--config.evaluate.etas=0.1", "--config.mesh=cpu", "--config.mesh.fit.data=2",
    "--config.mesh.fit.fsdp=2",
)  # fmt: skip
ONE = ("--config.mesh.devices_per_host=4", "--config.mesh.decode.data=4")
TWO = ("--config.mesh.hosts=2", "--config.mesh.devices_per_host=2", "--config.mesh.decode.data=2")
TOGETHER = ("--config.mesh.decode.tensor=2",)  # with TWO: on the devices of both processes


def files(workdir: Path) -> list[str]:
    """But for the programs and what Orbax makes of the checkpoints."""
    found = [path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()]
    return sorted(str(path) for path in found if path.parts[0] not in ("programs", "ref", "guide", "tensorboard"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_one", "of_two"),
    [((), ()), (("--config.mesh.decode.data=2", *TOGETHER), TOGETHER)],
    ids=["decoding apart", "decoding together"],
)
def test_two_processes_do_what_one_does(tmp_path, of_one, of_two):
    """The short job by one process with four devices, and by two with two each; then one machine takes the guide.

    The two decode each for itself, and then both together.
    """
    run = ("run", "--config", "configs/star_graph.py", *SMALL)
    one = command(*run, *ONE, *of_one, "--workdir", str(tmp_path / "one"), devices=4)
    output, errors = one.communicate()
    assert one.returncode == 0, errors
    port = free_port()
    two = [command(*run, *TWO, *of_two, "--workdir", str(tmp_path / "two"), index=i, port=port) for i in range(2)]
    outputs = [process.communicate() for process in two]
    assert [process.returncode for process in two] == [0, 0], outputs
    assert [line for line in outputs[1][0].splitlines() if not line.startswith("[Gloo]")] == []  # which XLA prints
    assert "report.md" in outputs[0][0]

    assert files(tmp_path / "one") == files(tmp_path / "two")
    for number in (1, 2):
        rollouts = [read_rounds(tmp_path / name / "rollouts", [number]) for name in ("one", "two")]
        assert rollouts[0] == rollouts[1]
    losses = []
    for name in ("one", "two"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([(row["phase"], row["step"], row["loss"]) for row in rows if "loss" in row])
    assert [loss[:2] for loss in losses[0]] == [loss[:2] for loss in losses[1]]
    np.testing.assert_allclose([loss[2] for loss in losses[0]], [loss[2] for loss in losses[1]], atol=1e-5)

    out = tmp_path / "guide"
    export = command(
        "export", "--workdir", str(tmp_path / "two"), "--what", "guide", "--out", str(out), "--config.mesh=single",
        devices=1,
    )  # fmt: skip
    output, errors = export.communicate()
    assert export.returncode == 0, errors
    assert (out / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_sigterm_to_one_ends_both_at_one_step_with_code_0(tmp_path):
    """What a pre-emption does; that a run goes on from such a checkpoint, on other meshes too, is tested elsewhere."""
    workdir, port = tmp_path / "run", free_port()
    run = ("run", "--config", "configs/star_graph.py", *SMALL, *TWO, "--workdir", str(workdir))
    two = [command(*run, "--config.pretrain.steps=5000", index=i, port=port) for i in range(2)]
    while not (workdir / "metrics.jsonl").exists() and all(process.poll() is None for process in two):
        time.sleep(0.1)
    two[1].terminate()
    outputs = [process.communicate(timeout=240) for process in two]
    assert [process.returncode for process in two] == [0, 0], outputs
    for _, errors in outputs:
        assert errors.count("qsharp: stopped by SIGTERM; run the same command again to resume") == 1
    [step] = [int(path.name) for path in (workdir / "ref").iterdir() if path.name.isdecimal()]
    assert 0 < step < 5000
    assert step % 8 == 0
