"""DPO, and RPO: maximum likelihood of preferences between two responses.

DPO: Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290); RPO: Pang et al., "Iterative Reasoning
Preference Optimization" (arXiv 2404.19733).

    D <- {}
    for round k = 1, 2, ...:
        D <- D + rollouts of pi_ref with their rewards
        pairs (y_w, y_l): any two rollouts of one prompt with r(y_w) > r(y_l)
        h(y) = log pi_theta(y | x) / pi_ref(y | x)
        minimize  mean over pairs  -log sigmoid(beta (h(y_w) - h(y_l)))                                    (DPO, eq. 7)
                                   + alpha (-log pi_theta(y_w | x)) / |y_w|                               (RPO, eq. 1)

beta, the KL's weight, is config.dpo.beta or config.rpo.beta, by default collect.eta. Each round starts from the
previous one with `fit.warm_start`, else from pi_ref. Prompts whose rollouts all have the same reward give no pair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from qsharp_jax.algorithms.base import Algorithm
from qsharp_jax.sampling import OWN_ETA
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.settings import NOT_NEGATIVE, setting, whole

if TYPE_CHECKING:
    import jax

    from qsharp_jax.algorithms.policy_scores import PolicyBatch
    from qsharp_jax.data.records import Rollouts
    from qsharp_jax.models.decoder import LanguageModel, Params
    from qsharp_jax.run.session import Session


@dataclasses.dataclass(frozen=True)
class Settings:
    """Direct preference optimization."""

    beta: float | None = setting(None, OWN_ETA, "weight of the KL; none: collect.eta")
    epochs: int = setting(4, whole(1), "over all pairs")


@dataclasses.dataclass(frozen=True)
class RPOSettings:
    """DPO with the chosen response's likelihood."""

    beta: float | None = setting(None, OWN_ETA, "weight of the KL; none: collect.eta")
    alpha: float = setting(1.0, NOT_NEGATIVE, "weight of the chosen response's likelihood per token")
    epochs: int = setting(4, whole(1), "over all pairs")


def run(session: Session, ref: LanguageModel, after_round: Callable[[int, LanguageModel], None]) -> LanguageModel:
    """Train the policy; `after_round` is called with each round's number and policy."""
    from qsharp_jax.algorithms import policy_based, value_based

    params = None
    for number in range(1, session.config.rounds + 1):
        value_based.collect(session, number, ref, None)
        data = value_based.aggregate(session, number)
        params = fit(session, number, ref, params if session.config.fit.warm_start else None, data)
        policy = policy_based.finish(session, params)
        after_round(number, policy)
    return policy


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two rollouts by their indices in the data; its length is that of the longer one."""

    chosen: int
    rejected: int
    tokens: int

    def __len__(self) -> int:
        return self.tokens


def make_pairs(data: Rollouts) -> tuple[list[Pair], int]:
    """Return all pairs of a prompt's rollouts with different rewards, and the number of prompts without a pair."""
    by_prompt: dict[str, list[int]] = {}
    for index, prompt_id in enumerate(data.prompt_ids):
        by_prompt.setdefault(prompt_id, []).append(index)
    rewards, lengths = data.rewards.tolist(), data.lengths.tolist()
    pairs, skipped = [], 0
    for indices in by_prompt.values():
        places = [(w, l) for w, l in itertools.product(indices, repeat=2) if rewards[w] > rewards[l]]
        pairs += [Pair(w, l, max(lengths[w], lengths[l])) for w, l in places]
        skipped += not places
    return pairs, skipped


def epoch_rollouts(data: Rollouts) -> Rollouts:
    """Return the rollouts of an epoch: both of every pair."""
    import numpy as np

    pairs, _ = make_pairs(data)
    return data.select(np.asarray([place for pair in pairs for place in (pair.chosen, pair.rejected)], int))


