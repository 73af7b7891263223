"""A server as its clients see it: OpenAI's client, clients that leave, too many of them, nonsense, and the end."""

import concurrent.futures
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse

import httpx
import hypothesis
import numpy as np
import openai
import pytest
import raw_clients
from hypothesis import strategies as st
from small_server import CONTEXT, QUEUE, ROWS

from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.decoding import generate
from qsharp_jax.run.folders import load

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many eggs?"}]
METRICS = "qsharp_rows_in_use", "qsharp_queue_length"
LONG = dict(model="good", messages=[{"role": "user", "content": "eggs"}], max_tokens=40)


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def alone(server, prompt, *, seed=7, n=1, prompt_format="chat", **changes):
    """Texts and the `Generation` that `generate` gives."""
    loaded = load(server.ref, server.guide, dtype="float32", prompt_format=prompt_format)
    sampling = dataclasses.replace(loaded.sampling, **changes)
    tokens = loaded.tokenizer.encode_prompt(prompt)
    guide = loaded.guide if np.isfinite(sampling.eta) else None
    part = generate(loaded.ref, guide, [tokens], sampling, rng=seed, samples=n)
    return [loaded.tokenizer.decode(part.response(row)) for row in range(n)], part


def load_of(server):
    """Rows in use, and the queue's length."""
    text = httpx.get(f"{server.url}/metrics").text
    return tuple(int(float(re.search(rf"^{name} (\S+)", text, re.M)[1])) for name in METRICS)


