"""Several guides at once, each with a weight: against whole passes of each in numpy, and their log-weights added by hand."""

import dataclasses

import numpy as np
import numpy_decoder
import pytest
from brute_force import (
    ATOMS,
    COMMON,
    DEEP,
    GPT2,
    LLAMA,
    PROMPTS,
    SEEDS,
    SHIFT,
    STOPS,
    K,
    N,
    draw,
    exact_kl,
    keeps_mass,
    log_softmax,
    log_weights,
)

from qsharp_jax import decoding as module
from qsharp_jax.decoding import ContinuousBatch, generate
from qsharp_jax.models import decoder, value
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import Sampling
from qsharp_jax.system.errors import UserError

REF = LanguageModel(numpy_decoder.random_params(0, decoder.init, DEEP), DEEP)


def make_guide(seed, config):
    guide = ValueModel(numpy_decoder.random_params(seed, value.init, config), config)
    guide.params["head"]["kernel"] *= 6
    return guide


PAIRS = {
    "v": (ValueConfig(SHIFT, "v", "bernoulli"), ValueConfig(GPT2, "v", "categorical", ATOMS)),
    "q": (ValueConfig(LLAMA, "q", "categorical", ATOMS), ValueConfig(SHIFT, "q", "scalar")),
}
GUIDES = {type: tuple(make_guide(seed, config) for seed, config in enumerate(pair, 1)) for type, pair in PAIRS.items()}
WEIGHTS = np.array([[0.7, 0.3], [1.0, 0.0], [0.0, 1.0], [2.0, -0.5], [0.5, 0.5], [1.0, 1.0]])
ETA = np.array([0.2, 0.5, 0.5, 0.3, np.inf, 1.0])


def run(type, prompts=PROMPTS, **changes):
    sampling = Sampling(**dict(COMMON, eta=ETA, weights=WEIGHTS) | changes)
    return generate(module.for_decoding(REF), GUIDES[type], prompts, sampling, rng=SEEDS)


def policies(type, mode, tokens, weights, eta):
    """After `tokens`: log-probabilities [V] of the policy and of pi_ref, and the composed means [V], nan at others."""
    ref = numpy_decoder.to_float64(REF.params)
    ref_logits = numpy_decoder.logits(ref, DEEP, numpy_decoder.hidden(ref, DEEP, tokens)[-1])
    candidates = np.argsort(-ref_logits, kind="stable")[:K]
    logits, means = ref_logits.copy(), np.full(ref_logits.shape, np.nan)
    means[candidates] = 0
    scored = np.zeros(K)
    for guide, weight in zip(GUIDES[type], weights):
        outputs = numpy_decoder.value_outputs(numpy_decoder.to_float64(guide.params), guide.config, tokens, candidates)
        atoms, probs = numpy_decoder.law(guide.config, outputs)
        mean = (probs * atoms).sum(-1)
        means[candidates] += weight * mean
        scored += weight * log_weights(mode, eta, atoms, probs)
    logits += keeps_mass(ref_logits[candidates], scored, 1.0)
    logits[candidates] = ref_logits[candidates] + scored
    return log_softmax(logits), log_softmax(ref_logits), means


@pytest.mark.parametrize(("type", "mode"), [("v", "qsharp"), ("q", "cd")])
def test_log_weights_are_added_by_each_rows_weights(type, mode):
    """Tokens, log-probabilities, KL and values; rows with a weight of zero, a negative one, and no guidance at all."""
    got = run(type, mode=mode)
    for row, prompt in enumerate(PROMPTS):
        response = []
        while len(response) < N and not set(response) & set(STOPS):
            place = len(response)
            policy, ref, means = policies(type, mode, [*prompt, *response], WEIGHTS[row], ETA[row])
            token = int(draw(SEEDS[row], place, np.float32(policy)))
            arrays = (got.log_probs, got.ref_log_probs, got.kl)
            np.testing.assert_allclose(
                [x[row, place] for x in arrays], [policy[token], ref[token], exact_kl(policy, ref)], atol=1e-4
            )
            if np.isfinite(means[token]):
                np.testing.assert_allclose(got.values[row, place], means[token], atol=1e-4)
            response.append(token)
        assert got.response(row) == response
    assert got.kl.sum() > 1


def test_one_guide_alone_is_what_the_weights_0_and_1_make():
    got = run("v", weights=[0.0, 1.0], eta=0.3)
    want = generate(REF, GUIDES["v"][1], PROMPTS, Sampling(**COMMON, eta=0.3), rng=SEEDS)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.kl, want.kl, atol=1e-5)


def test_one_guide_s_weight_is_the_power_of_its_tilt():
    """The square is the product of the tilt with itself; the guide's value stays its own."""
    guide, sampling = GUIDES["v"][1], Sampling(**COMMON, eta=0.3)
    got = generate(REF, guide, PROMPTS, dataclasses.replace(sampling, weights=[2.0]), rng=SEEDS)
    want = generate(REF, (guide, guide), PROMPTS, dataclasses.replace(sampling, weights=[1.0, 1.0]), rng=SEEDS)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.kl, want.kl, atol=1e-5)
    np.testing.assert_allclose(2 * got.values, want.values, rtol=1e-5)


def test_rows_that_are_refilled_keep_their_weights():
    want = run("v")
    sampling = Sampling(eta=ETA, weights=WEIGHTS, **COMMON)
    batch = ContinuousBatch(REF, GUIDES["v"], PROMPTS, sampling, rows=2, rng=SEEDS)
    found = {place: part.response(row) for places, part in batch for row, place in enumerate(places.tolist())}
    assert found == {row: want.response(row) for row in range(len(PROMPTS))}


def test_shared_slots_serve_all_guides():
    got, want = run("v", candidate_slots=K - 0.01, candidate_threshold=0.0), run("v")
    assert got.dropped.sum() <= len(PROMPTS) * N
    np.testing.assert_array_equal(got.tokens[got.dropped == 0], want.tokens[got.dropped == 0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(weights=None), "weights are None; give one finite number for each of the 2 guides"),
        (dict(weights=[1.0, 2.0, 3.0]), "each of the 2 guides"),
        (dict(weights=[1.0, np.nan]), "a number from -1e[+]06 to 1e[+]06"),
        (dict(weights=[1.0, 1e38]), "a number from -1e[+]06 to 1e[+]06"),
        (dict(weights=[[1.0, 1.0]] * 5), "each of the 6 rows"),
        (dict(weights=[1.0, 0.0], mode="expectation", guides=GUIDES["v"][:1] * 2), "they must be above 0"),
        (dict(guides=(GUIDES["v"][0], GUIDES["q"][0])), "must be V-types, or Q-types, all of them"),
        (dict(guides=()), "at least one"),
        (dict(guides=(GUIDES["v"][0], REF)), "must be V-types, or Q-types, all of them"),
        (dict(guides=GUIDES["v"][0]), "each of the 1 guides"),
        (dict(guides=REF, weights=[1.0]), "weights are of guides; there is none"),
    ],
)
def test_what_cannot_be_composed_is_refused(changes, words):
    changes = dict(guides=GUIDES["v"], eta=0.3, weights=[0.5, 0.5]) | changes
    guides = changes.pop("guides")
    with pytest.raises(UserError, match=words):
        generate(REF, guides, PROMPTS, Sampling(**COMMON | changes), rng=SEEDS)
