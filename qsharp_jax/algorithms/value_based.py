"""The steps of algorithms that learn a guide: collect a round's rollouts, read them, fit the guide.

An algorithm chooses the fit's targets and loss. All results are in the workdir, so that a stopped run resumes.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable

import numpy as np

from qsharp_jax import rollouts, train
from qsharp_jax.data.batches import Batches, RolloutExamples, make_packed_batch
from qsharp_jax.data.records import Rollouts, read_rounds, split_held_out, with_reward, with_variation
from qsharp_jax.evaluation import score
from qsharp_jax.models import lora, sharding
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.models.value import ValueModel
from qsharp_jax.run import attention, models
from qsharp_jax.run.problems import judge, longest_prompt, task, train_problems
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system import files, multihost
from qsharp_jax.system.errors import UserError
from qsharp_jax.train.checkpoint import Checkpoints, DamagedError

ATOMS = 21  # of a categorical distribution that is chosen by the rewards


def collect(session: Session, number: int, ref: LanguageModel, guide: ValueModel | None) -> dict[str, float]:
    """Roll in with pi_ref tilted by the guide, if any, finish with pi_ref, and return the rollouts' statistics."""
    began = time.monotonic()
    with session.decoding():
        decoded = rollouts.collect(
            ref,
            guide,
            judge(session),
            models.tokenizer(session),
            train_problems(session, number),
            session.workdir.rollouts(number),
            dataclasses.replace(models.sampling(session), eta=session.config.collect.eta),
            number=number,
            seed=session.seed("collect"),
            samples=session.config.collect.samples,
            batch_size=session.config.collect.batch_size,
            shard_rows=session.config.collect.shard_rows,
            longest=longest_prompt(session),
            together=session.hosts_per_group,
        )
    has_answers = judge(session).has_answers
    collected = read_rounds(session.workdir.path / "rollouts", [number], texts=has_answers)
    statistics = rollouts.statistics(collected)
    if has_answers:
        answered = np.mean([task(session).parse(text) is not None for text in collected.columns["text"]])
        statistics["answered"] = float(answered)
    session.workdir.append_metrics(
        {"phase": f"round {number}: collect", **statistics, **decoded, "seconds": time.monotonic() - began}
    )
    return statistics


def aggregate(session: Session, number: int, *, skip_damaged: bool = False) -> Rollouts:
    """Return the rollouts to learn from, of this round and all before it, without texts; a UserError if none."""
    folder = session.workdir.path / "rollouts"
    data = with_reward(read_rounds(folder, range(1, number + 1), skip_damaged=skip_damaged, texts=False))
    if not data:
        raise UserError(f"none of the rollouts in {folder} has a reward; fix the reward function and begin a new run")
    # Decided by all processes alike: one that reads late would see what another has just chosen.
    is_auto = session.config.value.distribution == "auto" and not models.starts_from_guide(session.config)
    if is_auto and not multihost.everywhere(session.workdir.read_distribution() is not None):
        choose_distribution(session.workdir, data.rewards.astype(float))
    if not session.config.collect.drop_no_variation:
        return data
    if varied := with_variation(data):
        return varied
    raise UserError(
        f"collect.drop_no_variation leaves none of {len(data)} rollouts: within every problem all rewards are"
        f" {', '.join(f'{reward:g}' for reward in np.unique(data.rewards))}; begin a run with more"
        " collect.samples, with other problems, or without it"
    )


def choose_distribution(workdir: Workdir, rewards: np.ndarray) -> None:
    """Choose the guide's distribution by the rewards of the first round, store it in the workdir, and print it.

    Bernoulli if all rewards are 0 or 1. Else categorical, with an atom per reward if there are few different ones, and
    otherwise `ATOMS` from the smallest to the largest.

    Raises:
      UserError: if all rewards are the same.
    """
    different = np.unique(rewards)
    if len(different) == 1:
        raise UserError(
            f"all {len(rewards)} rewards are {different[0]:g}, so there is nothing to learn; give other prompts, more"
            " collect.samples, or another reward"
        )
    if set(different.tolist()) <= {0.0, 1.0}:
        distribution, atoms = "bernoulli", ()
    elif len(different) <= ATOMS:
        distribution, atoms = "categorical", tuple(different.tolist())
    else:
        distribution, atoms = "categorical", tuple(np.linspace(different[0], different[-1], ATOMS).tolist())
    words = f", {len(atoms)} atoms from {atoms[0]:g} to {atoms[-1]:g}" if atoms else ""
    print(f"value.distribution: {distribution}{words}, chosen by the {len(rewards)} rewards of round 1")
    if workdir.writes:
        workdir.write_distribution(distribution, atoms)
    multihost.wait_for_all("the distribution of rewards is chosen")
    files.wait_for(workdir.distribution)


