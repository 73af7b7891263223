"""Guided decoding against a loop without a cache, in numpy, and against exact policies of tiny sequences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qsharp_jax import generate as module
from qsharp_jax import guidance
from qsharp_jax.errors import UserError
from qsharp_jax.generate import generate
from qsharp_jax.models import decoder, value
from qsharp_jax.models.config import DecoderConfig, make
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel

V, K, N = 19, 4, 10
STOPS = (2, 5)
ATOMS = (-0.5, 0.0, 1.0)

LLAMA = DecoderConfig(
    vocab_size=V, embed=16, layers=1, heads=4, kv_heads=2, head_dim=4, mlp=24, max_positions=26, rope_theta=100.0
)
GPT2 = DecoderConfig(
    vocab_size=V, embed=24, layers=1, heads=2, kv_heads=2, head_dim=12, mlp=32, max_positions=26, positions="learned",
    norm="layer", activation="gelu", bias=True, tied=True,
)  # fmt: skip
SHIFT = dataclasses.replace(LLAMA, token_shift=True, qkv_bias=True)
DEEP = dataclasses.replace(LLAMA, layers=2)

# What is compiled: reference, guide, mode.
CASES = {
    "v-bernoulli": (DEEP, ValueConfig(SHIFT, "v", "bernoulli"), "qsharp"),
    "v-categorical": (SHIFT, ValueConfig(GPT2, "v", "categorical", ATOMS), "qsharp"),
    "v-scalar": (GPT2, ValueConfig(LLAMA, "v", "scalar"), "qsharp"),
    "q-bernoulli": (SHIFT, ValueConfig(LLAMA, "q", "bernoulli"), "expectation"),
    "q-categorical": (LLAMA, ValueConfig(SHIFT, "q", "categorical", ATOMS), "cd"),
}
TINY = dataclasses.replace(LLAMA, vocab_size=5)
ALL = {**CASES, "tiny": (TINY, ValueConfig(dataclasses.replace(TINY, heads=2), "v", "bernoulli"), "qsharp")}

# Six rows, each with a prompt of its own length and its own settings: one batch of what a caller may mix.
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [0, 18], [11, 2, 12], [4, 4, 4, 4, 4, 4, 4], [8] * 12]
MIXED = dict(
    eta=[0.2, 0.05, np.inf, 0.5, 1.0, 0.1],
    temperature=[1.0, 0.7, 1.3, 0.0, 1.0, 1.0],
    top_p=[1.0, 0.8, 0.9, 1.0, 1.0, 0.5],
    top_k=[0, 0, 0, 0, 5, 3],
    budget=[N, N, N, 6, N, 1],
)
COMMON = dict(max_new_tokens=N, stop_ids=STOPS, top_k_candidates=K)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """These programs are small and many: compiling them well takes longer than running them ever will."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def models(case):
    """A reference and a guide with random weights, the guide's head included, ready for decoding."""
    ref_config, guide_config, _ = ALL[case]
    ref = LanguageModel(numpy_decoder.random_params(0, decoder.init, ref_config), ref_config)
    guide = ValueModel(numpy_decoder.random_params(1, value.init, guide_config), guide_config)
    guide.params["head"]["kernel"] *= 2  # values all over the range
    return ref, guide


@functools.cache
def decoding_models(case):
    return tuple(map(module.for_decoding, models(case)))


def run(case="v-bernoulli", prompts=PROMPTS, *, guided=True, rng=0, **changes):
    ref, guide = decoding_models(case)
    settings = {"mode": ALL[case][2], **COMMON, **changes}
    return generate(ref, guide if guided else None, prompts, rng=rng, **settings)


# --- The same policy, by brute force --------------------------------------------------------------------------------


@functools.cache
def exact_params(case):
    return tuple(numpy_decoder.to_float64(model.params) for model in models(case))


def log_softmax(x):
    x = x - np.max(x)
    return x - np.log(np.sum(np.exp(x)))


def exact_kl(log_pi, log_ref):
    kept = log_pi > -np.inf  # what a policy never does adds nothing
    return np.sum(np.exp(log_pi[kept]) * (log_pi[kept] - log_ref[kept]))


def truncate(log_pi, temperature, top_k, top_p):
    order = np.argsort(-log_pi, kind="stable")
    order = order[: 1 if temperature == 0 else top_k or None]
    if top_p < 1:
        mass = np.cumsum(np.exp(log_pi[order])) / np.exp(log_pi[order]).sum()
        order = order[: np.searchsorted(mass, top_p) + 1]
    kept = np.full(log_pi.shape, -np.inf)
    kept[order] = log_pi[order]
    return log_softmax(kept)


