"""Values that come early or late, on trees of two tokens whose responses are all equally likely."""

import itertools

import numpy as np
import pytest

from benchmarks import early_values

TOKENS = 3
RESPONSES = np.asarray(list(itertools.product(range(TOKENS), repeat=2)))  # every one once: pi_ref's law itself
REWARDS = np.asarray([0.0, 0.2, 0.1, 0.5, 0.9, 0.6, 0.7, 1.0, 0.8])


def steps_of(first: np.ndarray, second: np.ndarray, prompt: np.ndarray) -> early_values.Steps:
    """Log-weights [L] of the prompt, [TOKENS, L] of first tokens, [TOKENS, TOKENS, L] of whole responses."""
    log_weights = np.stack([np.broadcast_to(first, (9, *first.shape)), second[RESPONSES[:, 0]]], axis=1)
    before = np.stack([np.broadcast_to(prompt, (9, *prompt.shape)), first[RESPONSES[:, 0]]], axis=1)
    return early_values.Steps(np.full((9, 2, TOKENS), -np.log(TOKENS)), log_weights, before, RESPONSES)


def exact() -> early_values.Steps:
    """Weights that are the means of those after them, at every eta."""
    second = REWARDS.reshape(TOKENS, TOKENS)[..., None] / np.asarray(early_values.ETAS)
    first = np.logaddexp.reduce(second, axis=1) - np.log(TOKENS)
    return steps_of(first, second, np.logaddexp.reduce(first, axis=0) - np.log(TOKENS))


@pytest.mark.parametrize("eta", range(len(early_values.ETAS)))
def test_of_exact_values_nothing_comes_late(eta):
    row = early_values.line(exact(), np.full(9, 2), REWARDS, eta)
    weights = np.exp(REWARDS / early_values.ETAS[eta])
    weights /= weights.sum()
    assert row["reward"] == pytest.approx(weights @ REWARDS) == row["whole_reward"]
    assert row["kl"] == pytest.approx(weights @ np.log(9 * weights), abs=1e-12) == row["whole_kl"]
    assert row["effective"] == pytest.approx(1 / (weights @ weights)) and row["late"] == pytest.approx(0, abs=1e-12)


def test_a_guide_that_sees_the_first_token_s_worth_a_step_later_tilts_the_second_alone():
    steps = exact()
    blind = steps_of(np.zeros((TOKENS, len(early_values.ETAS))), steps.log_weights[::TOKENS, 1], steps.before[0, 0])
    eta = early_values.ETAS.index(0.5)
    row = early_values.line(blind, np.full(9, 2), REWARDS, eta)
    policy = np.exp(REWARDS.reshape(TOKENS, TOKENS) / 0.5)
    policy /= policy.sum(1, keepdims=True)  # of the second token; the first is pi_ref's
    assert row["reward"] == pytest.approx((policy * REWARDS.reshape(TOKENS, TOKENS)).sum(1).mean())
    assert row["kl"] == pytest.approx((policy * np.log(TOKENS * policy)).sum(1).mean())
    assert row["late"] > 0.1 and row["whole_reward"] > row["reward"]


def test_a_token_that_is_no_candidate_gains_nothing():
    steps = exact()
    unknown = steps._replace(place=np.where(RESPONSES == 2, -1, RESPONSES))
    gain, _ = early_values.gains(unknown, 0)
    of_all, _ = early_values.gains(steps, 0)
    assert (gain == np.where(RESPONSES == 2, 0, of_all)).all() and of_all.all()
