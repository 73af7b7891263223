"""REINFORCE with a baseline of the batch's own rollouts (Williams 1992; leave-one-out: Kool et al. 2019, Ahmadian et
al., "Back to Basics", arXiv 2402.14740).

    pi_theta <- pi_ref
    for lot l = 1, 2, ...:
        y_1 .. y_n ~ pi_theta(. | x) for every prompt x of the lot, with rewards r_i
        R_i = r_i - eta log pi_theta(y_i | x) / pi_ref(y_i | x)                              the objective's own sample
        A_i = R_i - (sum_{j != i} R_j) / (n - 1)                                             leave-one-out baseline
        theta <- theta + lr * mean_i A_i grad log pi_theta(y_i | x)

`config.reinforce.baseline` "mean" takes the mean of all R of the lot instead. `config.reinforce.greedy` is the variant
of Q#'s own program, one response of the likeliest tokens a prompt: it does not explore. The KL's weight is collect.eta.
"""

from collections.abc import Callable

import jax
import numpy as np

from qsharp_jax.algorithms import policy
from qsharp_jax.algorithms.policy import PolicyBatch, Sampled
from qsharp_jax.generate import for_decoding
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.run import config as configs
from qsharp_jax.run.session import Session


def run(session: Session, ref: LanguageModel, after_round: Callable[[int, LanguageModel], None]) -> LanguageModel:
    """All rounds; `after_round` is told each round's number and policy."""
    config, params, made = session.config.reinforce, policy.start(session, ref), None
    samples = 1 if config.greedy else session.config.collect.samples
    ref = for_decoding(ref)
    for number in range(1, session.config.rounds + 1):
        params = policy.improve(
            session,
            number,
            ref,
            params,
            worth=lambda lot: {"advantages": advantages(lot, configs.kl_weight(session.config), config.baseline)},
            loss=loss,
            prompts=session.config.policy.batch_size // samples,  # a lot is one batch: the next needs the new policy
            samples=samples,
            greedy=config.greedy,
        )
        made = policy.finish(session, params)
        after_round(number, made)
    return made


def advantages(lot: Sampled, eta: float, baseline: str) -> np.ndarray:
    """A_i at every token of response i, [N, M]."""
    # R = r - eta log pi(y) / pi_ref(y)
    regularised = lot.rewards - eta * (lot.log_probs - lot.ref_log_probs).sum(1)
    by_prompt = regularised.reshape(-1, lot.samples)
    if baseline == "leave_one_out":
        # b_i = (sum_{j != i} R_j) / (n - 1)
        base = (by_prompt.sum(1, keepdims=True) - by_prompt) / (lot.samples - 1)
    else:
        base = by_prompt.mean()
    return np.where(lot.mask, (by_prompt - base).reshape(-1, 1), 0.0)


def loss(log_probs: jax.Array, values: jax.Array, batch: PolicyBatch, whole: PolicyBatch) -> tuple[jax.Array, dict]:
    """Its gradient is -mean_i A_i grad log pi(y_i | x)."""
    return -policy.a_response(batch.numbers["advantages"] * log_probs, batch, whole), {}
