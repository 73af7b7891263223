"""Loggers keep every number of a run, by phase and step, and go on in the same run after a resume.

What Weights & Biases and MLflow have written without a network is read by their own packages, where these are installed:
`pip install wandb mlflow-skinny`.
"""

import json
import struct

import pytest
from commands import CONFIG, SMALL, refused
from helpers import refusal
from ml_collections import ConfigDict

from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system import loggers

LINES = [
    {"phase": "round 1: collect", "rollouts": 24, "reward": 0.375, "no": None, "text": "x", "truth": True},
    {"phase": "round 1: fit", "step": 10, "loss": 0.5},
    {"phase": "round 1: fit", "step": 20, "loss": 0.25},
]
NUMBERS = {
    "round_1_collect/rollouts": [(0, 24)],
    "round_1_collect/reward": [(0, 0.375)],
    "round_1_fit/loss": [(10, 0.5), (20, 0.25)],
}


def write(folder, name):
    """A run that is resumed before its last line."""
    for lines in (LINES[:2], LINES[2:]):
        with Workdir.open(folder, ConfigDict({"seed": 3, "fit": {"epochs": 2}, "loggers": [name]})) as workdir:
            for line in lines:
                workdir.append_metrics(line)


class Own:
    def __init__(self):
        self.lines, self.closed = [], 0

    def log(self, phase, step, numbers):
        self.lines.append((phase, step, numbers))

    def close(self):
        self.closed += 1


def without_login(workdir, config):
    raise RuntimeError("no API key\nlog in")


def test_an_object_of_the_user_s_own_gets_the_numbers_and_is_closed(tmp_path):
    own = Own()
    with Workdir.open(tmp_path, ConfigDict({"seed": 3, "loggers": []})) as workdir:
        workdir.loggers = [own]
        for line in LINES:
            workdir.append_metrics(line)
    assert own.lines == [
        ("round 1: collect", 0, {"rollouts": 24, "reward": 0.375}),
        ("round 1: fit", 10, {"loss": 0.5}),
        ("round 1: fit", 20, {"loss": 0.25}),
    ]
    assert own.closed == 1 and not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_may_have_other_loggers(tmp_path):
    for names in (["tensorboard"], []):
        with Workdir.open(tmp_path, ConfigDict({"seed": 3, "loggers": names})) as workdir:
            workdir.append_metrics(LINES[1])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    assert "config.loggers has wandb, but the package is not installed" in refusal(loggers.check, ["wandb"])


def test_a_logger_that_does_not_start_is_one_sentence_and_the_others_are_closed(tmp_path, monkeypatch):
    first = Own()
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda workdir, config: first)
    monkeypatch.setitem(loggers.LOGGERS, "wandb", without_login)
    with Workdir.open(tmp_path, ConfigDict({"seed": 3, "loggers": ["tensorboard", "wandb"]})) as workdir:
        sentence = refusal(workdir.start_loggers)
        assert sentence.startswith("config.loggers has wandb, which does not start (no API key); ")
        assert first.closed == 1
        Workdir.attach(tmp_path).start_loggers()  # which writes nothing, so it has none
    assert first.closed == 1


def test_a_run_whose_logger_does_not_start_computes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", without_login)
    sentence = refused(capsys, "run", "--config", CONFIG, "--workdir", tmp_path, *SMALL)
    assert "config.loggers has tensorboard, which does not start (no API key)" in sentence
    assert not (tmp_path / "ref").exists()


def test_mlflow_keeps_the_settings_that_a_run_began_with(tmp_path, monkeypatch):
    """A resumed run has other loggers and another mesh."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for names, mesh in ((["mlflow"], "single"), (["tensorboard", "mlflow"], "cpu")):
        with Workdir.open(tmp_path, ConfigDict({"seed": 3, "mesh": {"name": mesh}, "loggers": names})) as workdir:
            workdir.append_metrics(LINES[1])
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("qsharp_jax").experiment_id])
    assert run.data.params == {"seed": "3", "mesh.name": "single", "loggers": "['mlflow']"}


def test_mlflow_keeps_metrics_and_settings(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write(tmp_path, "mlflow")
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("qsharp_jax").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["fit.epochs"] == "2"
    assert {*run.data.metrics} == {*NUMBERS}
    for name, numbers in NUMBERS.items():
        assert [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)] == numbers


def records(path):
    """Yield the records of a file of `wandb`: 7 bytes, then each after its sum (4 bytes), length (2) and kind (1)."""
    data, at = path.read_bytes(), 7
    while at < len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        assert kind == 1, "whole, as small ones are"
        yield data[at + 7 : at + 7 + length]
        at += 7 + length


def test_wandb_keeps_metrics_and_settings_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, "wandb")
    history, names = {}, set()
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for content in records(path):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.HasField("run"):
                names.add((record.run.run_id, record.run.project))
            if record.HasField("history"):
                line = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                for name in NUMBERS.keys() & line.keys():
                    history.setdefault(name, []).append((line[f"{name.partition('/')[0]}/step"], line[name]))
    assert history == NUMBERS and len(names) == 1 and names.pop()[1] == "qsharp_jax"
