"""REINFORCE with a baseline of the batch's own rollouts (Williams 1992; leave-one-out: Kool et al. 2019, Ahmadian et
al., "Back to Basics", arXiv 2402.14740).

    pi_theta <- pi_ref
    for each batch of problems:
        y_1 .. y_n ~ pi_theta(. | x) for every prompt x of it, with rewards r_i               sample
        R_i = r_i - eta log pi_theta(y_i | x) / pi_ref(y_i | x)                               token targets
        A_i = R_i - (sum_{j != i} R_j) / (n - 1)                                              leave-one-out baseline
        theta <- theta + lr * mean_i A_i grad log pi_theta(y_i | x)                           update

With config.reinforce.baseline "mean" the baseline is the mean of all R of the batch. config.reinforce.greedy is the
variant of Q#'s own program, one response of the likeliest tokens per prompt: it does not explore. The weight of the KL
is collect.eta.
"""

from collections.abc import Callable

import jax
import numpy as np

from qsharp_jax.algorithms import policy_based
from qsharp_jax.algorithms.policy_based import OnPolicyTraining, RolloutBatch
from qsharp_jax.algorithms.policy_scores import Numbers, PolicyBatch, mean_per_response
from qsharp_jax.generate import for_decoding
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.run import config as configs
from qsharp_jax.run.session import Session


def run(session: Session, ref: LanguageModel, after_round: Callable[[int, LanguageModel], None]) -> LanguageModel:
    """Train the policy; `after_round` is called with each round's number and policy."""
    config, settings, eta = session.config, session.config.reinforce, configs.kl_weight(session.config)
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
    """The loss whose gradient is -mean_i A_i grad log pi(y_i | x)."""
    return -mean_per_response(batch.numbers["advantages"] * log_probs, batch, whole), {}
