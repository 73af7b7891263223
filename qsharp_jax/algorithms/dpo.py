"""DPO, and RPO: maximum likelihood of preferences between two responses.

DPO: Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290); RPO: Pang et al., "Iterative Reasoning
Preference Optimization" (arXiv 2404.19733).

    D <- {}
    for round k = 1, 2, ...:
        D <- D + rollouts of pi_ref with their rewards
        pairs (y_w, y_l): any two rollouts of one prompt with r(y_w) > r(y_l)
        h(y) = log pi_theta(y | x) / pi_ref(y | x)
        minimise  mean over pairs  -log sigmoid(beta (h(y_w) - h(y_l)))                                    (DPO, eq. 7)
                                   + alpha (-log pi_theta(y_w | x)) / |y_w|                               (RPO, eq. 1)

beta, the KL's weight, is config.dpo.beta or config.rpo.beta, or collect.eta. Each round starts from the one before
where `fit.warm_start` says so, else from pi_ref. Prompts whose rollouts were all paid the same give no pair.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qsharp_jax.algorithms import policy_based, value_based
from qsharp_jax.algorithms.policy_scores import PolicyBatch, make_batch, score
from qsharp_jax.data.batches import Batches, from_rollout
from qsharp_jax.data.records import Rollout
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.run import config as configs
from qsharp_jax.run import models
from qsharp_jax.run.session import Session
from qsharp_jax.system.errors import UserError


def run(session: Session, ref: LanguageModel, after_round: Callable[[int, LanguageModel], None]) -> LanguageModel:
    """All rounds; `after_round` is told each round's number and policy."""
    first = params = policy_based.start(session, ref)
    made = None
    for number in range(1, session.config.rounds + 1):
        value_based.collect(session, number, ref, None)
        data = value_based.aggregate(session, number)
        params = fit(session, number, first, params if session.config.fit.warm_start else first, data)
        made = policy_based.finish(session, params)
        after_round(number, made)
    return made


@dataclass(frozen=True)
class Pair:
    """Two rollouts by their places in the data; its length is the longer one's."""

    chosen: int
    rejected: int
    tokens: int

    def __len__(self) -> int:
        return self.tokens


def make_pairs(data: Sequence[Rollout]) -> tuple[list[Pair], int]:
    """Any two rollouts of one prompt that were paid differently; and the number of prompts that have no such two."""
    by_prompt: dict[str, list[int]] = {}
    for index, rollout in enumerate(data):
        by_prompt.setdefault(rollout.prompt_id, []).append(index)
    pairs, skipped = [], 0
    for indices in by_prompt.values():
        found = [(w, l) for w, l in itertools.product(indices, repeat=2) if data[w].reward > data[l].reward]
        pairs += [Pair(w, l, max(len(from_rollout(data[w])), len(from_rollout(data[l])))) for w, l in found]
        skipped += not found
    return pairs, skipped


def fit(session: Session, number: int, first: Params, params: Params, data: Sequence[Rollout]) -> Params:
    """A round's policy, fitted to all pairs of the data.

    Args:
      first: pi_ref's parameters.
      params: where the fit starts.

    Raises:
      UserError: if there is no pair.
    """
    if models.fitted_rounds(session.workdir) >= number:
        return session.for_fitting(models.load_guide(session, number)).params
    config = session.config[session.config.algorithm]
    pairs, skipped = make_pairs(data)
    prompts = len({rollout.prompt_id for rollout in data})
    if not pairs:
        raise UserError(
            f"{session.config.algorithm} has no pairs to learn from: all {prompts} prompts were skipped, for the"
            " rollouts of each were paid the same; give more config.collect.samples, or problems that pi_ref solves now"
            " and then"
        )
    figures = {"pairs": len(pairs), "prompts": prompts, "skipped_prompts": skipped}
    session.workdir.append_metrics({"phase": f"round {number}: pairs", **figures})
    print(f"round {number}: {len(pairs)} pairs; {skipped} of {prompts} prompts skipped, all rewards equal")
    examples, rows = [from_rollout(rollout) for rollout in data], session.config.policy.batch_size
    with session.fitting():
        _, ref_log_probs, _ = score(session, first, examples)

    def make(groups: Sequence[Sequence[Pair]], most: int, width: int) -> PolicyBatch:
        """The chosen in the first half of the rows, the rejected in the second in the same order."""
        found = [pair for (pair,) in groups]
        padding = [None] * (most - len(found))
        order = [*(pair.chosen for pair in found), *padding, *(pair.rejected for pair in found)]
        return make_batch(examples, {"ref_log_probs": ref_log_probs}, order, rows=2 * most, width=width)

    batches = Batches(
        pairs, rows=rows // 2, bucket=session.config.fit.length_bucket, seed=session.seed("fit"), make=make
    )
    alpha = config.alpha if session.config.algorithm == "rpo" else 0.0
    objective = functools.partial(loss, beta=configs.kl_weight(session.config), alpha=alpha)
    steps = config.epochs * batches.steps_per_epoch
    log_every = session.config.fit.log_every
    with policy_based.training(session, number, params, objective, total_steps=steps, log_every=log_every) as trainer:
        while not trainer.done:
            trainer.update(batches[trainer.step])
    return trainer.state.params


def loss(
    log_probs: jax.Array,
    values: jax.Array,
    batch: PolicyBatch,
    whole: PolicyBatch,
    *,
    beta: float,
    alpha: float,
) -> tuple[jax.Array, dict]:
    """DPO's, and with `alpha` RPO's, of a batch whose rows are chosen responses and then, in order, rejected ones."""
    # h(y) = log pi(y) / pi_ref(y)
    log_ratio = (log_probs - batch.numbers["ref_log_probs"]).sum(1)
    chosen, rejected = jnp.split(log_ratio, 2)
    there, _ = jnp.split(batch.response_mask.any(1), 2)
    count = jnp.maximum(whole.response_mask.any(1).sum() / 2, 1)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.where(there, x, 0).sum() / count

    margin = beta * (chosen - rejected)
    # -log sigmoid(beta (h(y_w) - h(y_l)))
    total = -mean(jax.nn.log_sigmoid(margin))
    metrics = {"right": mean(margin > 0), "margin": mean(margin), "chosen": mean(chosen), "rejected": mean(rejected)}
    if alpha:
        # alpha (-log pi(y_w)) / |y_w|
        likelihood, _ = jnp.split(log_probs.sum(1) / jnp.maximum(batch.response_mask.sum(1), 1), 2)
        total -= alpha * mean(likelihood)
    return total, metrics
