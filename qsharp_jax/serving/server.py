"""The process of a server: the engine on a thread of its own, HTTP on the main thread, and an orderly end."""

import asyncio
import contextlib
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.serving.app import Limits, Server
from qsharp_jax.serving.broker import Broker
from qsharp_jax.serving.engine import Engine
from qsharp_jax.serving.requests import Update
from qsharp_jax.serving.steering import Served
from qsharp_jax.system.errors import UserError

REQUEST_SECONDS = 30  # that a connection may be open without the head of a request
TAKE_SECONDS = 60  # that a client may leave what it is sent in the server's memory
# Makes the engine, given its `deliver`; called on the engine's thread, which owns the devices.
MakeEngine = Callable[[Callable[[list[Update]], None]], Engine]
OnMesh = Callable[[], contextlib.AbstractContextManager]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound; port 0 is any that is free. Raises a UserError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        reason = error.strerror if isinstance(error, OSError) else "ports go up to 65535"
        raise UserError(f"cannot listen at {host}:{port} ({reason}); give another --host or --port") from None
    return listening


def run(
    make_engine: MakeEngine, on_mesh: OnMesh, served: Served, tokenizer: Tokenizer,
    limits: Limits, listening: socket.socket,
) -> int:  # fmt: skip
    """Serve until SIGTERM or Ctrl-C, then answer what has been asked, and return the exit code.

    Args:
      on_mesh: called on the engine's thread, which makes and runs the engine inside; a mesh is set for one thread only.
    """
    return asyncio.run(_run(make_engine, on_mesh, served, tokenizer, limits, listening))


async def _run(
    make_engine: MakeEngine, on_mesh: OnMesh, served: Served, tokenizer: Tokenizer,
    limits: Limits, listening: socket.socket,
) -> int:  # fmt: skip
    loop = asyncio.get_running_loop()
    broker = Broker(loop)
    future_engine: asyncio.Future[Engine] = loop.create_future()
    warm, ended, told_again = asyncio.Event(), asyncio.Event(), asyncio.Event()
    errors: list[BaseException] = []

    def tell(function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, after a second signal
            loop.call_soon_threadsafe(function, *arguments)

    def own_the_devices() -> None:
        try:
            with on_mesh():
                engine = make_engine(broker.deliver)
                tell(future_engine.set_result, engine)
                engine.warm_up()
                tell(warm.set)
                engine.run()
        except BaseException as error:
            errors.append(error)
            tell(lambda: future_engine.done() or future_engine.set_exception(errors[0]))
        finally:
            tell(ended.set)

    thread = threading.Thread(target=own_the_devices, name="engine", daemon=True)
    thread.start()
    engine = await future_engine
    server = Server(served, engine, broker, tokenizer, limits)
    http = _Http(
        uvicorn.Config(
            server.app(), http=Connection, log_level="warning", access_log=False, lifespan="off", server_header=False,
            timeout_graceful_shutdown=int(limits.seconds) + 1, timeout_keep_alive=REQUEST_SECONDS,
        )
    )  # fmt: skip

    def stop() -> None:
        if http.should_exit:  # a second signal does not wait for answers
            http.force_exit = True
            told_again.set()
        http.should_exit, server.is_ready = True, False

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)

    async def follow_the_engine() -> None:
        await _either(warm, ended)
        if warm.is_set():
            server.is_ready = not http.should_exit
            print("ready", file=sys.stderr, flush=True)
        await ended.wait()
        http.should_exit = True

    host, port = listening.getsockname()[:2]
    names = ", ".join(served.names)
    print(f"serving {names} at http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
    following = asyncio.create_task(follow_the_engine())
    await http.serve(sockets=[listening])
    engine.close()
    following.cancel()
    await _either(ended, told_again)
    if errors:
        traceback.print_exception(errors[0])
        return 1
    return 0


async def _either(*events: asyncio.Event) -> None:
    """Wait for one of the events."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


class Connection(H11Protocol):
    """A connection that is closed if its client sends no request, or does not read what it is sent.

    uvicorn waits for either without a limit.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # writing pauses when the kernel takes no more
        self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # which ends the wait
        if self.cycle is None or self.cycle.response_complete:  # a part of a head
            self._wait_for_request()

    def _wait_for_request(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(REQUEST_SECONDS, self.timeout_keep_alive_handler)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_client()

    def _wait_for_client(self) -> None:
        """Close the connection if the client takes nothing more for `TAKE_SECONDS`."""
        before = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < before:
                self._wait_for_client()
            else:
                self.transport.abort()

        self._stalled = self.loop.call_later(TAKE_SECONDS, look)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled.cancel()


class _Http(uvicorn.Server):
    """A server that leaves signals to its caller: uvicorn's own would end the process by them once more."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
