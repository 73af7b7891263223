"""The HTTP interface on an engine that does as it is told: it answers, or is silent, full, closed or broken."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
import types

import bpe
import httpx
import jax
import pytest
import uvicorn

from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.sampling import Sampling
from qsharp_jax.serving import server as server_module
from qsharp_jax.serving.app import Limits, Server
from qsharp_jax.serving.broker import Broker
from qsharp_jax.serving.requests import Busy, Closed, Load, Update
from qsharp_jax.serving.steering import Served

BODY = dict(model="small", messages=[{"role": "user", "content": "eggs"}], max_tokens=3)
PATH = "/v1/chat/completions"


class Told:
    """In place of an `Engine`: `does` is what it does with a request."""

    context, has_failed, most_queued = 64, False, 5

    def __init__(self, does):
        self.does, self.cancelled, self.asked = does, [], []
        self.load = Load(queued=1, rows=4, rows_in_use=2, steps=0, row_steps=0)

    def check(self, request):
        pass

    def submit(self, request):
        self.asked.append(request)
        if isinstance(self.does, type):
            raise self.does
        for update in self.does(request):
            self.deliver([update])

    def cancel(self, request):
        self.cancelled.append(request)


def letters(request, finish="length"):
    yield Update(request, 0, [40, 41], [-1.0, -2.0], [-1.0, -2.0], [0.0, 0.0], [0.5, 0.5], [], None)
    yield Update(request, 0, [42], [-1.0], [-1.0], [0.0], [float("nan")], [], finish)


def long(request):
    """An answer of some megabytes, whole."""
    count = 20_000
    yield Update(request, 0, [40] * count, *[[-1.0] * count] * 4, [], "length")


def silent(request):
    return ()


def endless(request):
    for _ in range(500):
        yield Update(request, 0, [40, 41], [-1.0, -2.0], [-1.0, -2.0], [0.0, 0.0], [0.5, 0.5], [], None)


def broken(request):
    yield Update(request, 0, [], [], [], [], [], [], "error")


@contextlib.contextmanager
def serving(does, *, is_ready=True, **limits):
    """A client of a server with such an engine."""
    engine, started = Told(does), threading.Event()
    limits = Limits(**dict(seconds=20, body=1000) | limits)
    tokenizer = Tokenizer(bpe.make(), "chat")
    served = Served("small", ("good",), Sampling(), 0.1, "qsharp", created=0)
    here = types.SimpleNamespace()
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that the kernel takes little for a client

    async def main():
        broker = Broker(asyncio.get_running_loop())
        engine.deliver = broker.deliver
        server = Server(served, engine, broker, tokenizer, limits)
        server.is_ready = is_ready
        config = uvicorn.Config(server.app(), http=server_module.Connection, log_level="warning", lifespan="off")
        here.http = uvicorn.Server(config)
        started.set()
        await here.http.serve(sockets=[listening])

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    started.wait()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=30) as client:
            yield client, engine
    finally:
        here.http.should_exit = here.http.force_exit = True
        thread.join(timeout=10)


def raw(body):
    """A request's bytes."""
    body = json.dumps(body).encode()
    return f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def all_cancelled(engine):
    """True if there are requests, and all are cancelled, within some seconds."""
    deadline = time.monotonic() + 10
    while (not engine.asked or engine.cancelled != engine.asked) and time.monotonic() < deadline:
        time.sleep(0.01)
    return engine.cancelled == engine.asked


def events(answer):
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(stream):
    with serving(silent) as (client, engine):
        with pytest.raises(httpx.ReadTimeout):
            with client.stream("POST", PATH, json=BODY | dict(stream=stream), timeout=0.3) as answer:
                answer.read()
        assert all_cancelled(engine) and len(engine.asked) == 1


def test_a_client_that_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(server_module, "TAKE_SECONDS", 0.3)
    with serving(endless) as (client, engine), socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((client.base_url.host, client.base_url.port))
        deaf.sendall(raw(BODY | dict(stream=True, return_guidance=True)))
        assert all_cancelled(engine) and len(engine.asked) == 1


def test_a_client_that_reads_slowly_is_not(monkeypatch):
    """It takes all of an answer in several times the seconds that it may take nothing."""
    monkeypatch.setattr(server_module, "TAKE_SECONDS", 0.3)
    with serving(long) as (client, engine), socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((client.base_url.host, client.base_url.port))
        slow.sendall(raw(BODY | dict(return_guidance=True)))
        begun, answer = time.monotonic(), b""
        while part := slow.recv(1 << 16):
            answer += part
            if answer.endswith(b"}") and answer.count(b"kl") >= 20_000:
                break
            if time.monotonic() < begun + 1.5:
                time.sleep(0.02)
        assert answer.count(b'"kl"') == 20_000 and time.monotonic() > begun + 4 * 0.3


