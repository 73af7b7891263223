"""`generate` as a caller sees it: pi_ref without a guide, one program for all settings, where rows end, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import (
    COMMON,
    LLAMA,
    MIXED,
    PROMPTS,
    SEEDS,
    STOPS,
    N,
    V,
    assert_is_brute_force,
    decoding_models,
    end_states,
    models,
    run,
)
from helpers import random_model
from hypothesis import given
from hypothesis import strategies as st
from marks import slow

from qsharp_jax import decoding as module
from qsharp_jax.decoding import api, checks, generate
from qsharp_jax.models import memory, quantized
from qsharp_jax.models.config import make
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import Sizes
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import Sampling
from qsharp_jax.system.errors import UserError

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
    got = generate(ref, broken, PROMPTS, Sampling(eta=eta, **COMMON, **UNGUIDED), rng=SEEDS)
    assert (module.decode._cache_size(), module.prefill._cache_size()) == programs
    for name, array in want.arrays.items():
        np.testing.assert_array_equal(getattr(got, name), array, err_msg=name)


@pytest.mark.parametrize("others", ["mass", "prefix", "zero"])
def test_a_row_of_infinite_eta_among_guided_ones_draws_pi_refs_tokens(others):
    got = run(rng=SEEDS, others=others, **{**MIXED, "eta": [0.1, np.inf] * 3})
    want = run(guided=False, rng=SEEDS, **UNGUIDED)
    for row in (1, 3, 5):
        assert got.response(row) == want.response(row)
        np.testing.assert_array_equal(got.log_probs[row], got.ref_log_probs[row])
        np.testing.assert_allclose(got.log_probs[row], want.log_probs[row], atol=1e-5)
        np.testing.assert_array_equal(got.kl[row], 0)


def test_changed_settings_prompts_and_seeds_recompile_nothing():
    run(rng=SEEDS, **MIXED)
    programs = module.decode._cache_size(), module.prefill._cache_size()
    for i in range(4):
        prompts = [[i + 1] * (1 + (row + 3 * i) % 16) for row in range(6)]
        run(prompts=prompts, rng=i, eta=0.1 * (i + 1), temperature=0.5 * i, top_p=0.9 - 0.1 * i, top_k=i + 1, budget=N - i)
    run(rng=7, eta=1, temperature=1, top_p=0.5, top_k=3)  # whole numbers for floats
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
        for name in want.arrays:
            np.testing.assert_allclose(getattr(got, name)[place], getattr(want, name)[row], atol=1e-5, err_msg=name)


def test_prompts_of_one_token_need_no_padding():
    prompts = [[7], [3], [0], [11], [4], [8]]
    got = run(prompts=prompts, guided=False, rng=SEEDS, prompt_bucket=1, **UNGUIDED)
    assert_is_brute_force(got, "v-bernoulli", prompts, SEEDS, UNGUIDED, guided=False)


def test_prompt_and_response_may_fill_the_context_to_its_last_position():
    prompts = [[row] * (LLAMA.max_positions - N) for row in range(6)]
    controls = {**MIXED, "eta": 3.0, "budget": N}
    got = run("v-scalar", prompts=prompts, rng=SEEDS, **controls)
    assert (got.lengths == N).any()
    assert_is_brute_force(got, "v-scalar", prompts, SEEDS, controls)


def test_models_may_come_with_stacked_layers():
    ref, guide = models("v-bernoulli")
    got = generate(ref, guide, PROMPTS, Sampling(**COMMON, **MIXED), rng=SEEDS)
    want = run(rng=SEEDS, **MIXED)
    for name in want.arrays:
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


def test_one_seed_is_one_sample_and_another_seed_another():
    first, again, other = (run(rng=seed, **MIXED) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()
    same_prompts = run(prompts=[[7, 8]] * 6, rng=3, eta=1.0, top_p=0.99)
    assert len({tuple(row) for row in same_prompts.tokens.tolist()}) == 6, "rows draw apart from one another"


def test_the_samples_of_a_prompt_are_rows_of_their_own_after_one_prefill():
    prompts = PROMPTS[:3]
    controls = {name: [x[0], x[1], x[2], x[0], x[4], x[5]] for name, x in MIXED.items()}
    got = run(prompts=prompts, samples=2, rng=SEEDS, **controls)
    want = run(prompts=[prompts[row // 2] for row in range(6)], rng=SEEDS, **controls)
    for name in want.arrays:
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-5, err_msg=name)


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_padded_lengths_are_few_and_no_longer_than_they_must_be(length, shortest):
    padded = api.padded_length(length, shortest)
    assert length <= padded and (padded == shortest or padded < 1.5 * length + shortest)
    sizes = {api.padded_length(n, shortest) for n in range(1, length + 1)}
    assert len(sizes) <= 2 + 2 * max(0, np.ceil(np.log2(length / shortest)))


@pytest.mark.parametrize("record", [(), ("values",), ("kl", "log_probs")])
def test_what_is_not_recorded_is_none_and_the_rest_the_same(record):
    want, got = run(rng=SEEDS, **MIXED), run(rng=SEEDS, record=record, **MIXED)
    fields = {"log_probs": ("log_probs", "ref_log_probs"), "kl": ("kl", "kl_truncated"), "values": ("values",)}
    for name, parts in fields.items():
        for part in parts:
            if name in record:
                np.testing.assert_allclose(getattr(got, part), getattr(want, part), atol=1e-5)
            else:
                assert getattr(got, part) is None
    np.testing.assert_array_equal(got.tokens, want.tokens)


def test_a_stream_gives_the_tokens_of_generate_as_they_come():
    ref, guide = decoding_models("v-bernoulli")
    want, blocks = run(rng=SEEDS, **MIXED), []
    running = module.stream(ref, guide, PROMPTS, Sampling(**COMMON, **MIXED), rng=SEEDS)
    while True:
        try:
            blocks.append(next(running))
        except StopIteration as stop:
            got = stop.value
            break
    for name in want.arrays:
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    for row in range(len(PROMPTS)):
        assert [token for block in blocks for token in block[row]] == want.response(row)
    assert len(blocks) == -(-want.lengths.max() // module.BLOCK)
    assert all(len(row) <= module.BLOCK for block in blocks for row in block)


@pytest.mark.parametrize("top_k", [V, 10**11, np.asarray([V, 2**31])])
def test_a_top_k_above_the_vocabulary_is_all_of_it(top_k):
    controls, _ = checks.split(Sampling(top_k=top_k), 0, 2, 2, V, ())
    assert controls.top_k.tolist() == [V, V] and controls.top_k.dtype == np.int32


def test_a_row_ends_at_its_first_stop_token_or_with_its_budget():
    rows = 6
    got = run(
        prompts=[[1]] * rows, rng=12 + np.arange(rows), eta=1.0, budget=[0, 1, 3, N, N, N], temperature=2.0, top_p=0.99
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


def test_the_loop_ends_with_the_block_in_which_the_last_row_ended(monkeypatch):
    states = end_states(monkeypatch)
    got = [run(rng=0, budget=budget, temperature=0.0, eta=0.3) for budget in (0, 1, module.BLOCK, N)]
    blocks = [-(-got_one.lengths.max() // module.BLOCK) for got_one in got]
    assert blocks == [0, 1, 1, 2]
    assert [int(state.step) for state in states] == [module.BLOCK * count for count in blocks]


def test_expectation_mode_is_refused_where_means_may_be_negative():
    """A scalar guide's regression may fall below 0 for every candidate of a hard prompt: no logarithm, no policy."""
    config = ValueConfig(make("tiny"), distribution="scalar")
    ref = LanguageModel({}, config.trunk)
    with pytest.raises(UserError, match="must not give negative ones"):
        generate(ref, ValueModel({}, config), [[1]], Sampling(eta=0.1, max_new_tokens=1, mode="expectation"), rng=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(eta=0), "eta is 0; it must be a number, at least 1e-06"),
        (dict(eta=[0.1, 0.1, -1, 0.1, 0.1, 0.1]), "eta is .*-1.*; it must be a number, at least 1e-06"),
        (dict(eta=np.nan), "eta is nan"),
        (dict(eta=[0.1, 0.2]), r"eta has shape \(2,\); give one number, or one for each of the 6 rows"),
        (dict(eta=np.ones((6, 1))), r"eta has shape \(6, 1\)"),
        *((dict(eta=eta), "eta is .*; it must be a number, at least 1e-06") for eta in (1e-8, 0.0, -1.0)),
        *((dict(temperature=t), "temperature is .*; it must be 0, which is greedy") for t in (1e-7, 1e-40, -1.0, np.inf, np.nan)),
        (dict(others="none"), "others is 'none'; it must be one of mass, prefix, zero"),
        (dict(temperature=-0.1), "temperature is -0.1; it must be 0, which is greedy, or a finite number, at least 1e-06"),
        (dict(top_p=0), r"top_p is 0; it must be a number above 0, at most 1"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(top_k=-1), "top_k is -1; it must be a whole number, at least 0"),
        (dict(budget=N + 1), f"budget is {N + 1}; it must be at most max_new_tokens = {N}"),
        (dict(budget=-1), "budget is -1"),
        (dict(max_new_tokens=0), "max_new_tokens is 0; it must be a whole number, at least 1"),
        (dict(max_new_tokens=-1), "max_new_tokens is -1; it must be a whole number, at least 1"),
        (dict(prompts=[]), "there are no prompts"),
        (dict(prompts=[[1], [], [2], [3], [4], [5]]), "prompt 1 is empty; a prompt needs at least one token"),
        (dict(prompts=[[1], [V], [2], [3], [4], [5]]), f"prompt 1 has token ids outside the .*vocabulary of {V}"),
        (dict(prompts=[[1], [1], [2], [3], [4], [-5]]), "prompt 5 has token ids outside"),
        (dict(prompts=[[1] * 17]), "prompt 0 has 17 tokens, which with max_new_tokens = 10 is more than the ref.* 26"),
        (dict(top_k_candidates=V + 1), f"top_k_candidates is {V + 1}; it must be in 1 .. {V}"),
        (dict(top_k_candidates=0), "top_k_candidates is 0"),
        (dict(rng=[1, 2]), r"rng has shape \(2,\); give one number, or one for each of the 6 rows"),
        (dict(rng=-1), "rng is -1; it must be 0 or more"),
        (dict(rng=[0, 1, 2, 3, 4, 2**32]), "rng is .*; it must be 0 or more, and less than 2"),
        (dict(mode="dpo"), "mode is 'dpo'; it must be one of qsharp, cd, expectation"),
        (dict(prompt_bucket=0), "prompt_bucket is 0; it must be a whole number, at least 1"),
        (dict(samples=0), "samples is 0; it must be at least 1"),
        (dict(samples=2, eta=[0.1] * 6), r"eta has shape \(6,\); give one number, or one for each of the 12 rows"),
        (dict(candidate_slots=0), "candidate_slots is 0; it must be a finite number above 0, or none"),
        (dict(candidate_slots=5), "candidate_slots is 5; it must be at most top_k_candidates = 4"),
        (dict(candidate_slots=2, case="q-categorical"), "a Q-type guide reads all candidates at one position"),
        (dict(candidate_slots=2, candidate_threshold=1), r"candidate_threshold is 1; it must be a number, at least 0 and below 1"),
        (dict(vocab_size=V + 1), f"the guide's vocabulary has {V} entries, the reference's {V}, of which {V + 1}"),
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

    with pytest.raises(UserError, match=f"the guide's vocabulary has 15 entries, the reference's {V}, of which {V}"):
        generate(ref, guide_with(vocab_size=15), PROMPTS, Sampling(eta=0.1, **COMMON), rng=0)
    with pytest.raises(UserError, match="prompt 1 has 16 tokens, .* is more than the guide's 20 positions"):
        generate(ref, guide_with(max_positions=20), PROMPTS, Sampling(eta=0.1, **COMMON), rng=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["v-bernoulli", "v-scalar"])
