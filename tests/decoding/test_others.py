"""Tokens that the guide does not score: a guide without information changes nothing, whatever is asked of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import CASES, COMMON, MIXED, PROMPTS, SEEDS, K, V, assert_is_brute_force, decoding_models, run
from marks import slow

from qsharp_jax import guidance
from qsharp_jax.decoding import ContinuousBatch, generate
from qsharp_jax.sampling import Sampling

SLOW = {"v-scalar", "q-categorical", "v-categorical"}
ETA = [0.2, 0.05, 1e-6, 0.5, 1.0, np.inf]
UNGUIDED = {name: x for name, x in MIXED.items() if name != "eta"}
RECORDS = ("tokens", "lengths", "log_probs", "ref_log_probs", "kl_truncated")


def constant(guide):
    """The guide with a head that gives every token the same distribution, one with different atoms' probabilities."""
    head = {"kernel": jnp.zeros_like(guide.params["head"]["kernel"])}
    if guide.config.type == "v":
        head["bias"] = jnp.linspace(0.5, 1.5, guide.config.outputs)
    return guide.replace(params=guide.params | {"head": head})


def assert_is_pi_ref(got, want):
    np.testing.assert_array_equal(got.kl, 0)
    for name in RECORDS:
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(got.tokens, want.tokens)


@pytest.mark.parametrize(
    ("case", "others"),
    [
        *((slow if case in SLOW else pytest.param)(case, "mass") for case in CASES),
        ("v-categorical", "prefix"), slow("q-bernoulli", "prefix"),
    ],
)
def test_a_constant_guide_is_pi_ref_exactly(case, others):
    """For every distribution and type, in every mode, with every number of candidates, eta, temperature and top-p."""
    ref, guide = decoding_models(case)
    want = run(case, guided=False, rng=SEEDS, **UNGUIDED)
    last = "expectation" if guide.config.distribution == "bernoulli" else "qsharp"
    for mode, k in [("qsharp", 1), ("cd", K), (last, V)]:
        settings = COMMON | {"top_k_candidates": k, "mode": mode, "others": others}
        got = generate(ref, constant(guide), PROMPTS, Sampling(**settings, **MIXED | {"eta": ETA}), rng=SEEDS)
        assert_is_pi_ref(got, want)


@pytest.mark.parametrize("others", ["mass", slow("prefix")])
def test_constant_guides_are_pi_ref_where_they_share_slots_and_where_they_are_composed(others):
    ref, guide = decoding_models("v-bernoulli")
    want = run(guided=False, rng=SEEDS, **UNGUIDED)
    sampling = Sampling(**COMMON | MIXED | {"eta": ETA, "others": others})
    for slots in (0.5, 2):
        got = generate(ref, constant(guide), PROMPTS, replace(sampling, candidate_slots=slots), rng=SEEDS)
        assert_is_pi_ref(got, want)
    got = generate(ref, (constant(guide),) * 2, PROMPTS, replace(sampling, weights=[1.7, -0.4]), rng=SEEDS)
    assert_is_pi_ref(got, want)


def test_a_constant_guide_is_pi_ref_in_rows_that_are_refilled():
    ref, guide = decoding_models("v-bernoulli")
    want = run(guided=False, rng=SEEDS)
    batch = ContinuousBatch(ref, constant(guide), PROMPTS, Sampling(eta=0.1, **COMMON), rows=2, rng=SEEDS)
    for places, part in batch:
        np.testing.assert_array_equal(part.kl, 0)
        for row, place in enumerate(places.tolist()):
            assert part.response(row) == want.response(place)


def test_the_kl_of_equal_logits_is_zero_over_a_large_vocabulary_too():
    logits = jax.random.normal(jax.random.key(0), (8, 49_152)) * 3

    @jax.jit
    def kl(logits, nothing):
        return guidance.kl(*(guidance.temper(x, jnp.ones(8)) for x in (logits + nothing, logits)))

    np.testing.assert_array_equal(kl(logits, jnp.zeros((8, 1))), 0)


def test_the_papers_zero_makes_a_constant_guide_a_filter():
    """At eta 0.02 a guide that gives 1 / 2 everywhere leaves the K candidates, with pi_ref's proportions."""
    ref, guide = decoding_models("v-bernoulli")
    got = generate(ref, constant(guide), PROMPTS, Sampling(eta=0.02, others="zero", **COMMON), rng=SEEDS)
    top_k = run(guided=False, rng=SEEDS, top_k=K)
    np.testing.assert_array_equal(got.tokens, top_k.tokens)
    np.testing.assert_allclose(got.kl, top_k.kl_truncated, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "others"),
    [
        *((slow if case in SLOW else pytest.param)(case, "prefix") for case in CASES),
        slow("v-scalar", "zero"), ("q-bernoulli", "zero"),
    ],
)
def test_every_definition_is_its_formula(case, others):
    """Against whole passes in numpy; "mass", the default, in test_step.py."""
    got = run(case, rng=SEEDS, others=others, **MIXED)
    assert_is_brute_force(got, case, PROMPTS, SEEDS, MIXED, others=others)


@pytest.mark.parametrize("case", ["v-bernoulli", slow("q-categorical")])
def test_with_every_token_a_candidate_all_definitions_are_one(case):
    every = dict(rng=SEEDS, top_k_candidates=V, **MIXED)
    want, *rest = (run(case, others=others, **every) for others in ("zero", "mass", "prefix"))
    for got in rest:
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.kl, want.kl, atol=1e-4)


@pytest.mark.parametrize("others", [slow("mass"), "prefix"])
@pytest.mark.parametrize("guided", [True, False])
def test_as_the_temperature_falls_responses_become_the_greedy_ones(guided, others):
    """And log-probabilities stay finite and <= 0, KLs finite and >= 0."""
    settings = dict(guided=guided, rng=SEEDS, eta=0.1, others=others)
    greedy = run(**settings, temperature=0.0)
    for temperature in (1e-4, 1e-6):
        got = run(**settings, temperature=temperature)
        np.testing.assert_array_equal(got.tokens, greedy.tokens)
        for log_probs in (got.log_probs, got.ref_log_probs):
            assert np.isfinite(log_probs).all() and (log_probs <= 0).all()
        for kl in (got.kl, got.kl_truncated):
            assert np.isfinite(kl).all() and (kl >= 0).all()


# --- the process's defaults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [("jax_default_prng_impl", "rbg"), ("jax_enable_x64", True)])
def test_responses_do_not_depend_on_the_process_s_defaults(option):
    want = run(rng=SEEDS, **MIXED)
    name, changed = option
    before = getattr(jax.config, name)
    jax.config.update(name, changed)
    try:
        got = run(rng=SEEDS, **MIXED)
        assert {array.dtype.itemsize for array in got.arrays.values()} <= {1, 4}
    finally:
        jax.config.update(name, before)
    for name, array in want.arrays.items():
        np.testing.assert_allclose(getattr(got, name), array, atol=1e-5, err_msg=name)
