"""Rows that share their prompt's keys and values, or go on from an earlier place: responses as without."""

import functools
from unittest import mock

import jax
import numpy as np
import pytest
from brute_force import CASES, COMMON, MIXED, PROMPTS, SEEDS, N, decoding_models
from devices import traced_for
from helpers import random_guide, random_model
from jax.experimental import pallas as pl
from marks import slow

from qsharp_jax import decoding
from qsharp_jax.decoding import ContinuousBatch, Run, api, cache_sizes, engine, generate
from qsharp_jax.models import decoder, kv_cache, value
from qsharp_jax.models.kv_cache import Sizes
from qsharp_jax.sampling import Sampling

SAMPLES = 4
COUNT = len(PROMPTS) * SAMPLES
MANY = {name: np.repeat(x, SAMPLES) for name, x in MIXED.items()}
MANY_SEEDS = np.concatenate([SEEDS + np.uint32(10 * i) for i in range(SAMPLES)])


def sampling(case):
    return Sampling(**COMMON, mode=CASES[case][2], **MANY)


@pytest.fixture
def sharing(monkeypatch):
    """Prompts of any length are shared."""
    monkeypatch.setattr(api, "SHARED", 1)
    monkeypatch.setattr(api, "SHARED_TO_NEW", 0)


def assert_same(part, expected, places=None):
    """Fields of a `Generation` are those of another at these places."""
    for name, array in part.arrays.items():
        want = getattr(expected, name) if places is None else getattr(expected, name)[places]
        np.testing.assert_allclose(array, want, atol=1e-4 * (array.dtype.kind == "f"), err_msg=name)


@functools.cache
def with_copies(case):
    return generate(*decoding_models(case), PROMPTS, sampling(case), rng=MANY_SEEDS, samples=SAMPLES)


@pytest.mark.parametrize("case", ["v-bernoulli", slow("v-scalar"), "q-categorical"])
def test_samples_of_a_prompt_share_it(case, sharing):
    run = Run(*decoding_models(case), PROMPTS, sampling(case), rng=MANY_SEEDS, samples=SAMPLES)
    for cache in (run.state.ref_cache, run.state.guide_cache):
        assert len(cache.start) == COUNT and len(cache.prefix.start) == len(PROMPTS)
    assert_same(
        generate(*decoding_models(case), PROMPTS, sampling(case), rng=MANY_SEEDS, samples=SAMPLES), with_copies(case)
    )


