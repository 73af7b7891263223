"""The engine of the server: whatever else is in the rows, a response is the one that `generate` gives alone.

Run as a script on fake devices, it answers with quantized models that are divided over them.
"""

import collections
import dataclasses
import itertools
import json
import threading

import jax
import numpy as np
import pytest
from brute_force import CASES, COMMON, PROMPTS, N, V, decoding_models, models
from marks import slow
from processes import printed_on_fake_devices

from qsharp_jax.decoding import generate, row_seeds
from qsharp_jax.models import meshes, quantized, sharding
from qsharp_jax.sampling import Sampling
from qsharp_jax.serving import engine as module
from qsharp_jax.serving import prompts
from qsharp_jax.serving.engine import Engine
from qsharp_jax.serving.requests import Busy, Closed, Load, Request
from qsharp_jax.system.errors import UserError

REF, BERNOULLI = decoding_models("v-bernoulli")
_, CATEGORICAL = decoding_models("v-categorical")
GUIDES = BERNOULLI, CATEGORICAL
CONTEXT = 26


class Letters:
    """A tokenizer in which every token is a letter."""

    def decode(self, tokens):
        return "".join(chr(ord("a") + token) for token in tokens)


class Received:
    """The updates of each response, put together."""

    def __init__(self):
        self.parts = collections.defaultdict(list)
        self.finish = {}

    def __call__(self, updates):
        for update in updates:
            place = update.request, update.sample
            assert place not in self.finish
            self.parts[place].append(update)
            if update.finish:
                self.finish[place] = update.finish

    def joined(self, request, sample, name):
        return [x for update in self.parts[request, sample] for x in getattr(update, name)]


def start(received, *, ref=REF, rows=3, queue=100, guides=GUIDES, chunk=8):
    return Engine(
        ref, guides, Sampling(**COMMON), rows=rows, context=CONTEXT, queue=queue, chunk=chunk, deliver=received,
        tokenizer=Letters(),
    )  # fmt: skip


def request(prompt, *, weights=None, seed=0, n=1, top_log_probs=False, **changes):
    return Request(prompt, Sampling(**COMMON | changes, weights=weights), row_seeds(seed, n).tolist(), top_log_probs)


def answer(engine, requests):
    for one in requests:
        engine.submit(one)
    engine.close()
    engine.run()


def alone(one, guide, ref=REF):
    sampling = one.sampling if isinstance(guide, tuple) else dataclasses.replace(one.sampling, weights=None)
    return generate(
        ref, guide, [one.prompt], sampling, rng=one.seeds, samples=len(one.seeds), tokenizer=Letters(),
        record=("log_probs", "kl", "values", "top_log_probs"),
    )  # fmt: skip


def assert_as_alone(received, one, guide):
    want = alone(one, guide)
    for sample in range(len(one.seeds)):
        length = want.lengths[sample]
        assert received.joined(one, sample, "tokens") == want.response(sample)
        assert received.finish[one, sample] == ("stop" if want.finished[sample] else "length")
        for name in ("log_probs", "ref_log_probs", "kl"):
            expected = getattr(want, name)[sample, :length]
            np.testing.assert_allclose(received.joined(one, sample, name), expected, atol=1e-4, err_msg=name)
        values = np.asarray(received.joined(one, sample, "values"))
        scored = ~np.isnan(values)
        np.testing.assert_allclose(values[scored], want.values[sample, :length][scored], atol=1e-4)
        assert one.is_guided or not scored.any()


# Settings, and the guide that `generate` has for them.
BOTH = np.asarray([0.7, 0.3])
KINDS = [
    (dict(), None),
    (dict(temperature=0.7, top_p=0.8), None),
    (dict(eta=0.2, weights=[1, 0]), BERNOULLI),
    (dict(eta=0.05, weights=[1, 0], mode="cd", top_k=3), BERNOULLI),
    (dict(eta=0.5, weights=[1, 0], mode="expectation"), BERNOULLI),
    (dict(eta=1.0, weights=[0, 1], temperature=0), CATEGORICAL),
    (dict(eta=0.1, weights=BOTH, budget=None, stop=["cd", "q"]), GUIDES),
    (dict(eta=0.1, weights=BOTH, stop_ids=(2, 5, 7, 11)), GUIDES),
]


@pytest.mark.parametrize("shifts", [(0,), slow((0, 4))])
def test_mixed_requests_are_answered_as_each_alone(shifts):
    received = Received()
    engine = start(received)
    kinds = []
    for (place, prompt), shift in itertools.product(enumerate(PROMPTS), shifts):
        settings, guide = KINDS[(place + shift) % len(KINDS)]
        kinds.append((request(prompt, seed=place, n=2, **settings), guide))
    answer(engine, [one for one, _ in kinds])
    assert len(received.finish) == sum(len(one.seeds) for one, _ in kinds)
    for one, guide in kinds:
        assert_as_alone(received, one, guide)


