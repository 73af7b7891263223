"""Log-probabilities by teacher forcing, against float64 numpy, and values, against decoding; how good values are, against
loops and exact fractions.
"""

import math
from fractions import Fraction

import helpers
import numpy as np
import numpy_decoder
import pytest
import scipy.special
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qsharp_jax import rollouts
from qsharp_jax.data.batches import Example
from qsharp_jax.evaluation import score
from qsharp_jax.models import decoder
from qsharp_jax.models.config import make as config_of
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.sampling import Sampling

examples = hypothesis_settings(max_examples=60)
ATOMS = (-0.5, 0.25, 1.0)


def sampled(guide, vocab_size, rows=8):
    """Guided responses to prompts of mixed lengths, with the values that were met on the way."""
    ref = helpers.random_model(vocab_size, seed=3)
    rng = np.random.default_rng(0)
    prompts = [[1, *rng.integers(3, vocab_size, length)] for length in rng.integers(1, 15, rows)]
    generation = rollouts.sample(
        ref, guide, prompts,
        Sampling(eta=0.3, max_new_tokens=7, stop_ids=(2,), top_k_candidates=4, prompt_bucket=24),
        seeds=np.arange(rows), batch_size=rows,
    )  # fmt: skip
    made = [Example(prompt, generation.response(row)) for row, prompt in enumerate(prompts)]
    return made, [generation.values[row, : generation.lengths[row]] for row in range(rows)]


@pytest.mark.parametrize(("type", "kind"), [("v", "bernoulli"), ("q", "categorical")])
def test_scores_are_the_values_met_while_decoding(type, kind):
    """For the same tokens, whatever the rows and width of the batches that score them; in the callers' order."""
    vocab_size = 13
    trunk = helpers.random_model(vocab_size).config
    guide = helpers.random_guide(trunk, type=type, distribution=kind, atoms=ATOMS if kind == "categorical" else ())
    made, met = sampled(guide, vocab_size)
    known = [~np.isnan(values) for values in met]
    assert sum(mask.sum() for mask in known) > 25
    # A V-type does not see the last token if it was no candidate: that one was never read.
    assert all(mask[:-1].all() for mask in known) and (type == "v" or all(mask.all() for mask in known))
    scores = score.score(guide, made, rows=8, bucket=24)
    for example, found, values, mask in zip(made, scores, met, known, strict=True):
        assert found.shape == (len(example.response),)
        np.testing.assert_allclose(found[mask], values[mask], atol=2e-5)
    assert np.ptp(np.concatenate(scores)) > 0.2  # else nothing was tested
    for other in (score.score(guide, made, rows=3, bucket=25), score.score(guide, made[::-1], rows=8, bucket=24)[::-1]):
        for found, again in zip(scores, other, strict=True):
            np.testing.assert_allclose(again, found, atol=2e-5)


@pytest.mark.parametrize(("logits_at_a_time", "tied"), [(score.LOGITS, False), (29 * 5, True)])
def test_log_probabilities_are_a_full_forward_s(monkeypatch, logits_at_a_time, tied):
    """Whole sequences in float64, one by one, their logits cut where the padding of the vocabulary begins."""
    monkeypatch.setattr(score, "LOGITS", logits_at_a_time)
    config = config_of("tiny", **helpers.TINY, vocab_size=29, tied=tied)
    ref = LanguageModel(numpy_decoder.random_params(5, decoder.init, config), config)
    used, rng = 25, np.random.default_rng(1)
    made = [Example(*(rng.integers(0, used, length) for length in rng.integers(1, 9, 2))) for _ in range(7)]
    found = score.log_probs(ref, made, rows=3, bucket=16, vocab_size=used)
    params = numpy_decoder.to_float64(ref.params)
    for example, got in zip(made, found, strict=True):
        tokens = [*example.prompt, *example.response]
        logits = numpy_decoder.logits(params, ref.config, numpy_decoder.hidden(params, ref.config, tokens))[:, :used]
        expected = scipy.special.log_softmax(logits, axis=1)[np.arange(len(tokens) - 1), tokens[1:]]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected[len(example.prompt) - 1 :], atol=2e-5)


# Odd 64ths: floats hold them exactly, and products with ten seldom fall on the edge of a bin.
predictions = st.integers(-40, 100).map(lambda k: (2 * k + 1) / 64)
pairs = st.lists(st.tuples(predictions, st.sampled_from([0.0, 1.0])), min_size=1, max_size=40)


