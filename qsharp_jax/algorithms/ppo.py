"""PPO: Schulman et al., "Proximal Policy Optimization Algorithms" (arXiv 1707.06347), with the KL in the reward.

    pi_theta <- pi_ref, V <- 0
    for lot l = 1, 2, ...:
        y ~ pi_theta(. | x) for some prompts x; pi_old <- pi_theta, V_old <- V
        r_t = [t is the last] r(x, y) - eta log pi_old(y_t | s_t) / pi_ref(y_t | s_t)              the objective's parts
        A_t = sum_{l >= 0} lambda^l delta_{t+l},   delta_t = r_t + V_old(s_{t+1}) - V_old(s_t)      GAE, undiscounted
        for some epochs, for each batch:
            rho_t = pi_theta(y_t | s_t) / pi_old(y_t | s_t)
            minimise  -mean_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)                                  (eq. 7)
                      + c mean_t (V(s_t) - (A_t + V_old(s_t)))^2                                                 (eq. 9)

V is a linear head on the policy's own trunk, which learns from it too if policy.detach_values is false. GAE:
arXiv 1506.02438, eq. 16. The KL's weight is collect.eta.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.algorithms import policy
from qsharp_jax.algorithms.policy import Numbers, PolicyBatch, Sampled
from qsharp_jax.generate import for_decoding
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.run import config as configs
from qsharp_jax.run.session import Session


def run(session: Session, ref: LanguageModel, after_round: Callable[[int, LanguageModel], None]) -> LanguageModel:
    """All rounds; `after_round` is told each round's number and policy."""
    config, params, made = session.config.ppo, policy.start(session, ref, value_head=True), None
    ref = for_decoding(ref)
    for number in range(1, session.config.rounds + 1):
        params = policy.improve(
            session,
            number,
            ref,
            params,
            worth=functools.partial(worth, eta=configs.kl_weight(session.config), gae_lambda=config.gae_lambda),
            loss=functools.partial(loss, clip=config.clip, value_weight=config.value_weight),
            prompts=session.config.policy.prompts,
            samples=session.config.collect.samples,
            epochs=config.epochs,
        )
        made = policy.finish(session, params)
        after_round(number, made)
    return made


def worth(lot: Sampled, *, eta: float, gae_lambda: float) -> Numbers:
    """Advantages and the values' targets, [N, M]."""
    # r_t = [t is the last] r - eta log pi_old / pi_ref
    rewards = lot.token_rewards - eta * (lot.log_probs - lot.ref_log_probs)
    found = advantages(rewards, lot.values, gae_lambda)
    return {"old_log_probs": lot.log_probs, "advantages": found, "returns": found + lot.values}


def advantages(rewards: np.ndarray, values: np.ndarray, gae_lambda: float) -> np.ndarray:
    """GAE of [N, M] token rewards and V(s_t), both 0 past a response's end."""
    # delta_t = r_t + V(s_{t+1}) - V(s_t);  A_t = delta_t + lambda A_{t+1}
    return policy.discounted_sum(rewards + policy.next_values(values) - values, gae_lambda)


def loss(
    log_probs: jax.Array,
    values: jax.Array,
    batch: PolicyBatch,
    whole: PolicyBatch,
    *,
    clip: float,
    value_weight: float,
) -> tuple[jax.Array, dict]:
    """Equation 9 without the entropy, which the KL to pi_ref stands for."""
    advantages = batch.numbers["advantages"]
    log_ratio = log_probs - batch.numbers["old_log_probs"]
    ratio = jnp.exp(log_ratio)
    # min(rho A, clip(rho, 1 - eps, 1 + eps) A)
    surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)
    policy_loss = -policy.a_token(surrogate, batch, whole)
    value_loss = policy.a_token((values - batch.numbers["returns"]) ** 2, batch, whole)
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "clipped": policy.a_token(jnp.abs(ratio - 1) > clip, batch, whole),
        "kl_to_old": policy.a_token(ratio - 1 - log_ratio, batch, whole),
    }
    return policy_loss + value_weight * value_loss, metrics