def test_top_log_probs_come_with_those_who_ask_for_them():
    received = Received()
    plain, asking = request(PROMPTS[1], n=2), request(PROMPTS[2], n=2, eta=0.2, weights=[1, 0], top_log_probs=True)
    answer(start(received), [plain, asking])
    want = alone(asking, BERNOULLI)
    assert received.joined(plain, 0, "top") == []
    for sample in range(2):
        tops = received.joined(asking, sample, "top")
        assert len(tops) == want.lengths[sample]
        for place, top in enumerate(tops):
            assert [token for token, _ in top] == want.top_tokens[sample, place].tolist()
            assert sum(np.exp(log_prob) for _, log_prob in top) == pytest.approx(1, abs=1e-5)  # all of the vocabulary
            drawn = dict(top)[received.joined(asking, sample, "tokens")[place]]
            assert drawn == pytest.approx(want.log_probs[sample, place], abs=1e-5)


def test_a_prompt_longer_than_a_chunk_does_not_hold_up_the_rows(monkeypatch):
    """Between two pieces of a long prompt, rows that decode get their steps; at first, as both rows are free, two go."""
    received, events = Received(), []
    engine = start(received, rows=2, chunk=4)
    monkeypatch.setattr(module, "decode", recorded(events, "steps", module.decode))
    monkeypatch.setattr(prompts, "prefill_chunk", recorded(events, "piece", prompts.prefill_chunk))
    first, long = request([7], n=1, stop_ids=()), request(PROMPTS[1], n=1)
    answer(engine, [first, long])
    # 15 tokens after the padding of the first piece: 3 + 4 + 4 + 4, two models only where there is a guide.
    pieces = [place for place, event in enumerate(events) if event == "piece"]
    assert len(pieces) == 4
    assert ["steps" in events[a:b] for a, b in zip(pieces, pieces[1:], strict=False)] == [False, True, True]
    for one in (first, long):
        assert_as_alone(received, one, None)


def recorded(events, name, function):
    def wrapped(*arguments, **options):
        events.append(name)
        return function(*arguments, **options)

    return wrapped


def test_requests_come_and_go_while_others_run():
    """From another thread: a cancelled request frees its rows, one in the queue is dropped, the others are answered."""
    received = Received()
    engine = start(received, rows=2)
    thread = threading.Thread(target=engine.run)
    thread.start()
    kept = [request(prompt, seed=i, n=2, eta=0.2, weights=[1, 0]) for i, prompt in enumerate(PROMPTS)]
    dropped = [request(PROMPTS[5], seed=50 + i, n=4, stop_ids=()) for i in range(4)]
    for one, other in zip(kept, [*dropped, None, None], strict=True):
        if other is not None:
            engine.submit(other)
            engine.cancel(other)
        engine.submit(one)
    engine.close()
    thread.join(timeout=120)
    assert not thread.is_alive()
    for one in kept:
        assert_as_alone(received, one, BERNOULLI)
    assert not any((one, sample) in received.finish and sample > 1 for one in dropped for sample in range(4))
    assert engine.load == Load(0, 2, 0, engine.load.steps, engine.load.row_steps)


def test_a_prompt_that_is_cancelled_is_not_prefilled_to_its_end(monkeypatch):
    """Nor while no row decodes, when prompts are prefilled in one go."""
    engine, pieces = start(Received(), chunk=4), []
    go_on = engine._prefill.go_on

    def leave(prompt):
        go_on(prompt)
        pieces.append(prompt)
        engine.cancel(prompt.request)

    monkeypatch.setattr(engine._prefill, "go_on", leave)
    answer(engine, [request([1] * 16)])
    assert len(pieces) == 1


def test_a_full_queue_and_a_closed_engine_refuse():
    engine = start(Received(), queue=2)
    engine.submit(request([1]))
    engine.submit(request([1]))
    with pytest.raises(Busy):
        engine.submit(request([1]))
    engine.close()
    with pytest.raises(Closed):
        engine.submit(request([1]))