def fit(session: Session, number: int, ref: LanguageModel, params: Params | None, data: Rollouts) -> Params:
    """Fit a round's policy to all pairs of the data; a UserError if there is no pair.

    Args:
      params: of the round before, which are donated; None to start from pi_ref.
    """
    from qsharp_jax.algorithms import policy_based
    from qsharp_jax.algorithms.policy_scores import make_batch, score, scorer
    from qsharp_jax.data.batches import Batches, RolloutExamples
    from qsharp_jax.run import models
    from qsharp_jax.run.config import kl_weight
    from qsharp_jax.train.checkpoint import DamagedError

    with contextlib.suppress(DamagedError):  # `training` reports it, and resumes from the checkpoint before
        if models.fitted_rounds(session.workdir) >= number:
            return session.for_fitting(models.load_guide(session, number, ref)).params
    config = session.config[session.config.algorithm]
    pairs, skipped = make_pairs(data)
    prompts = len({*data.prompt_ids})
    if not pairs:
        raise UserError(
            f"{session.config.algorithm} has no pairs to learn from: all {prompts} prompts were skipped, since the"
            " rollouts of each have the same reward; give more config.collect.samples, or problems that pi_ref"
            " sometimes solves"
        )
    counts = {"pairs": len(pairs), "prompts": prompts, "skipped_prompts": skipped}
    session.workdir.append_metrics({"phase": f"round {number}: pairs", **counts})
    print(f"round {number}: {len(pairs)} pairs; {skipped} of {prompts} prompts skipped, all rewards equal")
    examples, rows = RolloutExamples(data), session.config.policy.batch_size
    first = policy_based.start(session, ref)
    with session.fitting(scorer(session).config.dtype):
        _, ref_log_probs, _ = score(session, first, examples)
    params = first if params is None else params
    del first  # its memory is needed

    def make(groups: Sequence[Sequence[Pair]], most: int, width: int) -> PolicyBatch:
        """Put the chosen responses in the first half of the rows, the rejected in the second, in the same order."""
        batch = [pair for (pair,) in groups]
        padding = [None] * (most - len(batch))
        order = [*(pair.chosen for pair in batch), *padding, *(pair.rejected for pair in batch)]
        return make_batch(examples, {"ref_log_probs": ref_log_probs}, order, rows=2 * most, width=width)

    batches = Batches(
        pairs, rows=rows // 2, bucket=session.config.fit.length_bucket, seed=session.seed("fit"), make=make
    )
    alpha = config.get("alpha", 0.0)  # DPO has none
    objective = functools.partial(loss, beta=kl_weight(session.config), alpha=alpha)
    steps = config.epochs * batches.steps_per_epoch
    log_every = session.config.fit.log_every
    with policy_based.training(session, number, params, objective, total_steps=steps, log_every=log_every) as trainer:
        while not trainer.done:
            trainer.update(batches[trainer.step])
    return trainer.state.model


def loss(
    log_probs: jax.Array, values: jax.Array, batch: PolicyBatch, whole: PolicyBatch, *, beta: float, alpha: float
) -> tuple[jax.Array, dict]:
    """Compute the loss of DPO, or with `alpha` RPO, for a batch of chosen responses followed by the rejected ones."""
    import jax
    import jax.numpy as jnp

    # h(y) = log pi(y) / pi_ref(y)
    log_ratio = (log_probs - batch.numbers["ref_log_probs"]).sum(1)
    chosen, rejected = jnp.split(log_ratio, 2)
    is_pair, _ = jnp.split(batch.response_mask.any(1), 2)
    count = jnp.maximum(whole.response_mask.any(1).sum() / 2, 1)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.where(is_pair, x, 0).sum() / count

    margin = beta * (chosen - rejected)
    # -log sigmoid(beta (h(y_w) - h(y_l)))
    total = -mean(jax.nn.log_sigmoid(margin))
    metrics = {"right": mean(margin > 0), "margin": mean(margin), "chosen": mean(chosen), "rejected": mean(rejected)}
    if alpha:
        # alpha (-log pi(y_w)) / |y_w|
        likelihood, _ = jnp.split(log_probs.sum(1) / jnp.maximum(batch.response_mask.sum(1), 1), 2)
        total -= alpha * mean(likelihood)
    return total, metrics


def check(config: ConfigDict) -> None:
    """Check that prompts have samples to compare, and that the parts of a batch hold whole pairs (UserError)."""
    name, samples, rows = config.algorithm, config.collect.samples, config.policy.batch_size
    if samples < 2:
        raise UserError(f"config.collect.samples is {samples}; {name} compares two rollouts of a prompt")
    if rows % (parts := 2 * config.fit.accumulate):
        raise UserError(
            f"config.policy.batch_size is {rows}; it must be a multiple of {parts}: config.fit.accumulate times the two"
            " rollouts of a pair"
        )


DPO = Algorithm(
    name="dpo", label="DPO", color="#a3263a", learns="policy", settings=Settings(), eta="beta", run=run, check=check,
    epoch_rollouts=epoch_rollouts,
)  # fmt: skip
RPO = dataclasses.replace(DPO, name="rpo", label="RPO", color="#e07a8b", settings=RPOSettings())