def policies(case, tokens, *, eta=np.inf, temperature=1.0, top_p=1.0, top_k=0, guided=True, k=K):
    """After `tokens`: log-probabilities [V] of the policy, of it truncated, and of pi_ref, and the mean values [V]
    (nan where the guide scored no candidate)."""
    (ref_config, guide_config, mode), (ref, guide) = ALL[case], exact_params(case)
    ref_logits = numpy_decoder.logits(ref, ref_config, numpy_decoder.hidden(ref, ref_config, tokens)[-1])
    logits, means = ref_logits.copy(), np.full(ref_logits.shape, np.nan)
    if guided:
        candidates = np.argsort(-ref_logits, kind="stable")[:k]
        outputs = numpy_decoder.value_outputs(guide, guide_config, tokens, candidates)
        atoms, probs = numpy_decoder.law(guide_config, outputs)
        means[candidates] = (probs * atoms).sum(-1)
        if np.isfinite(eta):
            # Tokens that are no candidates count as of a sure reward of 0.
            weights = np.full(logits.shape, -np.inf if mode == "expectation" else 0.0)
            if mode == "qsharp":
                weights[candidates] = scipy.special.logsumexp(atoms / eta, b=probs, axis=-1)
            else:
                weights[candidates] = means[candidates] / eta if mode == "cd" else np.log(means[candidates])
            logits += weights
    divisor = temperature or 1.0  # greedy is temperature 1, cut to the most probable token
    policy, ref_policy = log_softmax(logits / divisor), log_softmax(ref_logits / divisor)
    return policy, truncate(policy, temperature, top_k, top_p), ref_policy, means


@jax.jit
def draw(seed, step, log_probs):
    key = jax.random.fold_in(jax.random.key(seed), step)
    return guidance.sample(log_probs[None], key[None])[0]


def value_of(case, tokens):
    """The guide's mean at the last of the tokens."""
    _, guide_config, _ = ALL[case]
    outputs = numpy_decoder.value_outputs(exact_params(case)[1], guide_config, tokens[:-1], tokens[-1:])
    atoms, probs = numpy_decoder.law(guide_config, outputs)
    return (probs * atoms).sum(-1)[0]


def brute_force(case, prompt, seed, *, budget=N, guided=True, stop_ids=STOPS, **controls):
    """One row of `generate`, each candidate scored by a whole pass over the row's own tokens."""
    response, finished, steps = [], False, []
    while len(response) < budget and not finished:
        so_far = [*prompt, *response]
        policy, truncated, ref_policy, means = policies(case, so_far, guided=guided, **controls)
        token = int(draw(seed, len(response), np.float32(truncated)))
        response.append(token)
        finished = token in stop_ids
        kls = exact_kl(policy, ref_policy), exact_kl(truncated, ref_policy)
        steps.append((policy[token], ref_policy[token], *kls, means[token]))
    log_probs, ref_log_probs, kl, kl_truncated, values = np.array(steps).reshape(-1, 5).T
    if guided:
        # A token that was no candidate gets its value as part of the row; the last one is never seen again, unless by a
        # Q-type, which scores the whole vocabulary from the token before.
        seen_again = len(response) - (ALL[case][1].type == "v")
        for place in np.flatnonzero(np.isnan(values[:seen_again])):
            values[place] = value_of(case, [*prompt, *response[: place + 1]])
    return response, finished, dict(
        log_probs=log_probs, ref_log_probs=ref_log_probs, kl=kl, kl_truncated=kl_truncated, values=values
    )  # fmt: skip


def assert_row_is_brute_force(got, row, want):
    response, finished, arrays = want
    assert got.response(row) == response
    assert (got.lengths[row], got.finished[row]) == (len(response), finished)
    np.testing.assert_array_equal(got.tokens[row, len(response) :], 0)
    for name, exact in arrays.items():
        past = np.nan if name == "values" else 0
        exact = np.append(exact, np.full(N - len(response), past))
        np.testing.assert_allclose(getattr(got, name)[row], exact, atol=1e-4, err_msg=f"{name} of row {row}")


def assert_is_brute_force(got, case, prompts, seeds, controls, **settings):
    for row, prompt in enumerate(prompts):
        mine = {name: np.broadcast_to(x, len(prompts))[row].item() for name, x in controls.items()}
        assert_row_is_brute_force(got, row, brute_force(case, prompt, seeds[row], **mine, **settings))


