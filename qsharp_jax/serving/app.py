"""The HTTP interface: OpenAI's two ways to ask, what a cluster asks, and the page.

| path | answer |
| --- | --- |
| POST /v1/chat/completions, POST /v1/completions | responses, whole or as server-sent events |
| GET /v1/models | the reference and the guides |
| GET /health, GET /ready | whether the engine lives; whether it takes requests |
| GET /metrics | for Prometheus |
| GET / | the page |
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.decoding import row_seeds
from qsharp_jax.serving import requests
from qsharp_jax.serving.broker import Broker
from qsharp_jax.serving.engine import Engine
from qsharp_jax.serving.metrics import Metrics
from qsharp_jax.serving.protocol import ApiError, ChatBody, CompletionBody, parse
from qsharp_jax.serving.replies import Reply, event
from qsharp_jax.serving.steering import Served, sampling_of
from qsharp_jax.system.errors import UserError

BODY_SECONDS = 30  # that a client may take to send a body
RETRY_SECONDS = 1  # after which a client may ask again when the queue was full
# The page takes nothing from elsewhere.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
GONE = 499  # in the log: the client left before its answer


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of what one client may take, and the key that it needs.

    Attributes:
      seconds: for an answer.
      body: bytes.
      api_key: that /v1 asks for; None for none.
      log_prompts: whether the access log has prompts and answers.
    """

    seconds: float
    body: int
    api_key: str | None = None
    log_prompts: bool = False


