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

Undiscounted, and V is 0 past the end. At theta_old the gradient is -2 alpha A_t (tau grad log pi + grad V) with A the
GAE of the KL-penalized reward: PPO's, without a clip. V is a linear head on the policy's own trunk, which learns from
it too if policy.detach_values is false: then 1 / tau times as much as from log pi. tau, the weight of the KL, is
config.klq.tau, or collect.eta.
"""

import functools
from collections.abc import Callable

import jax

from qsharp_jax.algorithms import policy_based
from qsharp_jax.algorithms.policy_based import OnPolicyTraining, RolloutBatch
from qsharp_jax.algorithms.policy_scores import Numbers, PolicyBatch, mean_per_token
from qsharp_jax.generate import for_decoding
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.run import config as configs
from qsharp_jax.run.session import Session


def run(session: Session, ref: LanguageModel, after_round: Callable[[int, LanguageModel], None]) -> LanguageModel:
    """Train the policy; `after_round` is called with each round's number and policy."""
    config, settings, tau = session.config, session.config.klq, configs.kl_weight(session.config)
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
    # Q_old = tau log pi / pi_ref + V_old
    q = tau * (rollout_batch.log_probs - rollout_batch.ref_log_probs) + rollout_batch.values
    # delta_t = r_t + V_old(s_{t+1}) - Q_old(s_t, y_t)
    delta = rollout_batch.token_rewards + policy_based.next_values(rollout_batch.values) - q
    # G_t = Q_old + alpha Delta_t;  Delta_t = delta_t + lambda Delta_{t+1}
    targets = q + alpha * policy_based.discounted_sum(delta, return_lambda)
    return {"ref_log_probs": rollout_batch.ref_log_probs, "targets": targets}


def loss(
    log_probs: jax.Array, values: jax.Array, batch: PolicyBatch, whole: PolicyBatch, *, tau: float
) -> tuple[jax.Array, dict]:
    """mean_t (Q - G)^2."""
    q = tau * (log_probs - batch.numbers["ref_log_probs"]) + values
    return mean_per_token((q - batch.numbers["targets"]) ** 2, batch, whole), {
        "value": mean_per_token(values, batch, whole)
    }
