"""Every step against a loop without a cache, and against exact policies of sequences that can be enumerated."""

import dataclasses
import re

import jax
import numpy as np
import numpy_decoder
import pytest
import scipy.stats
from brute_force import (
    CASES,
    COMMON,
    MIXED,
    PROMPTS,
    SEEDS,
    K,
    N,
    V,
    assert_is_brute_force,
    decoding_models,
    end_states,
    exact_kl,
    models,
    policies,
    run,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qsharp_jax.decoding import Run, decode, generate
from qsharp_jax.models import value
from qsharp_jax.sampling import Sampling


@pytest.mark.parametrize("case", CASES)
def test_every_row_of_a_mixed_batch_is_the_loop_without_a_cache(case):
    got = run(case, rng=SEEDS, **MIXED)
    assert_is_brute_force(got, case, PROMPTS, SEEDS, MIXED)
    assert got.kl.max() > 0.2, "the guide steers in this test"


def test_one_row_is_the_loop_without_a_cache_too_and_its_cache_is_not_copied():
    case, prompts, seeds = "v-bernoulli", [PROMPTS[1]], SEEDS[1:2]
    got = run(case, prompts, rng=seeds, eta=[0.1])
    assert_is_brute_force(got, case, prompts, seeds, dict(eta=[0.1]))

    whole = Run(*decoding_models(case), prompts, Sampling(eta=0.1, **COMMON), rng=seeds)
    program = decode.lower(whole.ref, whole.guide, whole.state, whole.controls, settings=whole.settings).compile()
    for cache in (whole.state.ref_cache, whole.state.guide_cache):
        shape = ",".join(map(str, cache.keys[0].shape[1:]))
        assert re.search(rf"f32\[{shape}\]", program.as_text())
        if jax.default_backend() == "cpu":
            assert not re.search(rf"= f32\[(1,)?{shape}\]\S* copy\(", program.as_text())


@hypothesis_settings(max_examples=20, derandomize=True)
@given(st.data())
def test_any_prompts_and_settings_give_the_loop_without_a_cache(data):
    rows = len(PROMPTS)

    def one_a_row(choices):
        return data.draw(st.lists(choices, min_size=rows, max_size=rows))

    prompts = one_a_row(st.lists(st.integers(0, V - 1), min_size=1, max_size=16))
    seeds = np.uint32(one_a_row(st.integers(0, 2**32 - 1)))
    controls = dict(
        eta=one_a_row(st.sampled_from([0.01, 0.03, 0.3, 3.0, np.inf])),
        temperature=one_a_row(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        top_p=one_a_row(st.sampled_from([0.01, 0.5, 0.95, 1.0])),
        top_k=one_a_row(st.sampled_from([0, 1, 3, V, 10 * V])),
        budget=one_a_row(st.integers(0, N)),
    )
    controls["eta"][0] = 0.1  # never all infinite, which is another program
    controls["top_k"][0] = 7  # always truncated, which is a program too
    assert_is_brute_force(run(prompts=prompts, rng=seeds, **controls), "v-bernoulli", prompts, seeds, controls)


def test_without_truncation_both_kls_are_one_and_without_stop_ids_rows_have_their_whole_budgets():
    controls = dict(eta=[0.05, 0.1, 0.2, 0.5, 1, 2], temperature=[1, 0.5, 2, 1, 1, 1], budget=[N, 0, 1, 5, N, N])
    got = run(rng=SEEDS, stop_ids=(), **controls)
    assert_is_brute_force(got, "v-bernoulli", PROMPTS, SEEDS, controls, stop_ids=())
    np.testing.assert_array_equal(got.lengths, controls["budget"])
    np.testing.assert_array_equal(got.kl_truncated, got.kl)
    assert not got.finished.any()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["v-bernoulli", "v-categorical"])
def test_with_slots_for_all_above_the_threshold_every_row_is_as_if_these_were_its_candidates(case):
    controls = {**MIXED, "threshold": [0.0, 0.1, 0.2, 0.05, 0.1, 0.3]}
    given_controls = {**MIXED, "candidate_threshold": controls["threshold"]}
    got = run(case, rng=SEEDS, candidate_slots=K, **given_controls)
    assert_is_brute_force(got, case, PROMPTS, SEEDS, controls)
    np.testing.assert_array_equal(got.dropped, 0)
    fewer = run(case, rng=SEEDS, candidate_slots=3.5, **given_controls)  # 21 for 6 rows
    if not fewer.dropped.any():
        np.testing.assert_allclose(fewer.kl, got.kl, atol=1e-5)


def test_too_few_slots_leave_candidates_out_and_say_how_many():
    controls = dict(eta=0.1, budget=1, temperature=1.0)
    got = run(rng=SEEDS, candidate_slots=0.5, candidate_threshold=0.0, stop_ids=(), **controls)
    assert got.dropped.sum() == 6 * K - 3
    # The three likeliest of all rows' first tokens have the slots: the other rows are pi_ref.
    firsts = [np.exp(policies("v-bernoulli", prompt)[2]) for prompt in PROMPTS]
    likeliest = sorted((p for first in firsts for p in first), reverse=True)[2]
    for row, first in enumerate(firsts):
        want = policies("v-bernoulli", PROMPTS[row], eta=0.1, threshold=likeliest - 1e-9)
        assert got.dropped[row] == K - (first >= likeliest - 1e-9).sum()
        np.testing.assert_allclose(got.kl[row, 0], exact_kl(want[0], want[2]), atol=1e-5)


def test_rows_that_pad_the_embedding_are_never_drawn_and_have_no_probability():
    used = V - 6
    prompts = [[token % used for token in prompt] for prompt in PROMPTS]
    got = run(prompts=prompts, rng=SEEDS, eta=0.3, temperature=5.0, stop_ids=(), vocab_size=used)
    assert got.tokens.max() < used
    for row, prompt in enumerate(prompts):
        ref = policies("v-bernoulli", prompt, temperature=5.0, guided=False)[2][:used]
        want = ref - np.logaddexp.reduce(ref)
        np.testing.assert_allclose(got.ref_log_probs[row, 0], want[got.tokens[row, 0]], atol=1e-5)


def test_a_candidates_value_is_the_one_it_gets_when_it_is_in_the_cache(monkeypatch):
    """V-type: the tree mask shows a candidate what it sees a step later as the pending token."""
    states = end_states(monkeypatch)
    got = run(rng=SEEDS, **MIXED)
    record, compared = states[0].record, 0
    for row, length in enumerate(got.lengths):
        as_candidate = record.value[row, : length - 1]
        as_pending = record.pending_value[row, 1:length]
        both = ~np.isnan(as_candidate)
        np.testing.assert_allclose(as_candidate[both], as_pending[both], atol=1e-5)
        compared += both.sum()
    assert compared > 10


@pytest.mark.parametrize("case", ["v-categorical", "q-bernoulli"])
def test_values_are_those_of_a_teacher_forced_pass(case):
    """Values of tokens that were no candidates too, which a high temperature draws often."""
    ref, guide = models(case)
    got = run(case, rng=SEEDS, **{**MIXED, "temperature": 3.0})
    length = max(map(len, PROMPTS)) + N
    tokens, segments = np.zeros((2, len(PROMPTS), length), np.int32)
    for row, prompt in enumerate(PROMPTS):
        whole = [*prompt, *got.response(row)]
        tokens[row, : len(whole)], segments[row, : len(whole)] = whole, 1
    positions = np.broadcast_to(np.arange(length), tokens.shape) * segments
    outputs, _ = jax.jit(value.forward, static_argnums=1)(guide.params, guide.config, tokens, segments, positions)
    atoms, probs = numpy_decoder.law(guide.config, np.asarray(outputs, np.float64))
    means = (probs * atoms).sum(-1)
    for row, prompt in enumerate(PROMPTS):
        read = got.values[row, : got.lengths[row]]
        known = ~np.isnan(read)
        assert known[:-1].all(), "only a V-type's last token may be without a value"
        want = means[row, len(prompt) :][: got.lengths[row]]
        np.testing.assert_allclose(read[known], want[known], atol=1e-4)


TINY_N, TINY_STOP, SAMPLES = 3, 2, 1024
TINY_PROMPT = [1, 3]
GROUPS = [
    dict(eta=0.3, temperature=1.0, top_p=1.0, top_k=0),
    dict(eta=0.1, temperature=0.8, top_p=0.9, top_k=0),
    dict(eta=np.inf, temperature=1.0, top_p=1.0, top_k=3),
    dict(eta=1.0, temperature=1.5, top_p=1.0, top_k=0),
]


@pytest.fixture(scope="module")
def samples():
    """SAMPLES rows under each of the settings of GROUPS, in one batch."""
    ref, guide = decoding_models("tiny")
    rows = {name: np.repeat([group[name] for group in GROUPS], SAMPLES) for name in GROUPS[0]}
    return generate(
        ref, guide, [TINY_PROMPT] * len(rows["eta"]),
        Sampling(max_new_tokens=TINY_N, stop_ids=[TINY_STOP], top_k_candidates=3, prompt_bucket=2, **rows), rng=0,
    )  # fmt: skip


def exact_sequences(group):
    """Every response's probability under the truncated policy, and the expected sums of both KLs along it."""
    probabilities, kl, kl_truncated = {}, 0.0, 0.0
    level = {(): 1.0}
    for step in range(TINY_N):
        following = {}
        for prefix, reach in level.items():
            policy, truncated, ref_policy, _ = policies("tiny", [*TINY_PROMPT, *prefix], k=3, **group)
            kl += reach * exact_kl(policy, ref_policy)
            kl_truncated += reach * exact_kl(truncated, ref_policy)
            for token, log_prob in enumerate(truncated):
                if log_prob > -np.inf:
                    ends = token == TINY_STOP or step == TINY_N - 1
                    (probabilities if ends else following)[*prefix, token] = reach * np.exp(log_prob)
        level = following
    assert abs(sum(probabilities.values()) - 1) < 1e-9
    return probabilities, kl, kl_truncated


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_responses_come_as_often_as_the_guided_policy_says(samples, group):
    probabilities, _, _ = exact_sequences(GROUPS[group])
    counts = dict.fromkeys(probabilities, 0)
    for row in range(group * SAMPLES, (group + 1) * SAMPLES):
        counts[tuple(samples.response(row))] += 1  # KeyError: a response that the policy excludes
    observed, expected = np.array([(counts[s], SAMPLES * p) for s, p in probabilities.items()]).T
    rare = expected < 5
    if rare.any():
        observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (observed, expected))
    assert len(observed) > 5
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_the_reported_kls_average_to_the_exact_kls_of_whole_responses(samples, group):
    rows = slice(group * SAMPLES, (group + 1) * SAMPLES)
    _, *exact = exact_sequences(GROUPS[group])
    for array, want in zip((samples.kl, samples.kl_truncated), exact, strict=True):
        sums = array[rows].sum(1)
        assert abs(sums.mean() - want) < 4 * sums.std() / np.sqrt(SAMPLES) + 1e-5
    if GROUPS[group]["top_p"] == 1 and GROUPS[group]["top_k"] == 0:
        # The same KL as the mean log-ratio, which is noisier.
        ratios = (samples.log_probs[rows] - samples.ref_log_probs[rows]).sum(1)
        assert abs(ratios.mean() - exact[0]) < 4 * ratios.std() / np.sqrt(SAMPLES) + 1e-5


def test_bfloat16_models_decode_with_float32_records_near_those_of_float32():
    ref, guide = decoding_models("q-categorical")
    half_ref = ref.replace(config=dataclasses.replace(ref.config, dtype="bfloat16"))
    trunk = dataclasses.replace(guide.config.trunk, dtype="bfloat16")
    half_guide = guide.replace(config=dataclasses.replace(guide.config, trunk=trunk))
    got = generate(half_ref, half_guide, PROMPTS, Sampling(mode="cd", **COMMON, **MIXED), rng=SEEDS)
    assert {getattr(got, name).dtype for name in ("log_probs", "kl", "values")} == {np.dtype("float32")}
    want = run("q-categorical", rng=SEEDS, **MIXED)
    same = got.tokens[:, 0] == want.tokens[:, 0]
    assert same.sum() >= 3
    np.testing.assert_allclose(got.ref_log_probs[same, 0], want.ref_log_probs[same, 0], atol=0.1)