class Server:
    """The handlers, and what they share."""

    def __init__(
        self,
        served: Served,
        engine: Engine,
        broker: Broker,
        tokenizer: Tokenizer,
        limits: Limits,
    ):
        self._served, self._engine, self._broker = served, engine, broker
        self._tokenizer, self._limits = tokenizer, limits
        self._plain = dataclasses.replace(tokenizer, prompt_format="plain")  # of /v1/completions
        self.metrics = Metrics(engine)
        self.is_ready = False

    def app(self) -> Callable:
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
            Route("/", self._page),
        ]
        handlers = {ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: _gone}
        app = Starlette(routes=routes, exception_handlers=handlers)
        return _Logged(app, self.metrics)

    # --- Responses ----------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        body = parse(ChatBody, await self._body(request))
        messages = [message.as_message() for message in body.messages]
        if self._tokenizer.prompt_format != "chat":
            words = "the model has no chat template, or is served with plain prompts; ask /v1/completions"
            raise ApiError(400, words, param="messages", code="no_chat_template")
        try:
            prompt = self._tokenizer.encode_prompt(messages)
        except UserError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None
        return await self._answer(request, body, [prompt], body.new_tokens, messages)

    async def _complete(self, request: Request) -> Response:
        body = parse(CompletionBody, await self._body(request))
        try:
            prompts = [self._plain.encode_prompt(x) if isinstance(x, str) else x for x in body.prompts]
        except UserError as error:
            raise ApiError(400, str(error), param="prompt", code="invalid_value") from None
        return await self._answer(request, body, prompts, body.new_tokens, body.prompt)

    async def _answer(
        self, request: Request, body: ChatBody | CompletionBody, prompts: Sequence[Sequence[int]],
        new_tokens: int | None, shown: Any,
    ) -> Response:  # fmt: skip
        """Answer prompts; `new_tokens` None is as many as the context has left."""
        if not self.is_ready:
            raise ApiError(503, "the server is not ready; see /ready", code="not_ready", headers={"Retry-After": "5"})
        longest = max(map(len, prompts))
        new_tokens = max(self._engine.context - longest, 1) if new_tokens is None else new_tokens
        name = "messages" if isinstance(body, ChatBody) else "prompt"
        if longest + new_tokens > self._engine.context:
            raise ApiError(
                400,
                f"the prompt has {longest} tokens, which with {new_tokens} new ones is more than the context of"
                f" {self._engine.context}; shorten the prompt or the answer",
                param=name, code="context_length_exceeded",
            )  # fmt: skip
        sampling = sampling_of(self._served, body, new_tokens)
        seed = time.time_ns() if body.seed is None else body.seed % 2**63
        seeds = row_seeds(seed, body.n * len(prompts)).reshape(len(prompts), body.n).tolist()
        batch = [
            requests.Request(prompt, sampling, own, top_log_probs=bool(body.alternatives))
            for prompt, own in zip(prompts, seeds, strict=True)
        ]
        if len(batch) > self._engine.most_queued:
            words = f"there are {len(batch)} prompts, and the queue has {self._engine.most_queued} places; send fewer"
            raise ApiError(400, words, param=name, code="too_many_prompts")
        for one in batch:
            try:
                self._engine.check(one)
            except UserError as error:
                raise ApiError(400, str(error), param=name, code="invalid_value") from None
        reply = Reply(body, self._tokenizer, sum(map(len, prompts)), len(prompts) * body.n)
        request.state.log |= {
            "model": body.model, "eta": float(sampling.eta) if batch[0].is_guided else None,
            "prompt_tokens": reply.usage.prompt, "stream": body.stream,
        }  # fmt: skip
        if self._limits.log_prompts:
            request.state.log["prompt"] = shown
        if body.stream:
            return await self._stream(request, batch, reply, body.n)
        return await _unless_gone(request, self._whole(request, batch, reply, body.n))

    async def _whole(self, request: Request, batch: Sequence[requests.Request], reply: Reply, samples: int) -> Response:
        try:
            async with asyncio.timeout(self._limits.seconds):
                with self._answers(request, batch) as answers:
                    async for place, update in answers:
                        _check(update)
                        reply.add(place * samples + update.sample, update)
        except TimeoutError:
            raise self._too_slow() from None
        finally:
            self._log_end(request, reply)
        return JSONResponse(reply.whole())

    async def _stream(
        self, request: Request, batch: Sequence[requests.Request], reply: Reply, samples: int
    ) -> Response:
        stack = contextlib.ExitStack()
        answers = stack.enter_context(self._answers(request, batch))  # refusals come before the answer begins
        stack.callback(self._log_end, request, reply)

        async def events() -> AsyncIterator[str]:
            try:
                async with asyncio.timeout(self._limits.seconds):
                    for chunk in reply.first():
                        yield chunk
                    async for place, update in answers:
                        _check(update)
                        for chunk in reply.chunks(place * samples + update.sample, update):
                            yield chunk
                    for chunk in reply.last():
                        yield chunk
            except TimeoutError:
                yield event(self._too_slow().body)
            except ApiError as error:
                yield event(error.body)

        return _Events(events(), stack)

    @contextlib.contextmanager
    def _answers(self, request: Request, batch: Sequence[requests.Request]):
        """The updates of requests, counted; what is not finished at the end is cancelled."""
        begun, is_first = time.monotonic(), True
        try:
            with self._broker.answers(self._engine, batch) as answers:
                self.metrics.prompt_tokens.inc(sum(len(one.prompt) for one in batch))

                async def counted() -> AsyncIterator[tuple[int, requests.Update]]:
                    nonlocal is_first
                    async for place, update in answers:
                        if is_first and update.tokens:
                            is_first, seconds = False, time.monotonic() - begun
                            request.state.log["first_token_seconds"] = round(seconds, 4)
                            self.metrics.first_token.observe(seconds)
                        self.metrics.count(update)
                        yield place, update

                yield counted()
        except requests.Busy:
            words = f"the queue is full; ask again in {RETRY_SECONDS} s"
            headers = {"Retry-After": str(RETRY_SECONDS)}
            raise ApiError(429, words, code="queue_full", headers=headers) from None
        except requests.Closed:
            raise ApiError(503, "the server is shutting down", code="shutting_down") from None

    def _log_end(self, request: Request, reply: Reply) -> None:
        request.state.log |= {"completion_tokens": reply.usage.completion, "finished": reply.is_done}

    def _too_slow(self) -> ApiError:
        words = f"the answer took more than {self._limits.seconds:g} s; ask for fewer tokens, or later"
        return ApiError(504, words, code="timeout")

    # --- Everything else ----------------------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self._served.names]})

    async def _model(self, request: Request) -> Response:
        self._check_key(request)
        name = request.path_params["name"]
        if name not in self._served.names:
            raise ApiError(404, f"the model {name!r} is not here", param="model", code="model_not_found")
        return JSONResponse(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        guided = {"guides": self._served.ref, "eta": self._served.eta} if name != self._served.ref else {}
        context = {"context": self._engine.context, "chat": self._tokenizer.prompt_format == "chat"}
        return {"id": name, "object": "model", "created": self._served.created, "owned_by": "qsharp"} | guided | context

    async def _health(self, request: Request) -> Response:
        alive = not self._engine.has_failed
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def _ready(self, request: Request) -> Response:
        ready = self.is_ready and not self._engine.has_failed
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _page(self, request: Request) -> Response:
        page = resources.files("qsharp_jax.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    # --- Requests -----------------------------------------------------------------------------------------------------

    def _check_key(self, request: Request) -> None:
        if self._limits.api_key is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")  # as it came
        if not hmac.compare_digest(given, f"Bearer {self._limits.api_key}".encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _body(self, request: Request) -> Any:
        """Read a JSON body within the limits of size and time."""
        self._check_key(request)
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    data += part
                    if len(data) > self._limits.body:
                        words = f"the body has more than {self._limits.body} bytes; send less"
                        raise ApiError(413, words, code="body_too_large")
        except TimeoutError:
            words = f"the body did not come within {BODY_SECONDS} s"
            raise ApiError(408, words, code="timeout") from None
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise ApiError(400, "the body is not JSON", code="invalid_json") from None


class _Events(StreamingResponse):
    """Server-sent events, and what is to be closed when they end, however they end."""

    def __init__(self, events: AsyncIterator[str], stack: contextlib.ExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._stack:
            await super().__call__(scope, receive, send)


def _check(update: requests.Update) -> None:
    if update.finish == "error":
        raise ApiError(500, "the engine failed; see the server's log", code="engine_failed")


async def _unless_gone(request: Request, answer: Awaitable[Response]) -> Response:
    """Wait for an answer, unless the client leaves before."""

    async def wait_for_the_end() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(wait_for_the_end())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer for an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    words = f"{request.method} {request.url.path}: {error.detail.lower()}"
    return JSONResponse(ApiError(error.status_code, words).body, error.status_code, headers=error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)  # for the log; nobody receives it


class _Logged:
    """Write a JSON line for each request when it is over, and count it."""

    def __init__(self, app: Callable, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), GONE
        log: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = log

        async def noted(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            seconds = time.monotonic() - begun
            route = scope.get("route")
            path = scope["path"] if route is None else route.path
            self._metrics.requests.labels(path if route else "other", str(status)).inc()
            if scope["path"].startswith("/v1/") and scope["method"] == "POST":
                self._metrics.seconds.observe(seconds)
            line = {"time": time.time(), "method": scope["method"], "path": scope["path"], "status": status}
            print(json.dumps(line | {"seconds": round(seconds, 4)} | log), file=sys.stderr, flush=True)
