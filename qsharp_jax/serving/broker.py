"""Between the engine's thread and the event loop: the updates of each request, as an asynchronous iterator."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence

from qsharp_jax.serving.engine import Engine
from qsharp_jax.serving.requests import Request, Update


class Broker:
    """Hands the engine's updates to whoever waits for them; `deliver` is called on the engine's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._waiting: dict[Request, asyncio.Queue[Update]] = {}

    def deliver(self, updates: list[Update]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._route, updates)

    def _route(self, updates: list[Update]) -> None:
        for update in updates:
            if (queue := self._waiting.get(update.request)) is not None:  # else its client is gone
                queue.put_nowait(update)

    @contextlib.contextmanager
    def answers(self, engine: Engine, requests: Sequence[Request]) -> Iterator[AsyncIterator[tuple[int, Update]]]:
        """Submit requests, all or none, and give their updates, each with the place of its request.

        On leaving, what is not finished is cancelled.

        Raises:
          Busy, Closed: as of `Engine.submit`.
        """
        queue: asyncio.Queue[Update] = asyncio.Queue()
        places = {request: place for place, request in enumerate(requests)}
        left = {(request, sample) for request in requests for sample in range(len(request.seeds))}

        async def updates() -> AsyncIterator[tuple[int, Update]]:
            while left:
                update = await queue.get()
                if update.finish is not None:
                    left.discard((update.request, update.sample))
                yield places[update.request], update

        self._waiting |= dict.fromkeys(requests, queue)
        submitted: list[Request] = []
        try:
            for request in requests:
                engine.submit(request)
                submitted.append(request)
            yield updates()
        finally:
            for request in requests:
                del self._waiting[request]
            unfinished = {request for request, _ in left}
            for request in submitted:
                if request in unfinished:
                    engine.cancel(request)