def test_the_caches_that_are_counted_are_those_that_prefill_makes(case, dtype):
    ref, _ = models(case)
    config = dataclasses.replace(ref.config, dtype=dtype)
    made = jax.eval_shape(
        functools.partial(module.prefill, config=config, size=32, samples=2),
        ref.params, tokens=np.zeros((3, 15), np.int32), start=np.zeros(3, np.int32),
    )  # fmt: skip
    counted = module.caches({"reference": config}, Sizes(6, 32))["the reference's cache"]
    assert jax.tree.structure(made) == jax.tree.structure(counted)
    for leaf, other in zip(jax.tree.leaves(made), jax.tree.leaves(counted), strict=True):
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)


def test_caches_that_do_not_fit_are_refused_before_they_are_made(monkeypatch):
    """Six rows of 16 - 1 + 16 positions, made 32: keys and values of 2 layers and of 1, 2 heads of 4 float32 each."""
    caches = {"ref": 2 * 2 * 6 * 32 * 2 * 4 * 4 + 6 * 4 + 4, "guide": 1 * 2 * 6 * 32 * 2 * 4 * 4 + 6 * 4 + 4}
    ref, guide = decoding_models("v-bernoulli")
    work = module.prefill_work(ref.config, len(PROMPTS), 15, jax.sharding.get_mesh())
    prefill = sum(leaf.size * leaf.dtype.itemsize for leaf in work)
    free = sum(caches.values()) + prefill
    monkeypatch.setattr(memory, "GB", 1e3)
    monkeypatch.setattr(memory, "available", lambda device: free)
    run(rng=0, eta=0.1)
    monkeypatch.setattr(memory, "available", lambda device: free - 1)
    monkeypatch.setattr(api, "prefill_rows", lambda *_, **__: pytest.fail("it computes"))
    weights = [sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) for model in (ref, guide)]
    words = (
        f"has {free / 1e3:.2f} GB of memory free beside the reference's weights {weights[0] / 1e3:.2f} GB and the guide's weights"
        f" {weights[1] / 1e3:.2f} GB, and the reference's cache 24.60 GB and the guide's cache 12.32 GB and the prefill"
        f" {prefill / 1e3:.2f} GB are needed"
    )
    with pytest.raises(UserError, match=words):
        run(rng=0, eta=0.1)
    with pytest.raises(pytest.fail.Exception, match="it computes"):
        run(rng=0, guided=False)  # which needs the reference's alone


