"""Loggers: where the numbers of a run go besides metrics.jsonl.

`config.loggers` names some of `LOGGERS`; `train_guide` takes objects of the user's own, with the members of `Logger`.
"""

import importlib
import importlib.util
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qsharp_jax.system import files
from qsharp_jax.system.errors import UserError, first_line
from qsharp_jax.system.tensorboard import EventFiles, folder_name


class Logger(Protocol):
    """The members of a logger."""

    def log(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of a step of a phase, such as "round 1: fit"; a step may come again after a resume."""

    def close(self) -> None:
        """End; nothing is logged after it."""


class WeightsAndBiases:
    """A run of `wandb`, in the folder `wandb` of the workdir; a resumed run goes on in it.

    WANDB_PROJECT (by default qsharp_jax), WANDB_MODE=offline and the other variables of `wandb` work as usual.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        import wandb

        identifier = _identifier(workdir, "wandb", lambda: secrets.token_hex(8))
        project = os.environ.get("WANDB_PROJECT", "qsharp_jax")
        self._run = wandb.init(
            project=project, name=workdir.name, id=identifier, resume="allow", dir=workdir, config=dict(config)
        )
        self._phases: set[str] = set()

    def log(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        name = folder_name(phase)
        if name not in self._phases:  # steps of wandb itself only grow; those of a phase begin anew
            self._run.define_metric(f"{name}/*", step_metric=f"{name}/step")
            self._phases.add(name)
        self._run.log({f"{name}/step": step} | {f"{name}/{key}": number for key, number in numbers.items()})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of `mlflow`, by default in the folder `mlruns` of the workdir; a resumed run goes on in it.

    MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME (by default qsharp_jax) work as usual.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        from mlflow import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI")
        if not place:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 writes files only where it is set
            place = (workdir.absolute() / "mlruns").as_uri()
        self._client = MlflowClient(place)
        self._id = _identifier(workdir, "mlflow", lambda: self._create(workdir.name, config))
        self._client.update_run(self._id, status="RUNNING")

    def _create(self, name: str, config: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "qsharp_jax")
        known = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if known is None else known.experiment_id
        run = self._client.create_run(number, run_name=name).info.run_id
        # Only here: MLflow refuses changed values, and a resumed run may have other loggers and another mesh.
        params = [Param(key, str(value)) for key, value in _flat(config).items()]
        for begin in range(0, len(params), 100):  # as many as a call may have
            self._client.log_batch(run, params=params[begin : begin + 100])
        return run

    def log(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        name, now = folder_name(phase), int(time.time() * 1000)
        metrics = [Metric(f"{name}/{key}", number, now, step) for key, number in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


LOGGERS: dict[str, Callable[[Path, Mapping[str, Any]], Logger]] = {
    "tensorboard": lambda workdir, config: EventFiles(workdir / "tensorboard"),
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
DEFAULT = ("tensorboard",)


def check(names: Sequence[str]) -> None:
    """Raise a UserError for a logger whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f'config.loggers has {name}, but the package is not installed; install it by pip install "{name}", or'
                " leave it out"
            )


def make(name: str, workdir: Path, config: Mapping[str, Any]) -> Logger:
    """Return the logger of a name for the run in a workdir with these settings; a UserError if it does not start."""
    if name != "tensorboard" and files.is_remote(workdir):
        raise UserError(f"config.loggers has {name}, which needs a workdir on a disk; {workdir} is in a bucket")
    try:
        return LOGGERS[name](workdir, config)
    except Exception as error:  # of the packages: no login, an unreachable server, a read-only disk
        raise UserError(
            f"config.loggers has {name}, which does not start ({first_line(error)}); check its login and server,"
            " or leave it out"
        ) from error


def _identifier(workdir: Path, name: str, create: Callable[[], str]) -> str:
    """Return the name of a workdir's run in a logger, created once."""
    path = workdir / "loggers.json"
    stored = json.loads(files.read_text(path)) if files.is_file(path) else {}
    if name not in stored:
        stored[name] = create()
        files.write_atomic(path, json.dumps(stored) + "\n")
    return stored[name]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
