"""`train_guide`: Algorithm 1 with a model in memory and a Python function as reward, in a workdir that resumes."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qsharp_jax.algorithms.registry import ALGORITHMS
from qsharp_jax.evaluation import forecast
from qsharp_jax.experiments import export, opening, pipeline
from qsharp_jax.models.value import ValueModel
from qsharp_jax.notebook.guides import Guide
from qsharp_jax.notebook.inputs import Prompts, Reward, to_functions, to_rows
from qsharp_jax.run import checks, models, own, problems, provenance
from qsharp_jax.run import config as configs
from qsharp_jax.run.folders import Loaded
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.sampling import Sampling
from qsharp_jax.system import files, sigterm
from qsharp_jax.system.errors import Stopped, UserError, warn
from qsharp_jax.system.loggers import Logger
from qsharp_jax.tasks.rewards import OBJECT, name_of

PROMPTS = "prompts.jsonl"  # in the workdir: prompts that were given as a list


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished training of a guide.

    Attributes:
      workdir: its folder, which `qsharp generate`, `score` and `export` take too.
      guide: the guide of the last round.
      held_out: the prompts that nothing was learned from, with their columns, for `evaluate`.
      sampling: the run's settings of decoding, with its eta, for `generate` and `evaluate`.
      forecast: reward and KL of the guide at each eta, forecast from held-out rollouts of the reference.
      metrics: the lines of metrics.jsonl.
      config: all settings.
    """

    workdir: Path
    guide: Guide
    held_out: list[dict[str, Any]] = dataclasses.field(repr=False)
    sampling: Sampling = dataclasses.field(repr=False)
    forecast: list[dict[str, Any]] = dataclasses.field(repr=False)
    metrics: list[dict[str, Any]] = dataclasses.field(repr=False)
    config: ConfigDict = dataclasses.field(repr=False)


def train_guide(
    ref: Loaded,
    prompts: Prompts,
    reward: Reward | Sequence[Reward],
    *,
    workdir: str | Path,
    eta: float = 0.1,
    weights: Sequence[float] | None = None,
    config: Mapping[str, Any] | None = None,
    loggers: Sequence[Logger] = (),
) -> Run:
    """Learn a guide for a reference from a reward, by rounds of rollouts and fits.

    One prompt in five, chosen by a hash of it, is held out. Settings that depend on the model's size and the device are
    chosen and printed. After an interrupt the same call goes on where it stopped, also in another process; a finished
    run is read. The workdir keeps a hash of the reward's source, and refuses another one, but not the function: the
    command line cannot go on with it.

    Args:
      ref: what `load` returns.
      prompts: texts, chats, or dicts with a "prompt" and other columns; or a file of them.
      reward: called in this process with one response at a time, as `reward(prompts=[...], completions=[...], ...)`;
        it returns a list of one number, or None. A list of functions for the sum of them.
      workdir: folder of everything that is computed.
      eta: weight of the KL to the reference, at which later rounds roll in.
      weights: of several rewards in their sum; by default 1 each.
      config: further settings, such as {"rounds": 1, "fit.epochs": 2}, as in docs/config.md.
      loggers: objects that get the numbers of every step, besides those that the setting `loggers` names.

    Raises:
      UserError: for settings, prompts or a workdir that do not go together, each with what to do.
      KeyboardInterrupt: after an interrupt, when what was done is saved.
    """
    functions, folder = to_functions(reward), files.make_path(workdir)
    names = [f"{OBJECT}:{name_of(function)}" for function in functions]
    weights = [1.0] * len(functions) if weights is None else list(weights)
    changes = {
        "collect.eta": eta,
        "dtype": ref.ref.config.dtype,
        "quantize": ref.ref.config.quantize,
        "task.weights": weights,
        "task.reward_workers": 0,
    } | dict(config or {})
    named = own.OwnRun(
        ref=ref.source,
        prompts=str(prompts) if isinstance(prompts, str | Path) else str(_store(folder, to_rows(prompts))),
        rewards=names,
        prompt_format=ref.tokenizer.prompt_format,
    )
    settings = own.load(
        named, folder, [f"--config.{key}={_word(value)}" for key, value in changes.items()],
        change_by="config={'KEY': VALUE}",
    )  # fmt: skip
    if configs.trains_policy(settings):
        raise UserError(f"{settings.algorithm} trains a policy and no guide; run it by `qsharp run`")
    opening.check(settings, folder, own.RECIPE, functions)
    try:
        with sigterm.interrupts(), Workdir.open(folder, settings) as opened:
            opened.loggers = loggers
            provenance.check_folders(opened)
            checks.check_loggers(opened)
            session = Session(opened, rewards=functions)
            guide = pipeline.run(session, ref.ref, evaluate=False)
            assert isinstance(guide, ValueModel)  # as the algorithm learns a guide
            return _finished(session, ref, guide)
    except (Stopped, KeyboardInterrupt):
        warn("interrupted; the same call of train_guide goes on")
        raise KeyboardInterrupt from None


def _finished(session: Session, ref: Loaded, model: ValueModel) -> Run:
    config, workdir = session.config, session.workdir
    mode, eta = ALGORITHMS[config.algorithm].mode(config), configs.kl_weight(config)
    assert mode is not None  # as the algorithm learns a guide
    return Run(
        workdir=workdir.path,
        guide=Guide(model, ref.tokenizer, export.guide_trained_on(session, config.rounds)),
        held_out=[{"prompt": problem.prompt, **problem.columns} for problem in problems.test_problems(session)],
        sampling=dataclasses.replace(models.sampling(session), mode=mode, eta=eta),
        forecast=forecast.read(workdir, config.rounds),
        metrics=workdir.read_metrics(),
        config=config,
    )


def _store(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write prompts to the workdir, where a run finds them again; a UserError if it holds a run with others."""
    path, text = folder / PROMPTS, "".join(json.dumps(row) + "\n" for row in rows)
    if files.is_file(folder / "config.json"):
        if not files.is_file(path) or files.read_text(path) != text:
            raise UserError(f"{folder} holds a run with other prompts; give another workdir, or the same prompts")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, text)
    return path


def _word(value: Any) -> str:
    """Return a setting's value as the command line has it; a list of texts as JSON."""
    if isinstance(value, list | tuple):
        texts = value and all(isinstance(item, str) for item in value)
        return json.dumps(value) if texts else ",".join(map(str, value))
    return str(value)