@pytest.mark.parametrize("rows, each", [(8, 4), slow(3, 1), (6, 2)])
def test_rows_of_a_prompt_get_the_next_one_together(rows, each, sharing):
    """Also with fewer rows than samples; where their numbers have no divisor, each row has a copy."""
    batch = ContinuousBatch(
        *decoding_models("v-bernoulli"), PROMPTS, sampling("v-bernoulli"), rng=MANY_SEEDS, samples=SAMPLES, rows=rows
    )
    prefix = batch._state.ref_cache.prefix
    assert (1 if prefix is None else rows // len(prefix.start)) == each
    ended = []
    for places, part in batch:
        assert_same(part, with_copies("v-bernoulli"), places)
        ended += places.tolist()
    assert sorted(ended) == list(range(COUNT))


@pytest.mark.parametrize("window", [slow(2), 5])
def test_a_window_reaches_back_into_the_shared_prompt(window, sharing, monkeypatch):
    ref = random_model(19, scale=2.0, layers=2, heads=4, kv_heads=2, head_dim=4, max_positions=64, window=window, window_layers=(1,))
    ref = decoding.for_decoding(ref)
    settings = Sampling(**COMMON)

    def tokens():
        return generate(ref, None, PROMPTS, settings, rng=MANY_SEEDS, samples=SAMPLES)

    shared = tokens()
    monkeypatch.undo()
    assert_same(shared, tokens())


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_forms_for_accelerators_share_prompts_alike(platform, sharing, monkeypatch):
    """With buffers of whole tiles for the kernels, which are interpreted."""
    ref = random_model(40, scale=2.0, layers=1, heads=4, kv_heads=2, head_dim=16, max_positions=192)
    guide = random_guide(ref.config, seed=1, scale=4.0)
    ref, guide = ref.replace(params=decoder.unstack(ref.params)), guide.replace(params=value.unstack(guide.params))
    prompts, new = [[1, 5, 7], [2] * 40, [3, 4, 9, 9, 2] * 4], 128
    settings = Sampling(
        eta=np.repeat([0.1, 0.3, 0.2], 2), budget=[16, 3, 16, 16, 9, 16], stop_ids=[0], top_k_candidates=4,
        max_new_tokens=new, prompt_bucket=64,
    )  # fmt: skip
    decode = functools.partial(api.decode.__wrapped__)  # of its own: the traces of a function are kept
    compiled = jax.jit(decode, static_argnames=("settings", "block"), donate_argnames=("state",))
    interpreted, kernels = functools.partial(pl.pallas_call, interpret=True), []

    def counted(*arguments, **options):
        kernels.append(options["name"])
        return interpreted(*arguments, **options)

    with traced_for(platform), mock.patch.object(pl, "pallas_call", counted), mock.patch.object(api, "decode", compiled):
        shared = generate(ref, guide, prompts, settings, rng=SEEDS, samples=2)
    # For two models; for CUDA, of the prompts and of the rows' own.
    assert len(kernels) == (4 if platform == "cuda" else 2)
    monkeypatch.undo()
    assert_same(shared, generate(ref, guide, prompts, settings, rng=SEEDS, samples=2))


@pytest.mark.parametrize("shares", [slow(False), True])
def test_a_response_goes_on_from_a_place_in_its_row_as_from_a_prefill(shares, request):
    """After every response another one, from half of its tokens and with other settings, as if these were its prompt's."""
    if shares:
        request.getfixturevalue("sharing")
    models, begun = decoding_models("v-bernoulli"), {}
    etas = np.repeat([0.3, np.inf], COUNT)
    settings, seeds = Sampling(**COMMON, eta=etas), np.concatenate([MANY_SEEDS, MANY_SEEDS + np.uint32(1)])

    def then(place, tokens):
        if place >= COUNT:
            return None
        begun[COUNT + place] = tokens[: (len(tokens) + 1) // 2]
        return COUNT + place, len(begun[COUNT + place])

    def responses(**options):
        batch = ContinuousBatch(*models, [*PROMPTS] * 2, settings, rng=seeds, samples=SAMPLES, rows=8, **options)
        return {place: part.response(row) for places, part in batch for row, place in enumerate(places.tolist())}

    with mock.patch.object(engine, "prefill", mock.Mock(wraps=engine.prefill)) as prefill:
        rewound = responses(order=range(COUNT), then=then)
    assert prefill.call_count <= 2 * len(PROMPTS)  # by both models: a prompt's samples that follow each other share one
    assert len(rewound) == 2 * COUNT and {len(start) for start in begun.values()} > {1, N // 2}
    assert {place: rewound[place] for place in begun} == responses(starts=begun.items())


def test_a_ring_is_shortened_in_the_rows_that_keep_less():
    rng = np.random.default_rng(0)
    keys, values = (np.float32(rng.normal(size=(3, 2, 8, 4))) for _ in "kv")
    cache = kv_cache.KVCache([keys], [values], start=np.array([10, 12, 9]), index=np.int32(15), ring=True)
    shortened = kv_cache.rewind(cache, np.array([-1, 2, 4]))
    np.testing.assert_array_equal(shortened.start, [10, 13, 11])  # index less what is kept
    for before, after in ((keys, shortened.keys[0]), (values, shortened.values[0])):
        np.testing.assert_array_equal(after[0], before[0])
        for row, kept in ((1, 2), (2, 4)):
            for place in range(kept):
                new, old = (int(c.start[row]) + place for c in (shortened, cache))
                np.testing.assert_array_equal(after[row, :, new % 8], before[row, :, old % 8])


# --- Sizes ----------------------------------------------------------------------------------------------------------


def test_what_is_shared_and_by_how_many():
    assert cache_sizes(64, 16, 8000, 128, 1024) == Sizes(64, 128, prompts=4, shared=8192)
    assert cache_sizes(64, 12, 8000, 128, 1024) == Sizes(64, 128, prompts=16, shared=8192)
    assert cache_sizes(64, 1, 8000, 128, 1024) == Sizes(64, 8192 + 128)  # a prompt a row
    assert cache_sizes(64, 16, 300, 128, 16) == Sizes(64, 384 + 128)  # too short a prompt
    assert cache_sizes(64, 16, 1000, 1024, 16) == Sizes(64, 1024 + 1024)  # too long a response
    assert cache_sizes(64, 1, 64, 1024, 64) == Sizes(64, 9 * 128)  # 1,087 in whole tiles of a TPU
    assert cache_sizes(64, 1, 64, 128, 64) == Sizes(64, 192)


def test_the_caches_that_are_counted_are_those_that_are_made(sharing):
    ref, guide = decoding_models("v-bernoulli")
    run = Run(ref, guide, PROMPTS, Sampling(**COMMON, eta=0.3), rng=0, samples=SAMPLES)
    sizes = cache_sizes(COUNT, SAMPLES, max(map(len, PROMPTS)), N, Sampling(**COMMON).prompt_bucket)
    counted = decoding.caches({"ref": ref.config, "guide": guide.config.trunk}, sizes)
    for made, cache in zip((run.state.ref_cache, run.state.guide_cache), counted.values(), strict=True):
        sizes_made, sizes_counted = (sorted(leaf.size for leaf in jax.tree.leaves(c)) for c in (made, cache))
        assert sizes_made == sizes_counted