def eventually(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_until_idle(server):
    eventually(lambda: load_of(server) == (0, 0))


def test_answers_are_those_of_generate(client, server):
    for model, eta in (("good", 0.2), ("small", np.inf)):
        extra = {"eta": eta} if np.isfinite(eta) else {}
        answer = client.chat.completions.create(
            model=model, messages=CHAT, seed=7, n=2, max_tokens=12, temperature=0.7, top_p=0.9, extra_body=extra
        )
        texts, part = alone(server, CHAT, n=2, max_new_tokens=12, temperature=0.7, top_p=0.9, eta=eta)
        assert [choice.message.content for choice in answer.choices] == texts
        finish = ["stop" if finished else "length" for finished in part.finished]
        assert [choice.finish_reason for choice in answer.choices] == finish
        assert answer.usage.completion_tokens == part.lengths.sum()


def test_a_stream_is_the_whole_answer_in_pieces(client):
    settings = dict(model="good", messages=CHAT, seed=3, max_tokens=15, logprobs=True, top_logprobs=3)
    whole = client.chat.completions.create(**settings)
    chunks = [*client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})]
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert deltas[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
    assert len(deltas) >= 3 and deltas[-1].finish_reason == whole.choices[0].finish_reason
    entries = [entry for choice in deltas if choice.logprobs for entry in choice.logprobs.content]
    assert [entry.token for entry in entries] == [entry.token for entry in whole.choices[0].logprobs.content]
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob >= max(x.logprob for x in entry.top_logprobs)


def test_completions_take_texts_and_ids_and_tell_what_steers(client, server):
    prompt, settings = "How many eggs does", dict(seed=7, max_tokens=10, temperature=0.9)
    texts, part = alone(
        server, prompt, prompt_format="plain", max_new_tokens=10, temperature=0.9, eta=0.1, weights=[2.0]
    )
    ids = Tokenizer.load(server.ref).encode_prompt(prompt)
    for given in (prompt, ids):
        answer = client.completions.create(
            model="small", prompt=given, **settings, logprobs=2,
            extra_body={"guide": "good", "eta": 0.1, "weights": 2.0, "return_guidance": True},
        )  # fmt: skip
        choice = answer.choices[0]
        assert choice.text == texts[0]
        told = choice.logprobs.model_dump()
        length = part.lengths[0]
        for name, want in (("kl", part.kl), ("ref_logprob", part.ref_log_probs), ("token_logprobs", part.log_probs)):
            np.testing.assert_allclose(told[name], want[0, :length], atol=1e-4)
        assert [len(top) for top in told["top_logprobs"]] == [2] * length


def test_several_prompts_with_several_answers_keep_their_order(client, server):
    answer = client.completions.create(model="small", prompt=["eggs", "Sam"], n=2, seed=7, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    loaded = load(server.ref, dtype="float32", prompt_format="plain")
    tokens = [loaded.tokenizer.encode_prompt(prompt) for prompt in ("eggs", "Sam")]
    part = generate(loaded.ref, None, tokens, dataclasses.replace(loaded.sampling, max_new_tokens=6), rng=7, samples=2)
    assert [choice.text for choice in answer.choices] == [loaded.tokenizer.decode(part.response(i)) for i in range(4)]


def test_a_stop_string_ends_an_answer_and_is_left_out(client):
    settings = dict(model="small", messages=CHAT, seed=5, max_tokens=20)
    whole = client.chat.completions.create(**settings).choices[0].message.content
    stop = whole[4:6]
    for stream in (False, True):
        answer = client.chat.completions.create(**settings, stop=[stop, "never"], stream=stream)
        if stream:
            pieces = [chunk.choices[0] for chunk in answer]
            text, finish = "".join(piece.delta.content or "" for piece in pieces), pieces[-1].finish_reason
        else:
            text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, finish) == (whole.partition(stop)[0], "stop")


def test_models_are_the_reference_and_the_guides(client):
    assert [model.id for model in client.models.list()] == ["small", "good"]
    assert client.models.retrieve("good").eta == 0.1
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


REFUSED = [
    (dict(temperature=-1), 400, "temperature", "invalid_value"),
    (dict(temperature="hot"), 400, "temperature", "invalid_value"),
    (dict(top_p=-0.1), 400, "top_p", "invalid_value"),
    (dict(top_k=-2), 400, "top_k", "invalid_value"),
    (dict(max_tokens=0), 400, "max_tokens", "invalid_value"),
    (dict(max_tokens=CONTEXT), 400, "messages", "context_length_exceeded"),
    (dict(n=1000), 400, "n", "invalid_value"),
    (dict(seed=2**63), 400, "seed", "invalid_value"),
    (dict(logit_bias={"5": 3}), 400, "logit_bias", "unsupported_parameter"),
    (dict(tools=[{"type": "function"}]), 400, "tools", "unsupported_parameter"),
    (dict(wrong=1), 400, "wrong", "unknown_parameter"),
    (dict(top_logprobs=3), 400, "top_logprobs", "invalid_value"),
    (dict(messages=[]), 400, "messages", "invalid_value"),
    (dict(messages=[{"role": "assistant", "content": "x"}]), 400, "messages", "invalid_value"),
    (dict(messages="text"), 400, "messages", "invalid_value"),
    (dict(model="other"), 404, "model", "model_not_found"),
    (dict(eta=0), 400, "eta", "invalid_value"),
    (dict(guide="bad", eta=0.1), 400, "guide", "invalid_value"),
    (dict(guide="good", weights=[1.0, 2.0]), 400, "weights", "invalid_value"),
    (dict(guide="good", weights=1e38, eta=0.1), 400, "weights", "invalid_value"),
    (dict(mode="loud"), 400, "mode", "invalid_value"),
    (dict(stop=[""]), 400, "stop", "invalid_value"),
]


@pytest.mark.parametrize(("changes", "status", "param", "code"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_be_is_refused_by_the_field_s_name(server, changes, status, param, code):
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=LONG | changes)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code), error
    assert param in error["message"] or code == "context_length_exceeded"
    assert error["type"] == "invalid_request_error"


def test_neutral_values_and_what_openai_s_client_adds_are_taken(client):
    answer = client.chat.completions.create(
        **LONG | dict(max_tokens=2), frequency_penalty=0, presence_penalty=0.0, logit_bias={}, user="me", metadata={"a": "b"},
        response_format={"type": "text"}, store=False, tools=[],
    )  # fmt: skip
    again = [
        *LONG["messages"],
        answer.choices[0].message,
        {"role": "user", "content": [{"type": "text", "text": "so"}]},
    ]
    client.chat.completions.create(**LONG | dict(messages=again, max_tokens=2))


def test_values_that_other_servers_take_mean_the_same_here(client):
    def text(**changes):
        return client.chat.completions.create(**LONG | dict(max_tokens=6) | changes).choices[0].message.content

    assert text(top_p=0, seed=-1) == text(temperature=0)
    assert text(seed=4, extra_body={"top_k": -1}) == text(seed=4)
    sent_back = {"role": "assistant", "content": "x", "annotations": []}
    text(messages=[*LONG["messages"], sent_back, *LONG["messages"]])


def requests_of(server):
    """The lines of the access log."""
    return [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]


def connect(server, sent=b""):
    address = urllib.parse.urlsplit(server.url)
    one = socket.create_connection((address.hostname, address.port))
    one.sendall(sent)
    return one


def raw(**changes):
    body = json.dumps(LONG | changes)
    return raw_clients.HEAD.format(len(body), body).encode()


def test_a_client_that_leaves_frees_its_rows(server):
    """In the middle of a stream, and while it waits for a whole answer."""
    clients = [connect(server, raw(stream=stream, n=3)) for stream in (True, False) for _ in range(8)]
    for one in clients:
        one.close()
    wait_until_idle(server)


@pytest.mark.parametrize("count", [1, 50])
def test_clients_that_are_killed_free_their_rows(server, count):
    """Each wants many times the rows; the others fill the queue."""
    address, fields = urllib.parse.urlsplit(server.url), json.dumps(LONG | dict(n=64))
    words = [raw_clients.__file__, address.hostname, str(address.port), str(count), fields]
    queued = min(count - 1, QUEUE)

    def unfinished():
        return [line["completion_tokens"] for line in requests_of(server) if line.get("finished") is False]

    before = len(unfinished())
    clients = subprocess.Popen([sys.executable, "-SE", *words], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert [clients.stdout.readline() for _ in range(count)] == [b"asked\n"] * count
        eventually(lambda: load_of(server) == (ROWS, queued))
    finally:
        os.killpg(clients.pid, signal.SIGKILL)
        clients.wait()
    wait_until_idle(server)
    eventually(lambda: len(unfinished()) > before + queued)
    assert min(unfinished()[before:]) < 64 * LONG["max_tokens"]
    assert httpx.post(f"{server.url}/v1/chat/completions", json=LONG | dict(max_tokens=3)).status_code == 200


def test_clients_that_stop_in_the_middle_hold_up_nobody(server):
    """Without a head, with a half of one, without a body, with a half of one, and with streams that they do not read."""
    request = raw(stream=True, n=8)
    head = request.index(b"{")
    ends = [0, 20, head, head + 9, len(request)]
    clients = [connect(server, request[:end]) for end in ends for _ in range(5)]
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=LONG | dict(max_tokens=3), timeout=60)
    assert answer.status_code == 200
    wait_until_idle(server)
    for one in clients:
        one.close()


def test_of_too_many_requests_each_is_answered_or_told_to_come_again(server):
    def ask(seed):
        body = LONG | dict(seed=seed)
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = [*pool.map(ask, range(40))]
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= ROWS + QUEUE
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1" and answer.json()["error"]["code"] == "queue_full"


NAMES = [
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n", "seed", "stop", "stream", "stream_options",
    "temperature", "top_p", "eta", "guide", "weights", "mode", "top_k", "return_guidance", "logprobs", "top_logprobs",
    "logit_bias", "tools", "echo",
]  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["good", "small", "user", "qsharp", 1, 2, 0.5])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "role", "content", "type"]), x)
)
RIGHT = st.fixed_dictionaries(dict(model=st.sampled_from(["good", "small"]), messages=st.just(CHAT)))
BODIES = st.tuples(RIGHT | st.just({}), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4)).map(
    lambda pair: pair[0] | dict(max_tokens=2) | pair[1]
)