def fit(
    session: Session,
    number: int,
    ref: LanguageModel | None,
    data: Rollouts,
    previous: ValueModel | None,
    *,
    error: train.Error = "nll",
    targets: train.Targets | None = None,
    beside: Params | None = None,
    flops: train.Flops | None = None,
) -> ValueModel:
    """Fit a guide to the data, except for the prompts that are held out, and return it on the mesh for fitting.

    It starts from `previous`, the previous round's guide, with `fit.warm_start`; else from `models.first_guide`, which
    may need the reference.

    Args:
      error, targets: as in `train.value_loss`; by default the likelihood of the observed reward-to-go.
      beside: parameters of other models that the targets need, by name; they are not learned.
      flops: FLOPs of a step, by default the guide's alone.
    """
    config, guide_config = session.config.fit, models.guide_config(session)
    checkpoints = Checkpoints(session.workdir.guide_folder(number))
    if config.lora_rank:
        with contextlib.suppress(DamagedError):  # `save_result` reports it, and writes it again
            if checkpoints.finished():
                return models.load_guide(session, number)
    if config.warm_start and previous is not None:
        params = previous.params
    else:
        params = models.first_guide(session, ref)
    if config.future_offsets:
        future = train.init_future(session.key("future"), config.future_offsets, guide_config.trunk)
        params = params | {"future": future}
    if config.lora_rank:
        params = lora.add(session.key("lora"), params, config.lora_rank, config.lora_alpha)
    params = session.for_fitting(ValueModel(params, guide_config)).params
    params, frozen = lora.split(params) if config.lora_rank else (params, {})
    beside = beside or {}

    train.check_rewards(data.rewards.astype(float), guide_config, clip=config.clip_rewards)
    learned, held_out = split_held_out(data, config.holdout)
    if not learned:
        raise UserError(f"all {len(data)} rollouts have prompts that fit.holdout holds out; lower it")
    if config.evaluate_every and not held_out:
        raise UserError(
            f"fit.evaluate_every is {config.evaluate_every}, but none of {len(data)} rollouts has a held-out prompt;"
            " raise fit.holdout, or give 0"
        )
    fitted_config = models.fit_config(session)
    with session.fitting(fitted_config.trunk.dtype):
        local = sharding.local_rows(config.batch_size)
    batches = Batches(
        RolloutExamples(learned),
        rows=config.batch_size,
        bucket=config.length_bucket,
        pack_length=config.pack_length,
        seed=session.seed("fit"),
        lengths=learned.lengths,
        make=functools.partial(make_packed_batch, local=local),
    )

    def measure(params: train.Params) -> dict[str, float]:
        if not held_out:
            return {}
        guide = ValueModel(_without(params, beside), guide_config)
        return score.quality(
            guide, RolloutExamples(held_out), held_out.prompt_ids, rows=config.batch_size,
            bucket=config.length_bucket, projection=config.projection, clip=config.clip_rewards,
        )  # fmt: skip

    total_steps = config.epochs * batches.steps_per_epoch
    optimizer = train.make_optimizer(config.optimizer)
    with session.fitting(fitted_config.trunk.dtype):
        state = train.fit(
            train.init_state(params, optimizer, frozen | beside),
            batches,
            loss_fn=functools.partial(
                train.value_loss,
                config=fitted_config,
                error=error,
                targets=targets,
                projection=config.projection,
                clip=config.clip_rewards,
                future_weight=config.future_weight,
                remat=config.remat,
                attend_by=attention.of_fit(session),
                packed=config.pack_length > 0,
            ),
            optimizer=optimizer,
            schedule=train.make_schedule(config.optimizer, total_steps),
            accumulate=config.accumulate,
            checkpoints=Checkpoints(session.workdir.guide_folder(number) / "lora") if config.lora_rank else checkpoints,
            loop=train.Loop(
                name=f"round {number}: fit",
                total_steps=total_steps,
                log_every=config.log_every,
                save_every=config.save_every,
                log=session.workdir.append_metrics,
                measure=measure,
                evaluate_every=config.evaluate_every,
                patience=config.patience,
                select_by="brier" if error == "squared" else "nll",  # the held-out form of what is minimized
                flops=flops or train.guide_flops(guide_config, config.future_offsets),
                profile=session.profile_folder(f"round_{number}"),
            ),
        )
    if config.lora_rank:  # its own checkpoints hold the LoRA; the merged parameters are an ordinary guide
        state = state.replace(params=lora.merged(_without(state.model, beside)), frozen={})
        checkpoints.save_result(state)
    return ValueModel(_without(state.params, ("future",)), guide_config)


def _without(params: Params, names: Iterable[str]) -> Params:
    return {name: leaf for name, leaf in params.items() if name not in names}
