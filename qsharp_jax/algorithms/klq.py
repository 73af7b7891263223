"""KLQ: "KL-Regularised Q-Learning: A Token-level Action-Value perspective on Online RLHF" (arXiv 2508.17000).

The soft optimal policy is pi_ref exp((Q - V) / tau), so a policy and a state value together are an action value:

    Q(s, a) = tau log pi_theta(a | s) / pi_ref(a | s) + V(s)

    pi_theta <- pi_ref, V <- 0
    for lot l = 1, 2, ...:
        y ~ pi_theta(. | x) for some prompts x; Q_old <- Q, V_old <- V
        delta_t = r_t + V_old(s_{t+1}) - Q_old(s_t, y_t)                                 r_t is 0 but at the last token
        Delta_t = delta_t + lambda Delta_{t+1}
        G_t = Q_old(s_t, y_t) + alpha Delta_t                                            lambda-return on the soft Q
        for some epochs, for each batch:
            minimise  mean_t (Q(s_t, y_t) - G_t)^2

Undiscounted, and V is 0 past the end. At theta_old the gradient is -2 alpha A_t (tau grad log pi + grad V) with A the
GAE of the KL-penalised reward: PPO's, without a clip. V is a linear head on the policy's own trunk, which learns from
it too if policy.detach_values is false: then 1 / tau times as much as from log pi. tau, the KL's weight, is
config.klq.tau, or collect.eta.
"""

import functools
from collections.abc import Callable

import jax

from qsharp_jax.algorithms import policy
from qsharp_jax.algorithms.policy import Numbers, PolicyBatch, Sampled
from qsharp_jax.generate import for_decoding
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.run import config as configs
from qsharp_jax.run.session import Session


def run(session: Session, ref: LanguageModel, after_round: Callable[[int, LanguageModel], None]) -> LanguageModel:
    """All rounds; `after_round` is told each round's number and policy."""
    config, params, made = session.config.klq, policy.start(session, ref, value_head=True), None
    ref = for_decoding(ref)
    for number in range(1, session.config.rounds + 1):
        params = policy.improve(
            session,
            number,
            ref,
            params,
            worth=functools.partial(
                worth, tau=configs.kl_weight(session.config), return_lambda=config.return_lambda, alpha=config.alpha
            ),
            loss=functools.partial(loss, tau=configs.kl_weight(session.config)),
            prompts=session.config.policy.prompts,
            samples=session.config.collect.samples,
            epochs=config.epochs,
        )
        made = policy.finish(session, params)
        after_round(number, made)
    return made


def worth(lot: Sampled, *, tau: float, return_lambda: float, alpha: float) -> Numbers:
    """The targets G_t, [N, M], and what a log-ratio needs."""
    # Q_old = tau log pi / pi_ref + V_old
    q = tau * (lot.log_probs - lot.ref_log_probs) + lot.values
    # delta_t = r_t + V_old(s_{t+1}) - Q_old(s_t, y_t)
    delta = lot.token_rewards + policy.next_values(lot.values) - q
    # G_t = Q_old + alpha Delta_t;  Delta_t = delta_t + lambda Delta_{t+1}
    targets = q + alpha * policy.discounted_sum(delta, return_lambda)
    return {"ref_log_probs": lot.ref_log_probs, "targets": targets}


def loss(
    log_probs: jax.Array, values: jax.Array, batch: PolicyBatch, whole: PolicyBatch, *, tau: float
) -> tuple[jax.Array, dict]:
    """mean_t (Q - G)^2."""
    q = tau * (log_probs - batch.numbers["ref_log_probs"]) + values
    return policy.a_token((q - batch.numbers["targets"]) ** 2, batch, whole), {
        "value": policy.a_token(values, batch, whole)
    }
