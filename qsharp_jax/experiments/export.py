"""A run's reference or guide as a folder that `transformers` loads, with a model card that says where it comes from."""

from pathlib import Path
from typing import Any

from qsharp_jax import report
from qsharp_jax.algorithms.registry import ALGORITHMS
from qsharp_jax.models import hf, lora
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.run import config as configs
from qsharp_jax.run import models, sources
from qsharp_jax.run.session import Session
from qsharp_jax.system.errors import UserError


def write(session: Session, what: str, folder: str | Path) -> None:
    """Write the reference, or the guide (or policy) of the last fitted round, as a new or replaced export.

    Args:
      what: "ref", "guide", or "adapter" for what a fit with LoRA learned.

    Raises:
      UserError: if the run has no such model yet, its reference comes from a folder, no class of `transformers`
        computes the model, something else is in the folder, or there is no LoRA of a model in a folder.
    """
    if what == "ref" and (source := sources.folder(session.config, "ref")):
        raise UserError(f"this run's reference is the model in {source}; use that folder")
    base = _base(session) if what == "adapter" else None
    hf.check_folder(folder)
    text = models.tokenizer(session)
    rows = report.read_results(session.workdir) if session.workdir.results.exists() else []
    number = 0 if what == "ref" else models.fitted_rounds(session.workdir)
    metrics = _metrics(rows, 0) | _metrics(rows, number)
    if base is not None:
        fit = session.config.fit
        last = number or 1
        rounds = range(1, last + 1) if fit.warm_start else [last]
        hf.export_adapter(
            [models.load_lora(session, round) for round in rounds], models.guide_config(session), folder,
            alpha=fit.lora_alpha, base=base, tokenizer=text.for_export(),
            trained_on=guide_trained_on(session, number), metrics=metrics,
        )  # fmt: skip
        return
    if what == "guide" and not configs.trains_policy(session.config):
        trained_on = guide_trained_on(session, number)
        hf.export_guide(
            models.load_guide(session), folder, tokenizer=text.for_export(), trained_on=trained_on, metrics=metrics
        )
        return
    model = session.for_decoding(models.pretrained(session)) if what == "ref" else models.load_guide(session)
    hf.export_ref(
        model.replace(params=lora.merged(model.params)),
        folder,
        tokenizer=text.for_export(),
        stop_ids=text.stop_ids,
        trained_on=_ref_trained_on(session) if what == "ref" else _policy_trained_on(session, number),
        metrics=metrics,
    )


def _base(session: Session) -> str:
    """The model that the first guide started from, as the config names it; raises a UserError where it has no LoRA."""
    config = session.config
    if not config.fit.lora_rank:
        raise UserError(
            "this run's guide was fitted without LoRA (config.fit.lora_rank is 0), so there is no adapter; give --what"
            " guide"
        )
    if configs.trains_policy(config):
        raise UserError("adapters of policies are not written; give --what guide, which merges the LoRA into pi_ref")
    name = "ref" if config.guide == "ref" else "guide"
    base = sources.folder(config, name)
    if base is None or hf.base_of(base) is not None:
        what = "is not a model in a folder or on the hub" if base is None else "is an adapter itself"
        raise UserError(f"the model that the guide started from, config.{name}, {what}; give --what guide")
    return config[name]


def _metrics(rows: list[dict], number: int) -> dict[str, str]:
    """Return the model card's table of rewards: those of a round's guide, or of the reference (round 0)."""
    metrics = {}
    for row in rows:
        if row["round"] == number:
            eta = "" if row["eta"] is None else f", eta {row['eta']:g}"
            kl = "" if row["kl"] is None else f"; KL {row['kl']:.3f} nats per response"
            interval = f"95% {row['reward_low']:.3f} .. {row['reward_high']:.3f}"
            name = report.NAMES.get(row["method"], row["method"])
            metrics[f"reward, {name}{eta}"] = f"{row['reward']:.3f} ({interval}, {row['n']} problems){kl}"
    return metrics


def _ref_trained_on(session: Session) -> str:
    c = session.config.pretrain
    steps = f"{'at most ' if c.stop_loss else ''}{c.steps} steps of {c.batch_size} texts"
    return (
        f"Texts of {_task(session)}: maximum likelihood, {steps}, seed {session.config.seed}.\n\n"
        f"{_shape(models.ref_config(session))}"
    )


def guide_trained_on(session: Session, number: int) -> str:
    config, algorithm = session.config, ALGORITHMS[session.config.algorithm]
    text = f"Rollouts of the reference on {_task(session)}: {_rounds(session, number)}."
    if algorithm.rolls_in and number > 1:
        text += f" From round 2 on the guide rolled in, at eta {config.collect.eta:g}."
    settings = ", ".join(f"{name} {value}" for name, value in config.get(algorithm.name, {}).items())
    text += f" Fitted by {algorithm.label}{f' ({settings})' if settings else ''}, "
    text += f"{'at most ' if config.fit.patience else ''}{_count(config.fit.epochs, 'epoch')}, seed {config.seed}."
    return f"{text}\n\n{_shape(models.guide_config(session).trunk)}"


def _policy_trained_on(session: Session, number: int) -> str:
    return (
        f"{report.NAMES[session.config.algorithm]} from the reference on {_task(session)}: {_rounds(session, number)},"
        f" at a weight of the KL of {configs.kl_weight(session.config):g}, seed {session.config.seed}.\n\n"
        f"{_shape(models.ref_config(session))}"
    )


def _rounds(session: Session, number: int) -> str:
    c = session.config.collect
    prompts, samples = _count(c.prompts, "prompt"), _count(c.samples, "rollout")
    return f"{_count(number, 'round')} of at most {prompts}, at most {samples} each"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _task(session: Session) -> str:
    settings: dict[str, Any] = {key: item for key, item in session.config.task.items() if key != "name"}
    return f"the task `{session.config.task.name}` ({', '.join(f'{key} {item}' for key, item in settings.items())})"


def _shape(config: DecoderConfig) -> str:
    return (
        f"{config.layers} layers of width {config.embed}, {config.heads} heads, a vocabulary of {config.vocab_size}"
        f" and a context of {config.max_positions} tokens."
    )
