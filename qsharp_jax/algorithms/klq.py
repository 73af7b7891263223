"""KLQ: "KL-Regularised Q-Learning: A Token-level Action-Value perspective on Online RLHF" (arXiv 2508.17000).

The soft optimal policy is pi_ref exp((Q - V) / tau), so a policy and a state value together are an action value:

    Q(s, a) = tau log pi_theta(a | s) / pi_ref(a | s) + V(s)

    pi_theta <- pi_ref, V <- 0
    for each batch of problems:
        y ~ pi_theta(. | x) for its prompts x; Q_old <- Q, V_old <- V                    sample
        delta_t = r_t + V_old(s_{t+1}) - Q_old(s_t, y_t), r_t is 0 but at the last       token targets
        Delta_t = delta_t + lambda Delta_{t+1}
        G_t = Q_old(s_t, y_t) + alpha Delta_t                                            lambda-return on the soft Q
        for some epochs, for each minibatch:                                             update
            minimize  mean_t (Q(s_t, y_t) - G_t)^2

It is undiscounted, and V is 0 past the end. At theta_old the gradient is -2 alpha A_t (tau grad log pi + grad V), with
A the GAE (arXiv 1506.02438) of the KL-penalized reward. V is a linear head on the policy's trunk, which also learns
from it if policy.detach_values is false: then 1 / tau times as much as from log pi. tau, the weight of the KL, is
config.klq.tau, by default collect.eta.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from qsharp_jax.algorithms.base import Algorithm
from qsharp_jax.sampling import OWN_ETA
from qsharp_jax.system.settings import SHARE, UNIT, setting, whole

if TYPE_CHECKING:
    import jax

    from qsharp_jax.algorithms.policy_based import RolloutBatch
    from qsharp_jax.algorithms.policy_scores import Numbers, PolicyBatch
    from qsharp_jax.models.decoder import LanguageModel
    from qsharp_jax.run.session import Session


@dataclasses.dataclass(frozen=True)
class Settings:
    """KL-regularized Q-learning."""

    tau: float | None = setting(None, OWN_ETA, "weight of the KL; none: collect.eta")
    epochs: int = setting(4, whole(1), "over each batch of rollouts")
    return_lambda: float = setting(0.95, UNIT, "of the returns")
    alpha: float = setting(1.0, SHARE, "how far the targets go from the old action value to the lambda-return")


def run(session: Session, ref: LanguageModel, after_round: Callable[[int, LanguageModel], None]) -> LanguageModel:
    """Train the policy; `after_round` is called with each round's number and policy."""
    from qsharp_jax.algorithms import policy_based
    from qsharp_jax.algorithms.policy_based import OnPolicyTraining
    from qsharp_jax.decoding import for_decoding
    from qsharp_jax.run.config import kl_weight

    config, settings, tau = session.config, session.config.klq, kl_weight(session.config)
    squared = functools.partial(loss, tau=tau)
    params, ref = policy_based.start(session, ref, value_head=True), for_decoding(ref)
    for number in range(1, config.rounds + 1):
        training = OnPolicyTraining(
            session, number, ref, config.policy.prompts, config.collect.samples, settings.epochs
        )
        with training.resume(params, squared):
            for index in training.remaining():
                rollout_batch = training.sample(index)
                targets = token_targets(
                    rollout_batch, tau=tau, return_lambda=settings.return_lambda, alpha=settings.alpha
                )
                for _ in range(settings.epochs):
                    for minibatch in training.minibatches(rollout_batch, targets):
                        training.update(minibatch)
        params = training.params
        policy = policy_based.finish(session, params)
        after_round(number, policy)
    return policy


def token_targets(rollout_batch: RolloutBatch, *, tau: float, return_lambda: float, alpha: float) -> Numbers:
    """Compute the targets G_t, [N, M], beside the reference's log-probabilities that Q needs."""
    from qsharp_jax.algorithms.policy_based import discounted_sum, next_values

    # Q_old = tau log pi / pi_ref + V_old
    q = tau * (rollout_batch.log_probs - rollout_batch.ref_log_probs) + rollout_batch.values
    # delta_t = r_t + V_old(s_{t+1}) - Q_old(s_t, y_t)
    delta = rollout_batch.token_rewards + next_values(rollout_batch.values) - q
    # G_t = Q_old + alpha Delta_t;  Delta_t = delta_t + lambda Delta_{t+1}
    targets = q + alpha * discounted_sum(delta, return_lambda)
    return {"ref_log_probs": rollout_batch.ref_log_probs, "targets": targets}


def loss(
    log_probs: jax.Array, values: jax.Array, batch: PolicyBatch, whole: PolicyBatch, *, tau: float
) -> tuple[jax.Array, dict]:
    """Compute mean_t (Q - G)^2."""
    from qsharp_jax.algorithms.policy_scores import mean_per_token

    q = tau * (log_probs - batch.numbers["ref_log_probs"]) + values
    return mean_per_token((q - batch.numbers["targets"]) ** 2, batch, whole), {
        "value": mean_per_token(values, batch, whole)
    }


KLQ = Algorithm(
    name="klq", label="KLQ", color="#1fa39a", learns="policy", on_policy=True, settings=Settings(), eta="tau", run=run
)
