"""PPO: Schulman et al., "Proximal Policy Optimization Algorithms" (arXiv 1707.06347), with the KL in the reward.

    pi_theta <- pi_ref, V <- 0
    for each batch of problems:
        y ~ pi_theta(. | x) for its prompts x; pi_old <- pi_theta, V_old <- V                       sample
        r_t = [t is the last] r(x, y) - eta log pi_old(y_t | s_t) / pi_ref(y_t | s_t)               token targets
        A_t = sum_{l >= 0} lambda^l delta_{t+l},   delta_t = r_t + V_old(s_{t+1}) - V_old(s_t)      GAE, undiscounted
        for some epochs, for each minibatch:                                                        update
            rho_t = pi_theta(y_t | s_t) / pi_old(y_t | s_t)
            minimize  -mean_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)                     (eq. 7)
                      + c mean_t (V(s_t) - (A_t + V_old(s_t)))^2                                    (eq. 9)

V is a linear head on the policy's trunk, which also learns from it if policy.detach_values is false. GAE: arXiv
1506.02438, eq. 16. The weight of the KL is collect.eta.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from qsharp_jax.algorithms.base import Algorithm
from qsharp_jax.system.settings import NOT_NEGATIVE, UNIT, WITHIN, setting, whole

if TYPE_CHECKING:
    import jax

    from qsharp_jax.algorithms.policy_based import RolloutBatch
    from qsharp_jax.algorithms.policy_scores import Numbers, PolicyBatch
    from qsharp_jax.models.decoder import LanguageModel
    from qsharp_jax.run.session import Session


@dataclasses.dataclass(frozen=True)
class Settings:
    """Proximal policy optimization."""

    epochs: int = setting(4, whole(1), "over each batch of rollouts")
    clip: float = setting(0.2, WITHIN, "of the ratio to the policy that sampled")
    gae_lambda: float = setting(0.95, UNIT, "of the advantages")
    value_weight: float = setting(0.5, NOT_NEGATIVE, "of the value head's squared error")


def run(session: Session, ref: LanguageModel, after_round: Callable[[int, LanguageModel], None]) -> LanguageModel:
    """Train the policy; `after_round` is called with each round's number and policy."""
    from qsharp_jax.algorithms import policy_based
    from qsharp_jax.algorithms.policy_based import OnPolicyTraining
    from qsharp_jax.decoding import for_decoding

    config, settings, eta = session.config, session.config.ppo, session.config.collect.eta
    clipped = functools.partial(loss, clip=settings.clip, value_weight=settings.value_weight)
    params, ref = policy_based.start(session, ref, value_head=True), for_decoding(ref)
    for number in range(1, config.rounds + 1):
        training = OnPolicyTraining(
            session, number, ref, config.policy.prompts, config.collect.samples, settings.epochs
        )
        with training.resume(params, clipped):
            for index in training.remaining():
                rollout_batch = training.sample(index)
                targets = token_targets(rollout_batch, eta=eta, gae_lambda=settings.gae_lambda)
                for _ in range(settings.epochs):
                    for minibatch in training.minibatches(rollout_batch, targets):
                        training.update(minibatch)
        params = training.params
        policy = policy_based.finish(session, params)
        after_round(number, policy)
    return policy


def token_targets(rollout_batch: RolloutBatch, *, eta: float, gae_lambda: float) -> Numbers:
    """Compute advantages and targets of the values, [N, M] each."""
    # r_t = [t is the last] r - eta log pi_old / pi_ref
    rewards = rollout_batch.token_rewards - eta * (rollout_batch.log_probs - rollout_batch.ref_log_probs)
    gae = advantages(rewards, rollout_batch.values, gae_lambda)
    return {"old_log_probs": rollout_batch.log_probs, "advantages": gae, "returns": gae + rollout_batch.values}


def advantages(rewards: np.ndarray, values: np.ndarray, gae_lambda: float) -> np.ndarray:
    """GAE of token rewards and V(s_t), [N, M] each, both 0 past a response's end."""
    from qsharp_jax.algorithms.policy_based import discounted_sum, next_values

    # delta_t = r_t + V(s_{t+1}) - V(s_t);  A_t = delta_t + lambda A_{t+1}
    return discounted_sum(rewards + next_values(values) - values, gae_lambda)


def loss(
    log_probs: jax.Array, values: jax.Array, batch: PolicyBatch, whole: PolicyBatch, *, clip: float, value_weight: float
) -> tuple[jax.Array, dict]:
    """Equation 9 without its entropy term, which the KL to pi_ref replaces."""
    import jax.numpy as jnp

    from qsharp_jax.algorithms.policy_scores import mean_per_token

    advantages = batch.numbers["advantages"]
    log_ratio = log_probs - batch.numbers["old_log_probs"]
    ratio = jnp.exp(log_ratio)
    # min(rho A, clip(rho, 1 - eps, 1 + eps) A)
    surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)
    policy_loss = -mean_per_token(surrogate, batch, whole)
    value_loss = mean_per_token((values - batch.numbers["returns"]) ** 2, batch, whole)
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "clipped": mean_per_token(jnp.abs(ratio - 1) > clip, batch, whole),
        "kl_to_old": mean_per_token(ratio - 1 - log_ratio, batch, whole),
    }
    return policy_loss + value_weight * value_loss, metrics


PPO = Algorithm(name="ppo", label="PPO", color="#2c7a4b", learns="policy", on_policy=True, settings=Settings(), run=run)