def bins_by_hand(pairs):
    """Ten bins over [0, 1] or the wider range of the predictions, by exact fractions."""
    low = min(Fraction(0), *(Fraction(p) for p, _ in pairs))
    high = max(Fraction(1), *(Fraction(p) for p, _ in pairs))
    bins = {}
    for p, reward in pairs:
        place = (Fraction(p) - low) / (high - low) * 10
        assume(place.denominator > 1 or p in (low, high))
        bins.setdefault(min(int(place), 9), []).append((p, reward))
    return [bins[place] for place in sorted(bins)]


@examples
@given(pairs)
def test_calibration_bins(pairs):
    predicted, rewards = (np.float32(column) for column in zip(*pairs))
    expected = bins_by_hand(pairs)
    found = score.calibration(predicted, rewards)
    assert [row["count"] for row in found] == [len(members) for members in expected]
    for row, members in zip(found, expected):
        np.testing.assert_allclose([row["predicted"], row["observed"]], np.mean(members, axis=0), rtol=1e-5, atol=1e-6)
    error = sum(abs(sum(p - r for p, r in members)) for members in expected) / len(pairs)
    np.testing.assert_allclose(score.calibration_error(predicted, rewards), error, rtol=1e-4, atol=1e-5)


def test_calibration_error_of_known_predictors():
    """0 for the true probability, the bias for a biased one, 1 for one that is always surely wrong."""
    rewards = np.repeat([0.0, 1.0], [150, 50])
    assert score.calibration_error(np.full(200, 0.25), rewards) == 0
    np.testing.assert_allclose(score.calibration_error(np.full(200, 0.65), rewards), 0.4)
    assert score.calibration_error(1 - rewards, rewards) == 1
    assert score.calibration_error(rewards, rewards) == 0


@examples
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0])), max_size=12))
def test_ranking_counts_pairs_of_one_prompt(responses):
    """Every two responses to one prompt with different rewards: 1 if the better has the greater value, 1/2 for a tie."""
    right, pairs = 0.0, 0
    for i, (prompt, value, reward) in enumerate(responses):
        for other, other_value, other_reward in responses[:i]:
            if prompt == other and reward != other_reward:
                pairs += 1
                right += 0.5 if value == other_value else (value > other_value) == (reward > other_reward)
    ids, last, rewards = ([], [], []) if not responses else zip(*responses)
    found = score.ranking(np.asarray(last, np.float32), np.asarray(rewards, np.float32), ids)
    if pairs:
        np.testing.assert_allclose(found, right / pairs)
    else:
        assert math.isnan(found)


def test_ranking_knows_nothing_of_hard_and_easy_prompts():
    """A guide that only tells prompts apart ranks like a coin; pooled over prompts it would look good."""
    ids = ["easy"] * 10 + ["hard"] * 10
    rewards = np.asarray([1.0] * 9 + [0.0] + [1.0] + [0.0] * 9)
    assert score.ranking(np.asarray([0.9] * 10 + [0.1] * 10), rewards, ids) == 0.5


def test_quality_by_hand(monkeypatch):
    """Likelihood, Brier score and calibration over labelled tokens alone, ranking by the value at a response's end."""
    values = {(5, 6, 2): [0.5, 0.9, 0.4, 0.8], (7, 2): [0.1, 0.3, 0.6], (8, 2): [0.5, 0.2, 0.7]}  # the prompt's first
    nlls = {(5, 6, 2): [9.0, 9.0, 0.5, 0.25], (7, 2): [4.0, 1.0, 2.0], (8, 2): [8.0, 7.0, 0.75]}

    def sequences(of_batch, examples, **_):
        return [np.stack([np.float32(values[e.response]), np.float32(nlls[e.response])], axis=-1) for e in examples]

    monkeypatch.setattr(score, "sequences", sequences)
    made = [
        Example([1], (5, 6, 2), reward=1.0, first_label=1),
        Example([1], (7, 2), reward=0.0, first_label=-1),
        Example([1], (8, 2), reward=1.0, first_label=1),
    ]
    found = score.quality(None, made, ["p", "p", "q"], rows=4, bucket=8)
    assert found["nll"] == (0.5 + 0.25 + 4 + 1 + 2 + 0.75) / 6
    labelled = [(0.4, 1), (0.8, 1), (0.1, 0), (0.3, 0), (0.6, 0), (0.7, 1)]
    np.testing.assert_allclose(found["brier"], np.mean([(p - r) ** 2 for p, r in labelled]), rtol=1e-5)
    np.testing.assert_allclose(found["calibration_error"], np.mean([abs(p - r) for p, r in labelled]), rtol=1e-5)
    assert found["ranking"] == 1.0  # p: 0.8 over 0.6; q has no pair
