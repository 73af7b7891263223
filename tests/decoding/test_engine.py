"""Rows that are refilled: every response is the one that `generate` gives, whenever and wherever it is decoded."""

import dataclasses
import functools
import itertools
from unittest import mock

import jax
import numpy as np
import pytest
from brute_force import CASES, COMMON, MIXED, PROMPTS, SEEDS, STOPS, K, N, brute_force, decoding_models
from devices import traced_for
from helpers import random_guide, random_model
from jax.experimental import pallas as pl
from marks import slow

from qsharp_jax.decoding import RECORDED, ContinuousBatch, engine, generate
from qsharp_jax.decoding.rows import First
from qsharp_jax.models import decode_attention, decoder, tpu_attention, value
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.sampling import Sampling
from qsharp_jax.system.errors import UserError

SAMPLES = 4
COUNT = len(PROMPTS) * SAMPLES
MANY = {name: np.tile(x, SAMPLES) for name, x in MIXED.items()}
MANY_SEEDS = np.concatenate([SEEDS + np.uint32(10 * i) for i in range(SAMPLES)])


def sampling(case, **changes):
    return Sampling(**dict(COMMON, mode=CASES[case][2], **MANY) | changes)


def batch_of(
    case="v-bernoulli", *, guided=True, rows=3, rng=MANY_SEEDS, starts=None, record=RECORDED, **changes
):
    ref, guide = decoding_models(case)
    return ContinuousBatch(
        ref, guide if guided else None, PROMPTS, sampling(case, **changes), rng=rng, rows=rows, samples=SAMPLES,
        starts=starts, record=record,
    )  # fmt: skip


def run(*arguments, **options):
    """Fields of every response, by its place."""
    found = {}
    for places, part in batch_of(*arguments, **options):
        for row, place in enumerate(places.tolist()):
            assert place not in found
            found[place] = {name: array[row] for name, array in part.arrays.items()}
    return found


def plain(case="v-bernoulli", *, guided=True, record=RECORDED, **changes):
    ref, guide = decoding_models(case)
    return generate(
        ref, guide if guided else None, PROMPTS, sampling(case, **changes), rng=MANY_SEEDS, samples=SAMPLES,
        record=record,
    )  # fmt: skip


def assert_same(found, want, places=range(COUNT)):
    assert sorted(found) == sorted(places)
    for place, fields in found.items():
        for name, array in fields.items():
            expected = getattr(want, name)[place]
            assert array.dtype == getattr(want, name).dtype
            if array.dtype.kind == "f":
                np.testing.assert_allclose(array, expected, atol=1e-4, err_msg=f"{name} of {place}")
            else:
                np.testing.assert_array_equal(array, expected, err_msg=f"{name} of {place}")


@pytest.mark.slow
def test_in_bfloat16_responses_may_differ_by_rounding_alone():
    """Up to the first token that differs, the same tokens have nearly the same log-probabilities in 3 rows and in 7."""
    ref, guide = (model.replace(config=in_bfloat16(model.config)) for model in decoding_models("v-bernoulli"))
    settings = dict(sampling=Sampling(eta=0.2, **COMMON), samples=SAMPLES, rng=MANY_SEEDS)
    few, many = (
        {place: (part, row) for places, part in batch for row, place in enumerate(places.tolist())}
        for batch in (ContinuousBatch(ref, guide, PROMPTS, rows=rows, **settings) for rows in (3, 7))
    )
    compared = 0
    for place in range(COUNT):
        (one, row), (other, other_row) = few[place], many[place]
        same = np.cumprod(one.tokens[row] == other.tokens[other_row]).astype(bool)
        np.testing.assert_allclose(one.log_probs[row][same], other.log_probs[other_row][same], atol=0.1)
        compared += same.sum()
    assert compared > COUNT * N / 2


def in_bfloat16(config):
    if isinstance(config, ValueConfig):
        return dataclasses.replace(config, trunk=in_bfloat16(config.trunk))
    return dataclasses.replace(config, dtype="bfloat16")


@pytest.mark.parametrize("rows", [slow(1), 3, slow(7)])
def test_responses_are_those_of_generate_whatever_the_rows(rows):
    """The ring goes round several times. Prompts of 1 to 16 tokens, all settings mixed, four samples of each."""
    batch = batch_of(rows=rows)
    found = {}
    for places, part in batch:
        for row, place in enumerate(places.tolist()):
            found[place] = {name: array[row] for name, array in part.arrays.items()}
    want = plain()
    assert_same(found, want)
    assert batch.tokens == want.lengths.sum() <= batch.row_steps
    assert batch.row_steps > rows * 32 or rows == 7, "the cache of 32 positions was gone round"
    assert 0 < want.finished.sum() < COUNT and len(set(want.lengths)) > 4


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "v-bernoulli"])
def test_every_kind_of_model_and_guide(case):
    """Learned positions, shifted tokens, Q-types, atoms."""
    assert_same(run(case, record=("log_probs", "values")), plain(case, record=("log_probs", "values")))