SEEDS = np.uint32([0, 1, 2, 3, 4, 2**32 - 1])


@pytest.mark.parametrize("case", CASES)
def test_every_row_of_a_mixed_batch_is_the_loop_without_a_cache(case):
    got = run(case, rng=SEEDS, **MIXED)
    assert_is_brute_force(got, case, PROMPTS, SEEDS, MIXED)
    assert got.kl.max() > 0.3, "the guide steers in this test"


@hypothesis_settings(max_examples=20, deadline=None, derandomize=True)
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


# --- pi_ref itself --------------------------------------------------------------------------------------------------

UNGUIDED = {name: x for name, x in MIXED.items() if name != "eta"}


def test_without_a_guide_every_row_is_pi_ref():
    got = run(guided=False, rng=SEEDS, **UNGUIDED)
    assert_is_brute_force(got, "v-bernoulli", PROMPTS, SEEDS, UNGUIDED, guided=False)
    np.testing.assert_array_equal(got.log_probs, got.ref_log_probs)
    np.testing.assert_array_equal(got.kl, 0)
    assert np.isnan(got.values).all()


@pytest.mark.parametrize("eta", [np.inf, [np.inf] * len(PROMPTS)])
def test_eta_infinite_for_all_rows_is_pi_ref_and_runs_no_guide(eta):
    ref, guide = decoding_models("v-bernoulli")
    broken = guide.replace(params=jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), guide.params))
    want = run(guided=False, rng=SEEDS, **UNGUIDED)
    programs = module.decode._cache_size(), module.prefill._cache_size()
    got = generate(ref, broken, PROMPTS, eta=eta, rng=SEEDS, **COMMON, **UNGUIDED)
    assert (module.decode._cache_size(), module.prefill._cache_size()) == programs
    for name, array in vars(want).items():
        np.testing.assert_array_equal(getattr(got, name), array, err_msg=name)


def test_a_row_of_infinite_eta_among_guided_ones_draws_pi_refs_tokens():
    got = run(rng=SEEDS, **{**MIXED, "eta": [0.1, np.inf] * 3})
    want = run(guided=False, rng=SEEDS, **UNGUIDED)
    for row in (1, 3, 5):
        assert got.response(row) == want.response(row)
        np.testing.assert_array_equal(got.log_probs[row], got.ref_log_probs[row])
        np.testing.assert_allclose(got.log_probs[row], want.log_probs[row], atol=1e-5)
        np.testing.assert_array_equal(got.kl[row], 0)


def test_expectation_mode_is_refused_where_means_may_be_negative():
    """A scalar guide's regression may fall below 0 for every candidate of a hard prompt: no logarithm, no policy."""
    config = ValueConfig(make("tiny"), distribution="scalar")
    ref = LanguageModel({}, config.trunk)
    with pytest.raises(UserError, match="must not give negative ones"):
        generate(ref, ValueModel({}, config), [[1]], eta=0.1, max_new_tokens=1, rng=0, stop_ids=[], mode="expectation")


# --- One program, one row, one seed ---------------------------------------------------------------------------------


def test_changed_settings_prompts_and_seeds_recompile_nothing():
    run(rng=SEEDS, **MIXED)
    programs = module.decode._cache_size(), module.prefill._cache_size()
    for i in range(4):
        prompts = [[i + 1] * (1 + (row + 3 * i) % 16) for row in range(6)]
        run(prompts=prompts, rng=i, eta=0.1 * (i + 1), temperature=0.5 * i, top_p=0.9 - 0.1 * i, top_k=i, budget=N - i)
    run(rng=7, eta=1, temperature=1, top_p=0.5)  # whole numbers for floats
    run(rng=SEEDS.tolist(), **{name: jnp.asarray(x) for name, x in MIXED.items()})
    assert (module.decode._cache_size(), module.prefill._cache_size()) == programs


