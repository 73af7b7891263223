"""A run's folder, on a disk or in a bucket: its paths, its config, its metrics, and its lock."""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from qsharp_jax.run import schema
from qsharp_jax.run.config import differences, from_json, to_json
from qsharp_jax.system import files, loggers
from qsharp_jax.system import lock as locks
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.lock import Lock
from qsharp_jax.system.loggers import Logger

MEASURING = ("evaluate", "generate", "mesh", "loggers")  # sections that may differ in a measurement of a run's models


@dataclasses.dataclass
class Workdir:
    """The paths of a workdir and the config of its run.

    `Workdir.open` also takes the lock, until `close` or the end of a `with`. Of several processes the first opens it,
    and the others `attach`: they write nothing that exists once (`writes` is false).
    """

    path: Path
    config: ConfigDict
    writes: bool = True
    ref_in: str | None = None  # name of the sibling workdir that has its reference; None: its own
    of: Path | None = None  # the workdir whose models are measured in this one; None: its own
    date: datetime.date = dataclasses.field(default_factory=datetime.date.today)  # of prompts that write it
    loggers: Sequence[Logger] = ()  # of the user's own, besides those of the config
    _lock: Lock | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: ConfigDict | None = None,
        *,
        ref_in: str | None = None,
        date: datetime.date | None = None,
        of: Path | None = None,
    ) -> "Workdir":
        """Open the workdir for this process alone, creating it if it is new; without a config the stored one is used.

        A new workdir may permanently use the reference of its sibling `ref_in`, or, to measure them, all models of the
        workdir `of`, with its date and the hashes of its inputs. A run may be resumed with another `mesh` and other
        `loggers`, for as long as this process has it open. A run whose prompts are chats keeps its `date`, by default
        the day that it began, since chat templates may write it.

        Raises:
          UserError: if `path` is a file, cannot be reached, has no config and none is given, is in use by another
            process, or holds a run with other settings, or of other models than those in `of`.
          OSError: if it cannot be written.
        """
        path = files.make_path(path)
        stored = path / "config.json"
        if config is None:
            check_is_workdir(path)
        if not files.is_remote(path):  # a bucket has no folders to make
            try:
                (path / "samples").mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise UserError(
                    f"{path} cannot be a folder, since a file is in the way; give another --workdir"
                ) from None
        lock = locks.take(path)
        try:
            if not files.is_file(stored):
                settings = to_json(config) | ({} if ref_in is None else {"ref_in": ref_in})
                settings |= {} if of is None else _of_measured(of)
                files.write_atomic(stored, json.dumps(settings, indent=2) + "\n")
            content = _read_config(stored)
            run_date = content.date
            if run_date is None and content.config.get("prompt_format") == "chat":
                run_date = date or datetime.date.today()
                settings = _read_json(stored) | {"date": run_date.isoformat()}
                files.write_atomic(stored, json.dumps(settings, indent=2) + "\n")
            if of is not None and content.of != files.absolute(of):
                what = "is a run of its own" if content.of is None else f"holds measurements of {content.of}"
                raise UserError(f"{path} {what}; give another --workdir")
            if config is not None and (differing := differences(content.config, config, but=("mesh", "loggers"))):
                training = differences(content.config, config, but=MEASURING)
                hint = "" if training or content.of else f", or measure it with these: qsharp evaluate --of {path}"
                raise UserError(
                    f"{path} holds a run with other settings (stored -> given: {'; '.join(differing)}); "
                    f"give another --workdir, or the same settings{hint}"
                )
        except BaseException:
            lock.release()
            raise
        settings = content.config if config is None else config
        date = run_date or datetime.date.today()
        return cls(path, settings, ref_in=content.ref_in, of=content.of, date=date, _lock=lock)

    @classmethod
    def attach(cls, path: str | Path, config: ConfigDict | None = None) -> "Workdir":
        """Return the workdir that another process of the same run has open."""
        path = files.make_path(path)
        stored = _read_config(path / "config.json")
        settings, date = stored.config if config is None else config, stored.date or datetime.date.today()
        return cls(path, settings, writes=False, ref_in=stored.ref_in, of=stored.of, date=date)

    def read_hashes(self) -> dict[str, Any]:
        """Return the hashes of the run's inputs, stored beside the settings; see `provenance.py`."""
        return _read_json(self.path / "config.json").get("hashes", {})

    def write_hashes(self, hashes: dict[str, Any]) -> None:
        stored = self.path / "config.json"
        files.write_atomic(stored, json.dumps(_read_json(stored) | {"hashes": hashes}, indent=2) + "\n")

    def read_distribution(self) -> tuple[str, tuple[float, ...]] | None:
        """Return the distribution and atoms that were chosen by the rewards of round 1; None if none were."""
        if not files.is_file(self.distribution):
            return None
        stored = _read_json(self.distribution)
        return stored["distribution"], tuple(stored["atoms"])

    def write_distribution(self, distribution: str, atoms: tuple[float, ...]) -> None:
        stored = {"distribution": distribution, "atoms": atoms}
        files.write_atomic(self.distribution, json.dumps(stored, indent=2) + "\n")

    def close(self) -> None:
        try:
            for logger in self.__dict__.get("_loggers", ()):  # unless nothing was logged
                logger.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    @property
    def _models(self) -> Path:
        return self.of or self.path

    @property
    def ref(self) -> Path:
        return (self._models.parent / self.ref_in if self.ref_in else self._models) / "ref"

    @property
    def guide(self) -> Path:
        return self._models / "guide"

    @property
    def distribution(self) -> Path:
        return self._models / "value.json"

    def rollouts(self, round: int) -> Path:
        return self.path / "rollouts" / f"round_{round}"

    def guide_folder(self, round: int) -> Path:
        """Return the folder of the checkpoints of a round's guide or policy."""
        return self.guide / f"round_{round}"

    def collected_rounds(self) -> int:
        """Return how many rounds, from the first on, have rollouts."""
        rounds = range(1, self.config.rounds + 1)
        return sum(1 for _ in itertools.takewhile(lambda n: any(self.rollouts(n).glob("shard-*.parquet")), rounds))

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def profile(self, phase: str) -> Path:
        return self.path / "profile" / phase

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @functools.cached_property
    def _metrics(self) -> files.Growing:
        return files.Growing(self.metrics)

    @functools.cached_property
    def _loggers(self) -> list[Logger]:
        names, settings = self.config.get("loggers", loggers.DEFAULT), to_json(self.config)
        started: list[Logger] = []
        with contextlib.ExitStack() as stack:  # closes those that started where another one does not
            for name in names:
                started.append(loggers.make(name, self.path, settings))
                stack.callback(started[-1].close)
            stack.pop_all()
        return [*started, *self.loggers]

    def start_loggers(self) -> None:
        """Start the loggers, which otherwise start at the first metrics; a UserError names one that does not."""
        if self.writes:
            _ = self._loggers

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Append one JSON line, NaN and infinity as null, and give its numbers to the loggers.

        Raises:
          UserError: if another process has taken over the workdir.
          OSError: naming the file, if it cannot be written.
        """
        if not self.writes:
            return
        metrics = _finite(metrics)
        if self._lock is not None:
            self._lock.check()
        self._metrics.append_line(json.dumps(metrics, allow_nan=False))
        phase, step = metrics.get("phase", ""), metrics.get("step", 0)
        numbers = {name: x for name, x in metrics.items() if name != "step" and type(x) in (int, float)}
        for logger in self._loggers:
            logger.log(phase, step, numbers)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all metrics so far, without a half line that a kill left; a UserError names a damaged line."""
        if not files.is_file(self.metrics):
            return []
        lines = files.whole_lines(self.metrics.read_bytes()).splitlines()
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise UserError(f"{self.metrics}, line {number}, is damaged; delete that line") from None
        return rows


