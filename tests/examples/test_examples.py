"""Each example runs, draws its picture, and shows what it says that it shows."""

import common
import frontier
import likelihood
import matplotlib.pyplot as plt
import numpy as np
import pytest
import rare_reward
import rate


def shown(example, tmp_path):
    """Run the example quickly, and return its numbers; its plot and its table are made too."""
    found = example.run(quick=True)
    figure = example.draw(found)
    figure.savefig(tmp_path / "picture.png")
    plt.close(figure)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert len(example.words(found).splitlines()) >= 5
    return found


def test_cd_keeps_to_the_sure_reward_and_qsharp_finds_the_rare_one(tmp_path):
    """Limits as eta falls; Q# is the optimal policy at every eta."""
    found = shown(rare_reward, tmp_path)
    assert (np.diff(found["etas"]) < 0).all()
    for name in ("right", "reward", "kl", "objective"):
        np.testing.assert_allclose(found["qsharp"][name], found["exact"][name], atol=1e-6)
    assert (np.diff(found["qsharp"]["right"]) > -1e-9).all() and (np.diff(found["cd"]["right"]) < 0).all()
    np.testing.assert_allclose([found["cd"]["reward"][-1], found["qsharp"]["reward"][-1]], [0.1, 1.0], atol=1e-4)
    assert (found["cd"]["objective"] < found["qsharp"]["objective"]).all()


def test_the_loss_of_a_fitted_table_falls_as_one_over_n_with_the_constant_of_theory(tmp_path):
    """At a million rollouts within a fifth; the paper's bounds alone would allow a slope of -1/2."""
    found = shown(rate, tmp_path)
    for eta in rate.ETAS:
        assert -1.2 < found["slope"][eta] < -0.9, eta
        ratio = found["mean"][eta] * found["rollouts"] / found["constant"][eta]
        assert 0.8 < ratio[-1] < 1.2, eta


def test_squared_loss_needs_rollouts_by_the_square_of_what_the_likelihood_needs(tmp_path):
    """Slopes of log n by log epsilon: -2 and -1, in the bandit and in the chain."""
    found = shown(likelihood, tmp_path)
    for part in found.values():
        assert -1.2 < part["slope"]["likelihood"] < -0.85
        assert -2.2 < part["slope"]["squared"] < -1.8
        assert part["enough"]["squared"][-1] > 50 * part["enough"]["likelihood"][-1]
        np.testing.assert_allclose(part["enough"]["squared"], part["expected"]["squared"], rtol=0.25)


def test_with_a_table_both_losses_give_the_average():
    rewards, grid = np.array([1.0, 0, 0, 0, 1, 0, 0, 0, 0, 0]), np.linspace(0.01, 0.99, 99)
    for loss in likelihood.LOSSES:
        total = sum(likelihood.nll(loss, grid, reward) for reward in rewards)
        assert grid[np.argmin(total)] == pytest.approx(0.2)


def test_the_outcomes_of_a_rollout_are_all_there_and_the_true_guide_gains():
    """Expected gains of the likelihood are KL divergences, those of squared loss are squares: neither is negative."""
    for case in likelihood.CASES:
        probabilities, gains = likelihood.outcomes(case, 1e-3)
        assert probabilities.sum() == pytest.approx(1) and (probabilities >= 0).all()
        assert all(probabilities @ gain > 0 for gain in gains.values())
    probabilities, gains = likelihood.outcomes("bandit", 1e-3)
    quarter_kl = 8e-3 * np.log(8) + (1 - 8e-3) * np.log((1 - 8e-3) / (1 - 1e-3))
    other_kl = 1e-3 * np.log(1 / 8) + (1 - 1e-3) * np.log((1 - 1e-3) / (1 - 8e-3))
    coin_kl = -0.5 * np.log(1 - (2 * 7e-3) ** 2)
    want = coin_kl / 2 + quarter_kl / 4 + other_kl / 4
    np.testing.assert_allclose(probabilities @ gains["likelihood"], want, rtol=1e-9)
    np.testing.assert_allclose(probabilities @ gains["squared"], 0.5 * (7e-3) ** 2, rtol=1e-9)


def test_qsharp_is_on_the_frontier_and_everything_else_below(tmp_path):
    found = shown(frontier, tmp_path)
    below = found["below"]
    for name in ("exact", "qsharp"):
        np.testing.assert_allclose(below[name], 0, atol=1e-6)
    for name, gaps in below.items():
        assert (gaps > -1e-6).all(), name
    assert below["cd"].max() > 0.05 and below["best"].max() > 0.02 and below["expectation"][0] > 0.02
    assert 0 < below["qsharp_fitted"].max() < below["cd_fitted"].max()


def test_the_command_line_writes_the_picture_and_prints_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rare_reward.py", "--quick", "--out", str(tmp_path / "new")])
    common.main("rare_reward", rare_reward.run, rare_reward.draw, rare_reward.words)
    assert (tmp_path / "new" / "rare_reward.png").exists()
    assert "right pi*" in capsys.readouterr().out