def test_a_row_depends_on_neither_its_neighbours_nor_its_place():
    want = run(rng=SEEDS, **MIXED)
    order = np.array([3, 5, 1, 0, 4, 2])
    moved = run(
        prompts=[PROMPTS[row] for row in order], rng=SEEDS[order],
        **{name: np.asarray(x)[order] for name, x in MIXED.items()},
    )  # fmt: skip
    others = run(
        prompts=[PROMPTS[0], [1, 2, 3], *PROMPTS[2:4], [6], [9] * 16], rng=[0, 50, 2, 3, 51, 52],
        **{**MIXED, "eta": [0.2, np.inf, np.inf, 0.5, 3.0, 1e-3], "budget": [N, 2, N, 6, 0, N]},
    )  # fmt: skip
    pairs = [(moved, place, row) for place, row in enumerate(order)] + [(others, row, row) for row in (0, 2, 3)]
    for got, place, row in pairs:
        for name in vars(want):
            np.testing.assert_allclose(getattr(got, name)[place], getattr(want, name)[row], atol=1e-5, err_msg=name)


def test_prompts_of_one_token_need_no_padding():
    prompts = [[7], [3], [0], [11], [4], [8]]
    got = run(prompts=prompts, guided=False, rng=SEEDS, prompt_bucket=1, **UNGUIDED)
    assert_is_brute_force(got, "v-bernoulli", prompts, SEEDS, UNGUIDED, guided=False)


def test_prompt_and_response_may_fill_the_context_to_its_last_position():
    """Learned positions end there."""
    prompts = [[row] * (LLAMA.max_positions - N) for row in range(6)]
    controls = {**MIXED, "eta": 3.0, "budget": N}
    got = run("v-scalar", prompts=prompts, rng=SEEDS, **controls)
    assert (got.lengths == N).any()
    assert_is_brute_force(got, "v-scalar", prompts, SEEDS, controls)


def test_models_may_come_with_stacked_layers():
    ref, guide = models("v-bernoulli")
    got = generate(ref, guide, PROMPTS, rng=SEEDS, **COMMON, **MIXED)
    want = run(rng=SEEDS, **MIXED)
    for name in vars(want):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