@pytest.mark.parametrize("head", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost:"])
def test_a_connection_without_a_request_is_closed(monkeypatch, head):
    monkeypatch.setattr(server_module, "REQUEST_SECONDS", 0.2)
    with serving(silent) as (client, engine):
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as one:
            one.sendall(head)
            assert one.recv(1) == b""


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_answered_is_not_cancelled(stream):
    with serving(letters) as (client, engine):
        answer = client.post(PATH, json=BODY | dict(stream=stream))
        assert answer.status_code == 200 and len(engine.asked) == 1 and engine.cancelled == []


def test_an_answer_that_takes_too_long_is_given_up():
    with serving(silent, seconds=0.2) as (client, engine):
        answer = client.post(PATH, json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        answer = client.post(PATH, json=BODY | dict(stream=True))
        assert answer.status_code == 200 and events(answer)[-1]["error"]["code"] == "timeout"
        assert all_cancelled(engine) and len(engine.asked) == 2


@pytest.mark.parametrize(("does", "status", "code"), [(Busy, 429, "queue_full"), (Closed, 503, "shutting_down")])
def test_a_full_queue_and_a_closed_engine_have_their_status(does, status, code):
    with serving(does) as (client, engine):
        for stream in (False, True):
            answer = client.post(PATH, json=BODY | dict(stream=stream))
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert ("retry-after" in answer.headers) == (status == 429)


def test_more_prompts_than_the_queue_takes_are_a_request_s_own_fault():
    """And not a matter of time, as they would be with 429."""
    with serving(silent) as (client, engine):
        answer = client.post("/v1/completions", json=dict(model="small", prompt=["a"] * 6))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_prompts") and not engine.asked


def test_of_several_prompts_all_are_taken_or_none():
    """The third is refused: the two before it are cancelled."""
    with serving(silent) as (client, engine):
        taken = engine.submit

        def submit(request):
            if len(engine.asked) == 2:
                raise Busy
            taken(request)

        engine.submit = submit
        answer = client.post("/v1/completions", json=dict(model="small", prompt=["a", "b", "c"]))
        assert answer.status_code == 429 and engine.cancelled == engine.asked and len(engine.asked) == 2


def test_an_engine_that_broke_is_told():
    with serving(broken) as (client, engine):
        assert client.post(PATH, json=BODY).status_code == 500
        assert events(client.post(PATH, json=BODY | dict(stream=True)))[-1]["error"]["code"] == "engine_failed"
        assert client.get("/health").status_code == 200
        engine.has_failed = True
        assert client.get("/health").status_code == client.get("/ready").status_code == 503


def test_before_it_is_ready_a_server_takes_nothing():
    with serving(letters, is_ready=False) as (client, engine):
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        answer = client.post(PATH, json=BODY)
        assert answer.status_code == 503 and answer.headers["retry-after"] and not engine.asked


def test_the_key_is_asked_for_where_there_is_one():
    with serving(letters, api_key="sécret") as (client, engine):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sécret".encode()[:-1]}):
            for method, path in (("POST", PATH), ("POST", "/v1/completions"), ("GET", "/v1/models")):
                answer = client.request(method, path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        right = {"Authorization": "Bearer sécret".encode()}
        assert client.post(PATH, json=BODY, headers=right).status_code == 200
        assert client.get("/health").status_code == client.get("/").status_code == 200


def test_too_large_a_body_is_refused_while_it_comes():
    with serving(letters, body=1000) as (client, engine):
        answer = client.post(PATH, content=(b" " * 600 for _ in range(1000)))  # chunked, without its length
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_metrics_count_what_was_answered():
    with serving(letters) as (client, engine):
        engine.does = Busy
        client.post(PATH, json=BODY)
        engine.does = letters
        client.post(PATH, json=BODY)
        client.post(PATH, json=BODY | dict(model="good"))
        client.post(PATH, json=BODY | dict(model="bad"))
        lines = dict(
            line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")
        )
    assert lines['qsharp_tokens_total{guided="false"}'] == lines['qsharp_tokens_total{guided="true"}'] == "3.0"
    assert float(lines["qsharp_prompt_tokens_total"]) == sum(len(one.prompt) for one in engine.asked[1:])
    assert lines['qsharp_requests_total{path="/v1/chat/completions",status="200"}'] == "2.0"
    assert lines['qsharp_requests_total{path="/v1/chat/completions",status="404"}'] == "1.0"
    assert (lines["qsharp_queue_length"], lines["qsharp_rows_in_use"]) == ("1.0", "2.0")
    assert lines["qsharp_time_to_first_token_seconds_count"] == "2.0"


def test_the_page_needs_nothing_from_elsewhere():
    with serving(letters) as (client, _):
        answer = client.get("/")
    assert (
        answer.headers["content-type"].startswith("text/html")
        and "default-src 'none'" in answer.headers["content-security-policy"]
    )
    assert "http://" not in answer.text and "https://" not in answer.text


def serve(make_engine, on_mesh=contextlib.nullcontext):
    """The server's exit code, when it has ended by itself or by a signal."""
    listening = server_module.listen("127.0.0.1", 0)
    served = Served("small", ("good",), Sampling(), 0.1, "qsharp", created=0)
    limits = Limits(seconds=20, body=1000)
    return server_module.run(make_engine, on_mesh, served, Tokenizer(bpe.make(), "chat"), limits, listening)


def test_the_mesh_is_that_of_the_engine_s_thread():
    """JAX sets a mesh for a thread alone."""
    mesh, seen = jax.make_mesh((1,), ("data",)), []

    def make_engine(deliver):
        seen.append((jax.sharding.get_mesh(), threading.current_thread().name))
        raise Closed

    with pytest.raises(Closed):
        serve(make_engine, lambda: jax.set_mesh(mesh))
    assert seen == [(mesh, "engine")] and jax.sharding.get_mesh().empty


def test_a_second_signal_ends_a_server_that_still_compiles():
    compiling, ended = threading.Event(), threading.Event()

    class Compiling(Told):
        def warm_up(self):
            compiling.set()
            ended.wait(20)

        def run(self):
            pass

        def close(self):
            pass

    def signals():
        compiling.wait(20)
        for _ in range(2):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signals).start()
    begun = time.monotonic()
    try:
        assert serve(lambda deliver: Compiling(silent)) == 0
        assert 1 <= time.monotonic() - begun < 10
    finally:
        ended.set()
