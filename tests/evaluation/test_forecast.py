"""The forecast of a guide, against exact tilts of finite laws, and against all choices of k responses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import guidance
from qsharp_jax.evaluation import forecast


def test_a_guide_that_knows_the_reward_gives_the_optimal_policy():
    """u = exp(r / eta) / E exp(r / eta): reward and KL of the tilted Bernoulli law, in closed form."""
    rewards = np.asarray([1.0] * 30 + [0.0] * 70)
    for eta in (2.0, 0.5, 0.1):
        log_u = rewards / eta - np.log(0.3 * np.exp(1 / eta) + 0.7)
        p = 0.3 * np.exp(1 / eta) / (0.3 * np.exp(1 / eta) + 0.7)
        row = forecast.tilted(log_u, rewards)
        assert row["reward"] == pytest.approx(p, rel=1e-12)
        assert row["kl"] == pytest.approx(p * np.log(p / 0.3) + (1 - p) * np.log((1 - p) / 0.7), abs=1e-9)


def test_a_constant_guide_gives_pi_ref():
    row = forecast.tilted(np.full(5, 3.0), np.asarray([1.0, 0.0, 0.0, 2.0, -1.0]))
    assert row["reward"] == pytest.approx(0.4) and row["kl"] == pytest.approx(0, abs=1e-12)


def test_a_calibrated_guide_s_reward_is_bounded_by_its_resolution():
    """The reward tends to m + Var(p) / m as eta falls, since E exp(z / eta) grows in proportion to p."""
    p = np.repeat([0.1, 0.4, 0.9], 1000)
    rewards = np.concatenate([np.arange(1000) < 1000 * q for q in (0.1, 0.4, 0.9)]).astype(float)
    eta = 0.02
    row = forecast.tilted(np.log(1 - p + p * np.exp(1 / eta)), rewards)
    assert row["reward"] == pytest.approx(p.mean() + p.var() / p.mean(), rel=1e-6)


def test_weights_of_any_size_do_not_overflow():
    row = forecast.tilted(np.asarray([2000.0, 0.0, -2000.0]), np.asarray([1.0, 0.0, 0.0]))
    assert row["reward"] == 1.0 and row["kl"] == pytest.approx(np.log(3))


def test_a_power_tilts_each_prompt_s_law_on_its_own():
    """Over prompts of any mean reward, reward and KL are the means of those of p^a, normalized, in closed form."""
    ids, p, rewards = np.repeat(["a", "b"], 1000), np.tile(np.repeat([0.2, 0.8], 500), 2), np.zeros(2000)
    p[:500] = 0.4  # of "a"
    for level, begin in ((0.4, 0), (0.8, 500), (0.2, 1000), (0.8, 1500)):
        rewards[begin : begin + int(500 * level)] = 1
    row = forecast.tilted(forecast.to_power(np.log(p), 3.0, 1.0, ids), rewards)
    levels = np.asarray([[0.4, 0.8], [0.2, 0.8]])
    weights = levels**3 / (levels**3).sum(1, keepdims=True)
    assert row["reward"] == pytest.approx((weights * levels).sum(1).mean(), rel=1e-9)
    assert row["kl"] == pytest.approx((weights * np.log(2 * weights)).sum(1).mean(), rel=1e-9)


@pytest.mark.parametrize("temperature, power", [(0.7, 1.0), (1.0, 1.0), (2.0, 3.0)])
def test_a_forecast_of_single_tokens_is_what_the_sampler_does_at_a_temperature(temperature, power):
    """Rollouts in exact proportion to pi_ref at T, against softmax((log pi_ref + a log w) / T)."""
    counts, rewards = np.asarray([10, 20, 30, 40]), np.asarray([1.0, 0.5, 0.0, 0.2])
    logits, log_w = temperature * np.log(counts / 100), rewards / 0.3
    tempered = guidance.temper(
        jnp.asarray([logits + power * log_w], jnp.float32), jnp.asarray([temperature], jnp.float32)
    )
    policy = np.asarray(jax.nn.softmax(tempered[0]), float)
    log_u = (log_w - np.log(counts / 100 @ np.exp(log_w))).repeat(counts)
    row = forecast.tilted(forecast.to_power(log_u, power, temperature, ["a"] * 100), rewards.repeat(counts))
    assert row["reward"] == pytest.approx(policy @ rewards, abs=1e-6)
    assert row["kl"] == pytest.approx(policy @ np.log(policy / (counts / 100)), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_best_of_k_is_the_mean_over_all_choices(seed):
    rng = np.random.default_rng(seed)
    ids = ["a"] * 6 + ["b"] * 4 + ["c"] * 2
    final, rewards = rng.integers(0, 3, 12) / 3, rng.normal(size=12)  # with ties
    means = []
    for begin, end in ((0, 6), (6, 10)):
        best = []
        for chosen in itertools.combinations(range(begin, end), 4):
            top = max(final[i] for i in chosen)
            tied = [i for i in range(begin, end) if final[i] == top]  # which of the tied is chosen is random
            best.append(np.mean([rewards[i] for i in tied]))
        means.append(np.mean(best))
    assert forecast.best_of(4, final, rewards, ids) == pytest.approx(np.mean(means), rel=1e-12)


def test_too_few_responses_have_no_best():
    assert np.isnan(forecast.best_of(4, np.zeros(3), np.zeros(3), ["a"] * 3))