def test_one_seed_is_one_sample_and_another_seed_another():
    first, again, other = (run(rng=seed, **MIXED) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()
    same_prompts = run(prompts=[[7, 8]] * 6, rng=3, eta=1.0, top_p=0.99)
    assert len({tuple(row) for row in same_prompts.tokens.tolist()}) == 6, "rows draw apart from one another"


# --- Where a row ends -----------------------------------------------------------------------------------------------


def test_a_row_ends_at_its_first_stop_token_or_with_its_budget():
    rows = 6
    got = run(
        prompts=[[1]] * rows, rng=np.arange(rows), eta=1.0, budget=[0, 1, 3, N, N, N], temperature=2.0, top_p=0.99
    )
    assert got.tokens.shape == (rows, N)
    for row, budget in enumerate([0, 1, 3, N, N, N]):
        response = got.response(row)
        assert len(response) == got.lengths[row] <= budget
        stops = [place for place, token in enumerate(response) if token in STOPS]
        assert stops in ([], [len(response) - 1])
        assert got.finished[row] == bool(stops)
        assert stops or len(response) == budget
        past = np.arange(N) >= got.lengths[row]
        for name in ("tokens", "log_probs", "ref_log_probs", "kl", "kl_truncated"):
            np.testing.assert_array_equal(getattr(got, name)[row, past], 0)
        assert np.isnan(got.values[row, past]).all()
        assert (got.log_probs[row, ~past] < 0).all()
    assert got.finished.any() and not got.finished.all()


def end_states(monkeypatch):
    """The loop's last state of each call to `generate` from now on."""
    states = []
    to_generation = module._to_generation

    def keep(state, *args, **kwargs):
        states.append(state)
        return to_generation(state, *args, **kwargs)

    monkeypatch.setattr(module, "_to_generation", keep)
    return states


def test_the_loop_ends_with_the_block_in_which_the_last_row_ended(monkeypatch):
    states = end_states(monkeypatch)
    got = [run(rng=0, budget=budget, temperature=0.0, eta=0.3) for budget in (0, 1, module.BLOCK, N)]
    blocks = [-(-got_one.lengths.max() // module.BLOCK) for got_one in got]
    assert blocks == [0, 1, 1, 2]
    assert [int(state.step) for state in states] == [module.BLOCK * count for count in blocks]


# --- Values ---------------------------------------------------------------------------------------------------------


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
    """Of tokens that were no candidates too, which a high temperature draws often."""
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


# --- Distributions, on sequences that can be enumerated -------------------------------------------------------------

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
        ref, guide, [TINY_PROMPT] * len(rows["eta"]), rng=0, max_new_tokens=TINY_N, stop_ids=[TINY_STOP],
        top_k_candidates=3, prompt_bucket=2, **rows,
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
    """Chi-square over whole responses, the rare ones together."""
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


# --- bfloat16 -------------------------------------------------------------------------------------------------------


def test_bfloat16_models_decode_with_float32_records_near_those_of_float32():
    ref, guide = decoding_models("q-categorical")
    half_ref = ref.replace(config=dataclasses.replace(ref.config, dtype="bfloat16"))
    trunk = dataclasses.replace(guide.config.trunk, dtype="bfloat16")
    half_guide = guide.replace(config=dataclasses.replace(guide.config, trunk=trunk))
    got = generate(half_ref, half_guide, PROMPTS, rng=SEEDS, mode="cd", **COMMON, **MIXED)
    assert {getattr(got, name).dtype for name in ("log_probs", "kl", "values")} == {np.dtype("float32")}
    want = run("q-categorical", rng=SEEDS, **MIXED)
    same = got.tokens[:, 0] == want.tokens[:, 0]
    assert same.sum() >= 3
    np.testing.assert_allclose(got.ref_log_probs[same, 0], want.ref_log_probs[same, 0], atol=0.1)


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(eta=0), "eta is 0; it must be greater than 0"),
        (dict(eta=[0.1, 0.1, -1, 0.1, 0.1, 0.1]), "eta is .*-1.*; it must be greater than 0"),
        (dict(eta=np.nan), "eta is nan"),
        (dict(eta=[0.1, 0.2]), r"eta has shape \(2,\); give one number, or one for each of the 6 prompts"),
        (dict(eta=np.ones((6, 1))), r"eta has shape \(6, 1\)"),
        (dict(temperature=-0.1), "temperature is -0.1; it must be 0 or more"),
        (dict(top_p=0), r"top_p is 0; it must be in \(0, 1\]"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(top_k=-1), "top_k is -1; it must be 0 or more"),
        (dict(budget=N + 1), f"budget is {N + 1}; it must be in 0 .. max_new_tokens = {N}"),
        (dict(budget=-1), "budget is -1"),
        (dict(max_new_tokens=0), "max_new_tokens is 0; it must be at least 1"),
        (dict(max_new_tokens=-1), "max_new_tokens is -1; it must be at least 1"),
        (dict(prompts=[]), "there are no prompts"),
        (dict(prompts=[[1], [], [2], [3], [4], [5]]), "prompt 1 is empty; a prompt needs at least one token"),
        (dict(prompts=[[1], [V], [2], [3], [4], [5]]), f"prompt 1 has token ids outside the .*vocabulary of {V}"),
        (dict(prompts=[[1], [1], [2], [3], [4], [-5]]), "prompt 5 has token ids outside"),
        (dict(prompts=[[1] * 17]), "prompt 0 has 17 tokens, which with max_new_tokens = 10 is more than the ref.* 26"),
        (dict(top_k_candidates=V + 1), f"top_k_candidates is {V + 1}; it must be in 1 .. {V}"),
        (dict(top_k_candidates=0), "top_k_candidates is 0"),
        (dict(rng=[1, 2]), r"rng has shape \(2,\); give one number, or one for each of the 6 prompts"),
        (dict(rng=-1), "rng is -1; it must be 0 or more"),
        (dict(rng=[0, 1, 2, 3, 4, 2**32]), "rng is .*; it must be 0 or more, and less than 2"),
        (dict(mode="dpo"), "mode is 'dpo'; it must be one of qsharp, cd, expectation"),
        (dict(prompt_bucket=0), "prompt_bucket is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_with_what_was_wrong(changes, message):
    with pytest.raises(UserError, match=message):
        run(**{"eta": 0.1, **changes})


def test_a_guide_of_another_vocabulary_or_a_shorter_context_is_refused():
    ref, guide = models("v-bernoulli")

    def guide_with(**changes):
        trunk = dataclasses.replace(guide.config.trunk, **changes)
        return guide.replace(config=dataclasses.replace(guide.config, trunk=trunk))

    with pytest.raises(UserError, match=f"the guide's vocabulary has 30 entries, the reference's {V}"):
        generate(ref, guide_with(vocab_size=30), PROMPTS, eta=0.1, rng=0, **COMMON)
    with pytest.raises(UserError, match="prompt 1 has 16 tokens, .* is more than the guide's 20 positions"):
        generate(ref, guide_with(max_positions=20), PROMPTS, eta=0.1, rng=0, **COMMON)
