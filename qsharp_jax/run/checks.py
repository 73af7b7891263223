"""Checks of a run before anything is computed: its settings, models, problems and devices."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from qsharp_jax.algorithms.registry import ALGORITHMS
from qsharp_jax.data.records import is_held_out
from qsharp_jax.run import attention, models, problems, schema
from qsharp_jax.run import config as configs
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system import loggers
from qsharp_jax.system.errors import UserError, nearest
from qsharp_jax.tasks import registry as tasks
from qsharp_jax.train.checkpoint import DamagedError


def check_settings(config: ConfigDict) -> None:
    """Check that all settings are present, in range and consistent; a UserError names the setting."""
    present, algorithm = configs.keys(config), ALGORITHMS.get(config.get("algorithm"))
    trains_policy = algorithm is not None and algorithm.learns == "policy"
    pretrained = config.get("ref") == "pretrain"
    # Sections of other commands and algorithms.
    others = {"compare", "policy", *ALGORITHMS} - {config.get("algorithm")}
    if trains_policy:
        others.remove("policy")
    if not pretrained:
        others.add("pretrain")
    required = [key for key in schema.RULES if key.partition(".")[0] not in others]
    for key in [*required, "task.name", *(["model.size"] if pretrained or config.get("guide") == "scratch" else [])]:
        if key not in present:
            raise UserError(f"the config lacks the setting {key}; start from qsharp_jax.run.schema.default_config()")
    for key in present:  # settings of `generate` are its arguments, which would refuse others after the pre-training
        if key.startswith("generate.") and key not in schema.RULES:
            raise UserError(f"there is no setting {key}; {nearest(key, schema.RULES)}")
    configs.check(config)
    loggers.check(config.loggers)
    if config.fit.batch_size % config.fit.accumulate:
        raise UserError(
            f"config.fit.accumulate is {config.fit.accumulate}; it must divide config.fit.batch_size, which is"
            f" {config.fit.batch_size}"
        )
    if config.fit.patience and not config.fit.evaluate_every:
        raise UserError(
            f"config.fit.patience is {config.fit.patience} and config.fit.evaluate_every 0; patience counts"
            " evaluations, so set the number of steps between them"
        )
    if config.fit.evaluate_every and not config.fit.holdout:
        raise UserError(
            f"config.fit.evaluate_every is {config.fit.evaluate_every} and config.fit.holdout 0; set the share of the"
            " prompts to evaluate on"
        )
    if config.value.distribution == "auto" and config.value.atoms:
        raise UserError(
            "config.value.atoms are given, and config.value.distribution is auto, which chooses them by the rewards;"
            " give --config.value.distribution=categorical too"
        )
    if config.collect.drop_no_variation and config.collect.samples == 1:
        raise UserError(
            "config.collect.drop_no_variation is True and config.collect.samples 1; the rewards of a problem vary only"
            " among two or more samples"
        )
    if (most := max(config.evaluate.pass_at, default=0)) > config.evaluate.samples:
        raise UserError(
            f"config.evaluate.pass_at has {most:g} and config.evaluate.samples is {config.evaluate.samples}; pass@k"
            " needs at least k samples of a problem, so give more samples, or leave that k out"
        )
    if (slots := config.generate.candidate_slots) is not None:
        if config.value.type == "q":
            raise UserError("config.generate.candidate_slots is for guides of type v; for one of type q give none")
        if slots > config.generate.top_k_candidates:
            raise UserError(
                f"config.generate.candidate_slots is {slots:g}; it must be at most config.generate.top_k_candidates,"
                f" which is {config.generate.top_k_candidates}"
            )
    name, width = configs.row_width(config)
    if config.fit.attention == "splash" and width % 128:
        raise UserError(
            f"config.fit.{name} is {width}, but config.fit.attention splash needs a multiple of 128"
            " tokens; give one, or another attention"
        )
    if trains_policy:
        _check_policy(config)
    algorithm.check(config)
    if trains_policy and config.policy.batch_size % config.fit.accumulate:
        raise UserError(
            f"config.policy.batch_size is {config.policy.batch_size}; it must be a multiple of"
            f" {config.fit.accumulate}, config.fit.accumulate"
        )
    try:
        tasks.get(config.task.name).check(config.task)
    except ValueError as error:
        raise UserError(str(error)) from None
    except (AttributeError, TypeError) as error:  # a setting is missing, or of another type
        words = str(error).strip('"')
        raise UserError(f"the config's task section is not what {config.task.name} needs: {words}") from None


def _check_policy(config: ConfigDict) -> None:
    """Check the settings shared by all algorithms that train the policy itself."""
    name = config.algorithm
    if config.guide != "ref":
        raise UserError(f"config.guide is {config.guide}; {name} trains a copy of the reference, so give ref")
    if config.quantize != "none":
        raise UserError(
            f"config.quantize is {config.quantize}, but {name} trains a copy of the reference's weights; give none"
        )
    if config.generate.temperature == 0:
        raise UserError(f"config.generate.temperature is 0; {name} samples the policy that it trains, so give more")


def check(config: ConfigDict) -> None:
    """Check everything that can be refused before anything is computed, including models and folders (UserError)."""
    check_settings(config)
    _check_rows(config)
    models.check_folders(config)
    session = Session(Workdir(Path(), config))
    try:
        models.check(session)
    except ValueError as error:
        raise UserError(str(error)) from None
    longest = min(shape.max_positions for shape in models.trunk_configs(session).values())
    if (new := config.generate.max_new_tokens) >= longest:
        raise UserError(f"config.generate.max_new_tokens is {new}; it must be below the model's {longest} positions")


def _check_rows(config: ConfigDict) -> None:
    """Check that the mesh divides the rows of every training batch."""
    data, fsdp = config.mesh.fit.data, config.mesh.fit.fsdp
    learned = "policy" if configs.trains_policy(config) else "fit"
    for section in ("pretrain", learned) if config.ref == "pretrain" else (learned,):
        parts = 1 if section == "pretrain" else config.fit.accumulate
        if config[section].batch_size % (data * fsdp * parts):
            raise UserError(
                f"config.{section}.batch_size is {config[section].batch_size}; on the mesh {config.mesh.name} it must"
                f" be a multiple of {data * fsdp * parts}, which is data {data} x fsdp {fsdp}"
                + (f" x accumulate {parts}" if parts > 1 else "")
            )


def check_problems(config: ConfigDict, rewards: Sequence[Callable[..., Any]] = ()) -> None:
    """Check that the task has enough problems, and that prompts with responses fit into the models and packed rows.

    A reward function must load, too.

    This takes seconds, so it is only done for new runs: a workdir keeps its settings, and a mistake found after the
    pre-training would cost a new one. A UserError gives the numbers.

    Args:
      rewards: the reward functions, where the config names Python objects.
    """
    session = Session(Workdir(Path(), config), rewards=rewards)
    tokenizer = models.tokenizer(session)
    _ = problems.judge(session)
    train, test = problems.all_train_problems(session), problems.test_problems(session)
    _tell_how_many(config, len(train))
    measures = config.fit.evaluate_every and not configs.trains_policy(config)
    if measures and not any(is_held_out(p.problem_id, config.fit.holdout) for p in train):
        raise UserError(
            f"config.fit.holdout is {config.fit.holdout:g}, which holds out none of the {len(train)} training prompts,"
            f" and config.fit.evaluate_every is {config.fit.evaluate_every}; give more prompts, a larger holdout, or"
            " --config.fit.evaluate_every=0 --config.fit.patience=0"
        )
    lengths = {problem.problem_id: len(tokenizer.encode_prompt(problem.prompt)) for problem in train + test}
    longest, new = max(lengths, key=lengths.get), config.generate.max_new_tokens
    total = lengths[longest] + new
    for name, shape in models.trunk_configs(session).items():
        if total > shape.max_positions:
            raise UserError(
                f"the prompt of problem {longest} has {lengths[longest]} tokens, which with"
                f" config.generate.max_new_tokens = {new} are more than the {name}'s {shape.max_positions} positions;"
                " give fewer new tokens, or a model with a longer context"
            )
    if 0 < config.fit.pack_length < total:
        raise UserError(
            f"config.fit.pack_length is {config.fit.pack_length}; it must be at least {total}, the tokens of the"
            " longest prompt and config.generate.max_new_tokens, or 0"
        )


def _tell_how_many(config: ConfigDict, used: int) -> None:
    """Print that some of the training prompts are not used, for a task that uses at most `collect.prompts`."""
    task = tasks.get(config.task.name)
    if not hasattr(task, "available") or used < config.collect.prompts:
        return
    if used < (available := task.available(config.task, "train")):
        print(f"{used:,} of {available:,} training prompts are used (collect.prompts)")


def check_loggers(workdir: Workdir) -> None:
    """Start the loggers of a run that has a round to learn, before anything is computed; a UserError names one that
    does not start."""
    try:
        learns = models.fitted_rounds(workdir) < workdir.config.rounds
    except DamagedError:  # its round is learned again
        learns = True
    if learns:
        workdir.start_loggers()


def check_devices(session: Session) -> None:
    """Check that the meshes match the devices, and that the fit's attention runs on them (UserError).

    An attention that is chosen for them is printed, and that the mesh `single` leaves devices idle.
    """
    _ = session.fit_mesh, session.decode_mesh
    if session.fit_mesh is None and (count := jax.device_count()) > 1 and session.workdir.writes:
        print(f"1 of the {count} devices here is used; --config.mesh=NAME is for more, see docs/scaling.md")
    by, dtype = session.config.fit.attention, models.fit_config(session).trunk.dtype
    platform = jax.default_backend()
    if by == "auto" and session.workdir.writes:
        print(f"fit.attention: {attention.of_fit(session)}, chosen by the device, the model and the lengths")
    if (needed := {"cudnn": "gpu", "splash": "tpu"}.get(by, platform)) != platform:
        raise UserError(
            f"config.fit.attention is {by}, which runs on a {needed}, but JAX has a {platform} here; give xla,"
            " or blocks for long sequences on a CPU"
        )
    if by == "cudnn" and dtype != "bfloat16":
        raise UserError(
            f"config.fit.attention cudnn computes in bfloat16, but the guide is fitted in {dtype}; give"
            " --config.fit.dtype=bfloat16, or xla"
        )