def stored_config(path: Path) -> ConfigDict | None:
    """Return the settings of the run in a folder; None if it holds no run."""
    stored = path / "config.json"
    return _read_config(stored).config if files.is_file(stored) else None


def check_is_workdir(path: Path) -> None:
    """Raise a UserError if a folder holds no run."""
    if not files.is_file(path / "config.json"):
        raise UserError(f"{path} is not a workdir: it has no config.json; give a run's --workdir, or a --config")


class _Stored(NamedTuple):
    """The content of config.json."""

    config: ConfigDict
    ref_in: str | None
    date: datetime.date | None  # of the prompts
    of: Path | None


def _read_config(path: Path) -> _Stored:
    stored = _read_json(path)
    settings = {name: item for name, item in stored.items() if name not in ("hashes", "ref_in", "date", "of")}
    try:
        date = datetime.date.fromisoformat(stored["date"]) if "date" in stored else None
    except (TypeError, ValueError):
        raise UserError(f"{path} has the date {stored['date']!r}; write it as YYYY-MM-DD") from None
    if "algorithm" in settings:
        settings = _with_defaults(settings, to_json(schema.default_config()))
    of = files.make_path(stored["of"]) if "of" in stored else None
    return _Stored(from_json(settings), stored.get("ref_in"), date, of)


def _of_measured(of: Path) -> dict[str, Any]:
    """Return what the workdir of a measurement takes from that of the run, beside settings."""
    stored = _read_json(of / "config.json")
    hashes = {name: item for name, item in stored.get("hashes", {}).items() if name != "test problems"}
    kept = {name: stored[name] for name in ("ref_in", "date") if name in stored}
    return kept | {"hashes": hashes, "of": str(files.absolute(of))}


def _with_defaults(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Add the settings that are newer than a run, to the sections that it has; defaults leave all as it was before."""
    filled = dict(settings)
    for name, default in defaults.items():
        if not isinstance(default, dict):
            filled.setdefault(name, default)
        elif isinstance(settings.get(name), dict):
            filled[name] = _with_defaults(settings[name], default)
    return filled


def _read_json(path: Path) -> dict:
    content = path.read_bytes()  # outside `try`: reading from a bucket may raise a ValueError too
    try:
        plain = json.loads(content)
        if not isinstance(plain, dict):
            raise ValueError("it holds no settings")
        return plain
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}); repair it, or give another --workdir") from None


def _finite(value: Any) -> Any:
    """Return `value` as strict JSON has it; a NumPy or JAX scalar becomes a Python number."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