def test_without_a_guide():
    unguided = {name: x for name, x in MANY.items() if name != "eta"}
    found = run(guided=False, eta=np.inf, **unguided)
    assert_same(found, plain(guided=False, eta=np.inf, **unguided))
    mine = {name: x[0].item() for name, x in unguided.items()}
    response, finished, exact = brute_force("v-bernoulli", PROMPTS[0], MANY_SEEDS[0], guided=False, **mine)
    assert found[0]["tokens"][: len(response)].tolist() == response and found[0]["finished"] == finished
    np.testing.assert_allclose(found[0]["log_probs"][: len(response)], exact["log_probs"], atol=1e-4)


def test_the_last_responses_are_given_as_they_end_too():
    """Where all have a row from the beginning, those of one length come together, the shortest first."""
    lengths = [set(part.lengths.tolist()) for _, part in batch_of(rows=COUNT)]
    assert len(lengths) > 3 and all(max(some) <= min(more) for some, more in itertools.pairwise(lengths))


def test_control_returns_every_so_many_steps(monkeypatch):
    """Though no row has ended; the responses, and the rows that are refilled together, are the same."""
    monkeypatch.setattr(engine, "FREE", 1)
    batch = batch_of(rows=COUNT)
    want = [places.tolist() for places, _ in batch]
    monkeypatch.setattr(engine, "LONGEST", 2)
    often = batch_of(rows=COUNT)
    parts = [places.tolist() for places, _ in often]
    assert len(want) == 1 and len(parts) == -(-N // 2)
    assert sorted(itertools.chain(*parts)) == sorted(want[0]) == list(range(COUNT))
    assert often.row_steps == batch.row_steps


def test_what_is_not_recorded_is_none():
    for _, part in batch_of(record=()):
        assert part.log_probs is part.kl is part.values is None


def test_shared_slots_that_suffice_change_nothing():
    """Where no candidate is left out, neighbours make no difference: here each row has a slot for every candidate."""
    found = run(candidate_slots=float(K), candidate_threshold=0.0)
    assert not any(fields["dropped"] for fields in found.values())
    assert_same(found, plain())


# --- Responses that have begun --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_response_that_has_begun_is_finished_within_its_budget():
    """The rest is what `generate` gives after prompt and beginning, with the rest of the budget; nothing after a
    stop token, or where the budget is used up. The beginnings make the prompts longer than their bucket."""
    ref, guide = decoding_models("v-bernoulli")
    begun = {0: [9], 4: [1, 1, 1, 1, 1, 1], 5: [7] * (N - 1), 9: [3] * N, 13: [8, STOPS[0]], 20: [], 22: [4, 4, 4]}
    budget = np.full(COUNT, N)
    budget[20] = 3
    batch = ContinuousBatch(
        ref, guide, PROMPTS, Sampling(eta=0.3, budget=budget, **COMMON), rng=MANY_SEEDS, samples=SAMPLES, rows=2,
        starts=begun.items(),
    )  # fmt: skip
    found = {}
    for places, part in batch:
        found |= {place: part.response(row) for row, place in enumerate(places.tolist())}
    assert found[9] == found[13] == []
    for place, start in begun.items():
        if place not in (9, 13):
            want = generate(
                ref, guide, [[*PROMPTS[place // SAMPLES], *start]],
                Sampling(eta=0.3, budget=min(N, budget[place]) - len(start), **COMMON),
                rng=MANY_SEEDS[place : place + 1],
            )  # fmt: skip
            assert found[place] == want.response(0), place
    assert len(found[5]) == 1 and len(found[20]) <= 3


def test_responses_are_begun_in_their_order_and_read_only_when_rows_are_free():
    read = []

    def starts():
        for place in reversed(range(COUNT)):
            read.append(place)
            yield place, ()

    rows, seen = 2, 0
    for places, _ in batch_of(rows=rows, starts=starts(), budget=N, eta=0.1):
        seen += len(places)
        # In the loop, prefilled (as many prompts as rows), and one more to see that another prompt follows.
        assert len(read) <= seen + 2 * rows + SAMPLES * rows + 1
        assert all(place in read for place in places)
    assert read == list(reversed(range(COUNT))) and seen == COUNT


def test_nothing_to_begin_is_nothing_done():
    batch = batch_of(starts=iter(()))
    assert list(batch) == [] and batch.row_steps == batch.tokens == 0


# --- What it costs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_useful_row_steps():
    """Rows of one length never wait, but for the last; of a long one among short ones, only the last rows do."""
    same = batch_of(rows=4, budget=N, stop_ids=())
    assert [len(places) for places, _ in same] == [4] * (COUNT // 4)
    assert same.tokens == N * COUNT == same.row_steps  # N is a multiple of BLOCK

    budget = np.where(np.arange(COUNT) % 6 == 0, N, 2)
    mixed = batch_of(rows=4, budget=budget, stop_ids=())
    static = sum(4 * budget[i : i + 4].max() for i in range(0, COUNT, 4))
    assert sum(part.lengths.sum() for _, part in mixed) == budget.sum() == mixed.tokens
    assert mixed.row_steps - mixed.tokens <= 4 * N < static - mixed.tokens


def test_other_prompts_settings_and_orders_recompile_nothing():
    programs = [engine.decode, engine.refill, engine.prefill, engine.empty_state]
    run()
    before = [program._cache_size() for program in programs]
    run(rng=5, eta=2.0, temperature=0.5, starts=((place, ()) for place in (23, 1, 0, 2, 7, 8)))
    assert [program._cache_size() for program in programs] == before


def test_the_caches_are_updated_in_place():
    """Neither program copies a buffer of a cache: [rows, kv heads, size, width]."""
    batch = batch_of()
    batch._fill()
    shape = batch._state.ref_cache.keys[0].shape
    words = f"f32[{','.join(map(str, shape))}]"
    source, first = np.full(3, -1, np.int32), First.none(3)
    refill = engine.refill.lower(batch._state, batch._waiting, source, first)
    decode = engine.decode.lower(
        batch._ref, batch._guide, batch._state, batch._row_controls(), settings=batch._settings, enough=np.int32(1)
    )
    buffers = 2 * (len(batch._state.ref_cache.keys) + len(batch._state.guide_cache.keys))
    for lowered in (refill, decode):
        compiled = lowered.compile(compiler_options={"xla_disable_hlo_passes": ""})
        copies = [line for line in compiled.as_text().splitlines() if f"= {words}" in line and " copy(" in line]
        assert not copies, copies
        donated = compiled.memory_analysis().alias_size_in_bytes
        assert donated >= buffers * 4 * np.prod(shape)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_forms_for_accelerators_give_the_same_responses(platform, monkeypatch):
    """With weights and caches in the form for accelerators, prompts in chunks of one program; kernels are interpreted."""
    ref = random_model(40, scale=2.0, layers=1, heads=4, kv_heads=2, head_dim=16, max_positions=128)
    guide = random_guide(ref.config, seed=1, scale=4.0)
    ref, guide = ref.replace(params=decoder.unstack(ref.params)), guide.replace(params=value.unstack(guide.params))
    prompts = [[1, 5, 7], [2] * 40, [3, 4, 9, 9, 2] * 4]
    settings = Sampling(
        eta=np.repeat([0.1, 0.3, 0.2], 2), top_p=np.repeat([0.9, 0.8, 1.0], 2), temperature=[1, 1, 0, 1, 1, 1],
        budget=[16, 3, 16, 16, 9, 16], stop_ids=[0], top_k_candidates=4, max_new_tokens=16, prompt_bucket=112,
    )  # fmt: skip
    wanted = generate(ref, guide, prompts, settings, rng=SEEDS, samples=2)
    decode = functools.partial(engine.decode.__wrapped__)  # of its own: the traces of a function are kept
    compiled = jax.jit(decode, static_argnames=("settings", "block"), donate_argnames=("state",))
    interpreted = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(engine.cpu_form, "here", lambda: False)
    monkeypatch.setattr(engine, "TOKENS", 32)
    prefills = engine.prefill._cache_size()
    with traced_for(platform), mock.patch.object(pl, "pallas_call", interpreted):
        with mock.patch.object(engine, "decode", compiled):
            batches = list(ContinuousBatch(ref, guide, prompts, settings, rng=SEEDS, samples=2, rows=2))
    assert engine.prefill._cache_size() - prefills <= 2, "one for each model"
    for place, part, row in ((p, part, row) for places, part in batches for row, p in enumerate(places.tolist())):
        np.testing.assert_array_equal(part.tokens[row], wanted.tokens[place])
        for name in ("log_probs", "kl", "kl_truncated", "values"):
            np.testing.assert_allclose(getattr(part, name)[row], getattr(wanted, name)[place], atol=1e-4, err_msg=name)


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(max_new_tokens=11),
            "prompt 1 has 16 tokens, which with max_new_tokens = 11 is more than the reference's",
        ),
        (dict(budget=N + 1), f"budget is {N + 1}; it must be at most max_new_tokens = {N}"),
        (dict(rng=[1, 2]), f"rng has shape .* one for each of the {COUNT} rows"),
        (dict(candidate_slots=9), "candidate_slots is 9; it must be at most top_k_candidates = 4"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_decoded(changes, words):
    if "max_new_tokens" in changes:
        changes |= dict(budget=11)
    with pytest.raises(UserError, match=words):
        batch_of(**changes)


def test_a_batch_with_more_rows_than_responses():
    few = list(itertools.islice(((place, ()) for place in range(COUNT)), 2))
    assert_same(run(rows=7, starts=few), plain(), places=[0, 1])
    assert jax.live_arrays()


@pytest.mark.parametrize("longest", [40, 1100])
def test_on_accelerators_the_kernels_can_divide_the_rings(longest, monkeypatch):
    monkeypatch.setattr(engine.cpu_form, "here", lambda: False)
    ref = random_model(19, max_positions=2048)
    guide, settings = random_guide(ref.config), Sampling(**COMMON, eta=0.2)
    batch = ContinuousBatch(ref, guide, [[1] * longest], settings, rng=0, rows=2, samples=1)
    for cache in (batch._state.ref_cache, batch._state.guide_cache):
        assert cache.size % tpu_attention.TILE == cache.size % decode_attention.TILE == 0
