"""Values against the mean reward of continuations, where the true values are known."""

import numpy as np
import pytest

from benchmarks import true_values

PROMPTS, EACH, CONTINUATIONS = 400, 8, 4


def drawn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True values, of which prompts share a part with a variance of 1 and 0.04 is their own; rewards; prompts."""
    ids = np.repeat(np.arange(PROMPTS), EACH)
    truth = np.repeat(rng.normal(size=PROMPTS), EACH) + 0.2 * rng.normal(size=len(ids))
    return truth, truth[:, None] + 0.3 * rng.normal(size=(len(ids), CONTINUATIONS)), ids


def test_the_noise_of_continuations_is_not_taken_for_the_guide_s():
    truth, rewards, ids = drawn(np.random.default_rng(0))
    row = true_values.compare(truth, rewards, ids)
    assert row["variance"] == pytest.approx(0.04, rel=0.1)
    assert row["error"] == pytest.approx(0, abs=0.05)
    assert row["correlation"] == pytest.approx(1, abs=0.03) and row["low"] < row["correlation"] < row["high"]


def test_errors_within_prompts_count_and_those_of_whole_prompts_do_not():
    rng = np.random.default_rng(1)
    truth, rewards, ids = drawn(rng)
    off = truth + np.repeat(5 * rng.normal(size=PROMPTS), EACH) + 0.1 * rng.normal(size=len(ids))
    row = true_values.compare(off, rewards, ids)
    assert row["error"] == pytest.approx(0.01 / 0.04, rel=0.15)
    assert row["correlation"] == pytest.approx(np.sqrt(0.04 / 0.05), abs=0.03)
    flat = true_values.compare(np.repeat(rng.normal(size=PROMPTS), EACH) + 1e-3 * truth, rewards, ids)
    assert flat["error"] == pytest.approx(1, abs=0.01), "to know the prompt alone explains nothing"
