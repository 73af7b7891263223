"""REINFORCE with a baseline of the batch's own rollouts (Williams 1992; leave-one-out: Kool et al. 2019, Ahmadian et
al., "Back to Basics", arXiv 2402.14740).

    pi_theta <- pi_ref
    for each batch of problems:
        y_1 .. y_n ~ pi_theta(. | x) for every prompt x of it, with rewards r_i               sample
        R_i = r_i - eta log pi_theta(y_i | x) / pi_ref(y_i | x)                               token targets
        A_i = R_i - (sum_{j != i} R_j) / (n - 1)                                              leave-one-out baseline
        theta <- theta + lr * mean_i A_i grad log pi_theta(y_i | x)                           update

With config.reinforce.baseline "mean" the baseline is the batch's mean of R. config.reinforce.greedy is the variant in
Q#'s own program, one response of the likeliest tokens per prompt, which does not explore. The weight of the KL is
collect.eta.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from qsharp_jax.algorithms.base import Algorithm
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.settings import TRUTH, one_of, setting

if TYPE_CHECKING:
    import jax

    from qsharp_jax.algorithms.policy_based import RolloutBatch
    from qsharp_jax.algorithms.policy_scores import Numbers, PolicyBatch
    from qsharp_jax.models.decoder import LanguageModel
    from qsharp_jax.run.session import Session


@dataclasses.dataclass(frozen=True)
class Settings:
    """REINFORCE."""

    baseline: str = setting(
        "leave_one_out", one_of("leave_one_out", "mean"), "of the prompt's other samples, or of all rollouts at hand"
    )
    greedy: bool = setting(False, TRUTH, "the paper's variant: the most probable tokens, one response per prompt")


def run(session: Session, ref: LanguageModel, after_round: Callable[[int, LanguageModel], None]) -> LanguageModel:
    """Train the policy; `after_round` is called with each round's number and policy."""
    from qsharp_jax.algorithms import policy_based
    from qsharp_jax.algorithms.policy_based import OnPolicyTraining
    from qsharp_jax.decoding import for_decoding

    config, settings, eta = session.config, session.config.reinforce, session.config.collect.eta
    samples = 1 if settings.greedy else config.collect.samples
    prompts = config.policy.batch_size // samples  # a batch of rollouts is one update: the next needs the new policy
    params, ref = policy_based.start(session, ref), for_decoding(ref)
    for number in range(1, config.rounds + 1):
        training = OnPolicyTraining(session, number, ref, prompts, samples, greedy=settings.greedy)
        with training.resume(params, loss):
            for index in training.remaining():
                rollout_batch = training.sample(index)
                targets = token_targets(rollout_batch, eta=eta, baseline=settings.baseline)
                for minibatch in training.minibatches(rollout_batch, targets):
                    training.update(minibatch)
        params = training.params
        policy = policy_based.finish(session, params)
        after_round(number, policy)
    return policy


def token_targets(rollout_batch: RolloutBatch, *, eta: float, baseline: str) -> Numbers:
    """Compute A_i at every token of response i, [N, M]."""
    # R = r - eta log pi(y) / pi_ref(y)
    log_ratios = (rollout_batch.log_probs - rollout_batch.ref_log_probs).sum(1)
    regularized = (rollout_batch.rewards - eta * log_ratios).reshape(-1, rollout_batch.samples)  # [prompt, sample]
    if baseline == "leave_one_out":
        # b_i = (sum_{j != i} R_j) / (n - 1)
        base = (regularized.sum(1, keepdims=True) - regularized) / (rollout_batch.samples - 1)
    else:
        base = regularized.mean()
    return {"advantages": np.where(rollout_batch.mask, (regularized - base).reshape(-1, 1), 0.0)}


def loss(log_probs: jax.Array, values: jax.Array, batch: PolicyBatch, whole: PolicyBatch) -> tuple[jax.Array, dict]:
    """Compute the loss whose gradient is -mean_i A_i grad log pi(y_i | x)."""
    from qsharp_jax.algorithms.policy_scores import mean_per_response

    return -mean_per_response(batch.numbers["advantages"] * log_probs, batch, whole), {}


def check(config: ConfigDict) -> None:
    """Check that the baseline has samples to be computed from, and that a step takes whole prompts (UserError)."""
    samples = 1 if config.reinforce.greedy else config.collect.samples
    if config.reinforce.baseline == "leave_one_out" and samples < 2:
        raise UserError(
            "config.reinforce.baseline leave_one_out needs other samples of a prompt: give config.collect.samples"
            " of at least 2 and config.reinforce.greedy false, or the baseline mean"
        )
    if config.policy.batch_size % samples:
        raise UserError(
            f"config.policy.batch_size is {config.policy.batch_size}; reinforce takes whole prompts, so give a multiple"
            f" of config.collect.samples, {samples}"
        )


REINFORCE = Algorithm(
    name="reinforce", label="REINFORCE", color="#7a2f8f", learns="policy", on_policy=True, settings=Settings(),
    run=run, check=check,
)  # fmt: skip