@pytest.mark.parametrize(
    ("prompt", "changes", "words"),
    [
        ([], {}, "no tokens"),
        ([V], {}, f"vocabulary of {V}"),
        ([1] * 17, {}, f"context of {CONTEXT}"),
        ([1], dict(eta=0.1, weights=[0, 1], mode="expectation"), "negative"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(prompt, changes, words):
    with pytest.raises(UserError, match=words):
        start(Received()).submit(request(prompt, **changes))


def test_an_error_on_the_devices_ends_all_requests(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of memory")

    received = Received()
    engine = start(received, rows=1)
    monkeypatch.setattr(module, "decode", fail)
    requests = [request([1], n=2), request([2])]
    for one in requests:
        engine.submit(one)
    with pytest.raises(RuntimeError):
        engine.run()
    assert received.finish == {(requests[0], 0): "error", (requests[0], 1): "error", (requests[1], 0): "error"}
    with pytest.raises(Closed):
        engine.submit(requests[0])


def test_an_error_of_a_prefill_ends_the_request_that_it_was_for(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    received = Received()
    engine = start(received, rows=1)
    requests = [request([1], n=2), request([2])]
    for one in requests:
        engine.submit(one)
    monkeypatch.setattr(engine._prefill, "begin", fail)
    with pytest.raises(RuntimeError):
        engine.run()
    assert received.finish == {(requests[0], 0): "error", (requests[0], 1): "error", (requests[1], 0): "error"}


def test_an_error_loses_no_end_that_was_seen_before_it(monkeypatch):
    """The row of a response that has ended is free when the next look fails, and its end not yet delivered."""
    received = Received()
    engine = start(received, rows=1)
    one = request([1])
    engine.submit(one)
    dispatch, look, ends = engine._dispatch, engine._look, []

    def failing():
        if ends:
            raise RuntimeError("out of memory")
        return dispatch()

    def looking(*arguments):
        updates = look(*arguments)
        ends.extend(update for _, update in updates if update.finish)
        return updates

    monkeypatch.setattr(engine, "_dispatch", failing)
    monkeypatch.setattr(engine, "_look", looking)
    with pytest.raises(RuntimeError):
        engine.run()
    assert received.finish == {(one, 0): ends[0].finish} and ends[0].finish != "error"


def test_a_closed_engine_compiles_no_more(monkeypatch):
    engine = start(Received(), guides=[BERNOULLI])
    monkeypatch.setattr(engine, "_admit", lambda: pytest.fail("it went on"))
    engine.close()
    engine.warm_up()


def test_warming_up_leaves_nothing_behind():
    received = Received()
    engine = start(received, guides=[BERNOULLI])
    engine.warm_up()
    assert not received.parts and engine.load.row_steps == 0
    one = request(PROMPTS[3], eta=0.2, weights=[1])
    answer(engine, [one])
    assert_as_alone(received, one, BERNOULLI)
    assert max(len(update.tokens) for update in received.parts[one, 0]) <= module.MOST_STEPS
    assert len(received.joined(one, 0, "tokens")) <= N


def test_all_cases_are_v_types_or_q_types():
    assert {guide.type for _, guide, _ in CASES.values()} == {"v", "q"}
    with pytest.raises(UserError, match="Q-type"):
        start(Received(), guides=(BERNOULLI, decoding_models("q-bernoulli")[1]))


def in_8_bits(case):
    """A reference and a guide with int8 weights."""

    def quantize(model):
        trunk = dataclasses.replace(getattr(model.config, "trunk", model.config), quantize="int8")
        is_guide = hasattr(model.config, "trunk")
        config = dataclasses.replace(model.config, trunk=trunk) if is_guide else trunk
        return quantized.model(model.replace(config=config))

    return [*map(quantize, models(case))]


def quantized_requests():
    return [request(prompt, seed=i, n=2, eta=0.2, weights=[1]) for i, prompt in enumerate(PROMPTS[2:4])]


def answers_on_a_mesh():
    """Tokens of the responses of quantized models on a mesh, from a thread of their own."""
    received, requests = Received(), quantized_requests()
    mesh = meshes.make_mesh({"data": 4, "tensor": 2}, sharding.DECODE)

    def run():
        with jax.set_mesh(mesh):
            ref, guide = (sharding.move(model, mesh, sharding.DECODE) for model in in_8_bits("v-scalar"))
            answer(start(received, ref=ref, guides=[guide]), requests)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return [[received.joined(one, sample, "tokens") for sample in range(2)] for one in requests]


@pytest.mark.slow
def test_quantized_models_on_a_mesh_answer_as_on_one_device():
    ref, guide = in_8_bits("v-scalar")
    wants = [alone(one, guide, ref) for one in quantized_requests()]
    tokens, _ = printed_on_fake_devices(__file__)
    assert tokens == [[want.response(sample) for sample in range(2)] for want in wants]


if __name__ == "__main__":
    print(json.dumps(answers_on_a_mesh()))
