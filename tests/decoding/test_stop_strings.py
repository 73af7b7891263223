"""Stop strings: a response is the one without them, cut at the first token that completes one, wherever that is."""

import dataclasses
import functools

import numpy as np
import pytest
from brute_force import COMMON, MIXED, PROMPTS, SEEDS, STOPS, N, V, decoding_models
from hypothesis import given
from hypothesis import strategies as st

from qsharp_jax.decoding import ContinuousBatch, generate, stream
from qsharp_jax.decoding.stops import StopStrings
from qsharp_jax.sampling import Sampling
from qsharp_jax.system import stop_strings
from qsharp_jax.system.errors import UserError

SAMPLES = 4
COUNT = len(PROMPTS) * SAMPLES
PIECES = [b"a", b"b", b"", b"ab", b"ba", b"", b" a", b"c", "日".encode(), *[b"\xc3"] * 3, *[b"\xa9"] * 3, b"aab", b"bc",
          b"\n", b"cc"]  # fmt: skip
SETS = [("ab",), ("日",), ("ba", "c"), ("bca", "\n", "cc a"), ("é", "aab"), ("no such text",)]


class Bytes:
    """Tokens of up to three bytes, some of them parts of a character, some empty, as special ones are."""

    def decode(self, tokens):
        return b"".join(PIECES[token] for token in tokens).decode("utf-8", "replace")


def settings(**changes) -> Sampling:
    many = {name: np.tile(x, SAMPLES) for name, x in MIXED.items()}
    return Sampling(**COMMON | many | dict(temperature=3.0, top_p=1.0) | changes)


SEEDS_OF_ALL = np.concatenate([SEEDS + np.uint32(10 * i) for i in range(SAMPLES)])


@functools.cache
def without_stop_strings():
    return generate(*decoding_models("v-bernoulli"), PROMPTS, settings(), rng=SEEDS_OF_ALL, samples=SAMPLES)


def expected_length(response, stop) -> int | None:
    """Return the fewest tokens whose text has a stop string, by the definition."""
    texts = [Bytes().decode(response[:count]) for count in range(len(response) + 1)]
    return next((count for count, text in enumerate(texts) if any(string in text for string in stop)), None)


def assert_cut(got, row, place, stop) -> bool:
    """Compare a row with the response `place` without stop strings; return True if one ended it."""
    want = without_stop_strings()
    response = want.response(place)
    length = expected_length(response, stop)
    ended = length is not None
    length = length if ended else len(response)
    assert got.response(row) == response[:length] and got.finished[row] == (ended or want.finished[place])
    for name in ("log_probs", "ref_log_probs", "kl", "kl_truncated"):
        np.testing.assert_allclose(getattr(got, name)[row, :length], getattr(want, name)[place, :length], atol=1e-4)
        assert not getattr(got, name)[row, length:].any()
    # The last token's value is not known where it was no candidate, as at any other end.
    np.testing.assert_allclose(got.values[row, : length - 1], want.values[place, : length - 1], atol=1e-4)
    assert np.isnan(got.values[row, length:]).all()
    return ended and length < len(response)


@pytest.mark.parametrize("stop", SETS)
def test_generate_and_stream_end_where_the_text_has_the_first_stop_string(stop):
    arguments = (*decoding_models("v-bernoulli"), PROMPTS, settings(stop=stop))
    got = generate(*arguments, rng=SEEDS_OF_ALL, samples=SAMPLES, tokenizer=Bytes())
    ended = [assert_cut(got, row, row, stop) for row in range(COUNT)]
    assert any(ended) == (stop != SETS[-1]) and not all(ended)

    blocks = []

    def run():
        streamed = yield from stream(*arguments, rng=SEEDS_OF_ALL, samples=SAMPLES, tokenizer=Bytes())
        for name in got.arrays:
            np.testing.assert_array_equal(getattr(streamed, name), getattr(got, name), err_msg=name)

    blocks.extend(run())
    for row in range(COUNT):
        assert [token for block in blocks for token in block[row]] == got.response(row)


@pytest.mark.parametrize("stop", SETS[:4:2])
def test_a_row_that_came_to_a_stop_string_goes_to_the_next_response(stop):
    batch = ContinuousBatch(
        *decoding_models("v-bernoulli"), PROMPTS, settings(stop=stop), rng=SEEDS_OF_ALL, samples=SAMPLES, rows=3,
        tokenizer=Bytes(),
    )  # fmt: skip
    seen = {}
    for places, part in batch:
        seen |= {place: assert_cut(part, row, place, stop) for row, place in enumerate(places.tolist())}
    assert sorted(seen) == list(range(COUNT)) and any(seen.values())


def test_a_stop_string_may_begin_in_what_a_response_begins_with():
    """A response that begins with a whole one gets no tokens, and has finished; so has one with a stop token."""
    starts = {0: [0, 7], 1: [15, 0], 2: [0, STOPS[0]], 3: [6], 4: [0] * N, 5: [0, 0]}
    batch = ContinuousBatch(
        *decoding_models("v-bernoulli"), PROMPTS, settings(budget=N, stop=("aba", "aab")), rng=SEEDS_OF_ALL,
        samples=SAMPLES, rows=3, starts=starts.items(), tokenizer=Bytes(),
    )  # fmt: skip
    got = {place: (part.response(row), part.finished[row]) for places, part in batch for row, place in enumerate(places)}
    assert got[1] == got[2] == ([], True) and got[4] == ([], False)
    for place in (0, 3, 5):
        response, finished = got[place]
        ends = expected_length([*starts[place], *response], ("aba", "aab"))
        stopped = bool(response) and response[-1] in STOPS
        assert ends in (None, len(starts[place]) + len(response)) and finished == (ends is not None or stopped)
        assert finished or len(response) == N - len(starts[place])


@given(st.lists(st.integers(0, V - 1), max_size=30), st.sampled_from(SETS), st.data())
def test_the_first_token_that_completes_one_is_found_from_any_place(tokens, stop, data):
    expected = expected_length(tokens, stop)
    checked = data.draw(st.integers(0, len(tokens) if expected is None else expected - 1))
    assert StopStrings(stop, Bytes()).end(tokens, checked) == expected


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_texts_are_cut_before_the_first_and_nothing_is_shown_that_may_become_one(text, stop):
    whole = stop_strings.cut(text, stop)
    assert text.startswith(whole) and not stop_strings.contains(whole, stop)
    assert (whole != text) == stop_strings.contains(text, stop)
    shown = [stop_strings.certain(stop_strings.cut(text[:n], stop), stop) for n in range(len(text) + 1)]
    assert all(whole.startswith(part) for part in shown)
    certain = stop_strings.certain(whole, stop)
    held = whole[len(certain) :]
    assert not held or any(string.startswith(held) for string in stop)


def test_one_text_is_a_stop_string_and_without_a_tokenizer_there_can_be_none():
    sampling = Sampling(stop="ab", max_new_tokens=N)
    assert sampling.stop == ("ab",) and dataclasses.replace(sampling, eta=1.0).stop == ("ab",)
    for wrong in ([""], [3]):
        with pytest.raises(UserError, match="stop is .*; it must be a list of texts that are not empty"):
            Sampling(stop=wrong)
    with pytest.raises(UserError, match="sampling.stop is looked for in decoded text; give tokenizer="):
        generate(decoding_models("v-bernoulli")[0], None, PROMPTS, sampling, rng=0)