def test_nonsense_is_refused_and_the_server_lives(server):
    refused = 0

    @hypothesis.settings(max_examples=200, deadline=None, database=None)
    @hypothesis.given(body=BODIES, path=st.sampled_from(["chat/completions", "completions"]))
    def ask(body, path):
        nonlocal refused
        answer = httpx.post(f"{server.url}/v1/{path}", content=json.dumps(body), timeout=60)
        assert answer.status_code in (200, 400, 404)
        if answer.status_code != 200:
            refused += 1
            assert answer.json()["error"]["message"]

    ask()
    assert refused > 100
    for body in (b"", b"{", b"[]", b"\xff", b'{"model": NaN}', b"[" * 100_000):
        assert httpx.post(f"{server.url}/v1/completions", content=body).status_code == 400
    assert httpx.post(f"{server.url}/v1/completions", content=b"x" * 2_000_000).status_code == 413
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert "Traceback" not in server.log.read_text()


def test_the_log_has_a_line_for_each_request(server):
    httpx.post(f"{server.url}/v1/chat/completions", json=LONG | dict(max_tokens=3, eta=0.3))
    want = dict(method="POST", path="/v1/chat/completions", status=200, model="good", eta=pytest.approx(0.3))

    def logged():
        return [line for line in requests_of(server) if {name: line.get(name) for name in want} == want]

    eventually(logged)  # a line is written after the answer
    last = logged()[-1]
    assert last["prompt"] == LONG["messages"] and last["completion_tokens"] <= 3 and last["first_token_seconds"] > 0


def test_sigterm_ends_the_server_when_all_is_answered(server):
    chunks = []
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=LONG | dict(stream=True, seed=1), timeout=60
    ) as answer:
        lines = answer.iter_lines()
        chunks.append(next(lines))
        server.process.terminate()
        chunks += lines
    assert "data: [DONE]" in chunks
    assert server.process.wait(timeout=60) == 0