@pytest.mark.parametrize("tied", [slow(False), True])
def test_a_cpu_s_copies_of_quantized_weights_are_counted_as_the_compiler_makes_them(tied, monkeypatch):
    """Four bytes a weight of the layers, and of the head; rows of a table that is only looked up in are dequantized."""
    width, vocabulary = 256, 512
    shape = dict(embed=width, heads=4, kv_heads=2, head_dim=64, mlp=512, layers=2, max_positions=32)
    model = random_model(vocabulary, **shape)
    params = {name: leaf for name, leaf in model.params.items() if not (tied and name == "head")}
    as_is, small = (
        quantized.model(LanguageModel(params, dataclasses.replace(model.config, tied=tied, quantize=how)))
        for how in ("none", "int8")
    )
    started = [module.Run(ref, None, PROMPTS, Sampling(**COMMON), rng=0) for ref in (as_is, small)]
    beside = [
        module.decode.lower(run.ref, None, run.state, run.controls, settings=run.settings).compile().memory_analysis()
        for run in started
    ]
    layer = (2 * width + 2 * 128) * width + 3 * width * 512
    expected = 4 * (2 * layer + vocabulary * width)
    assert beside[1].temp_size_in_bytes - beside[0].temp_size_in_bytes == pytest.approx(expected, rel=0.02)
    (counted,) = module.dequantized({"reference": small.config}, {"reference": started[1].ref.params}).values()
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in counted) == expected
    assert module.dequantized({"reference": as_is.config}, {"reference": as_is.params}) == {}
    monkeypatch.setattr(memory, "GB", 1e3)
    monkeypatch.setattr(memory, "available", lambda device: expected)
    words = rf"and the reference's dequantized weights {expected / 1e3:.2f} GB and the prefill \S+ GB are needed"
    with pytest.raises(UserError, match=words):
        module.Run(small, None, PROMPTS, Sampling(**COMMON), rng=0)
    module.Run(as_is, None, PROMPTS, Sampling(**COMMON), rng=0)
