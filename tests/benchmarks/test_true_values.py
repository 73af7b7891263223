"""Values against the mean reward of continuations, where the true values are known."""

import helpers
import numpy as np
import pytest

from benchmarks import true_values
from qsharp_jax.data.batches import Example
from qsharp_jax.data.records import Rollout, write_shard
from qsharp_jax.evaluation.samples import samples_path, write_samples
from qsharp_jax.run import models, problems

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


def test_the_responses_are_held_out_rollouts_or_the_test_s_samples(tmp_path):
    session = helpers.session(tmp_path, "fit.holdout=0.5")
    train, test = problems.all_train_problems(session), problems.test_problems(session)
    text = models.tokenizer(session)

    def rollout(place, problem):
        return Rollout(problem.problem_id, 1, text.encode_prompt(problem.prompt), [place, 3], 0, 1.0, True, 0.5, 0, "a")

    write_shard(session.workdir.rollouts(1), 0, [rollout(*each) for each in enumerate(train)])
    chosen = true_values.responses(session, of_test=False)
    assert 0 < len(chosen) < len(train)
    assert all(train[example.response[0]] == problem for problem, example in chosen)
    samples = [
        {"problem_id": problem.problem_id, "prompt": problem.prompt, "tokens": [5, 6]}
        for problem in test for _ in range(2)
    ]  # fmt: skip
    write_samples(samples_path(session.workdir, "pi_ref", 0), samples)
    expected = [(problem, Example(text.encode_prompt(problem.prompt), [5, 6])) for problem in test for _ in range(2)]
    assert true_values.responses(session, of_test=True) == expected
