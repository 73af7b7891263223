"""Script that calls reward functions; `rewards.py` runs it in processes, and nothing imports it.

    python reward_worker.py FUNCTIONS

FUNCTIONS is a JSON list of [file or module, name]. It writes "ready" once it has loaded them, or the reason that
prevents it. For a line with {"columns": {...}}, the keyword arguments of one response, it writes {"rewards": [...]},
one per function, or {"error": "..."}. Standard input and output are not the functions': they read nothing, and print to
standard error.

It ends soon after the process that started it, however that ended: an idle one as its input ends; a busy one, with the
processes that it has started, by a thread that looks each second. A single call of C code that does not release
Python's lock, such as a search by a regular expression, is not interrupted: the worker ends after it. On Windows, where
a process keeps the number of a parent that has ended, a busy one ends after its function.
"""

import asyncio
import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

# Functions by which TRL lets a reward function write to its log; here they do nothing.
LOGGING: dict[str, Any] = {"log_extra": lambda column, values: None, "log_metric": lambda name, value: None}
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
WATCH = 1.0  # seconds between looks at whether the parent is still there

_starting = threading.Lock()


def load(source: str, name: str) -> Callable[..., Any]:
    """Load a function from a file, or from a module that can be imported."""
    if source.endswith(".py"):
        sys.path.insert(0, os.path.dirname(source))  # it may import what lies beside it
        spec = importlib.util.spec_from_file_location(os.path.basename(source)[: -len(".py")], source)
        assert spec is not None and spec.loader is not None  # as the name ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        module = importlib.import_module(source)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise LookupError(f"{source} has no function {name!r}; it has {', '.join(own) or 'none'}")
    return function


def call(function: Callable[..., Any], columns: Mapping[str, list]) -> Any:
    """Call a function of TRL's signature for one response; one without `**kwargs` gets the arguments that it names."""
    columns = {**LOGGING, **columns}
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        columns = {name: column for name, column in columns.items() if name in parameters}
    rewards = function(**columns)
    if inspect.isawaitable(rewards):
        rewards = _wait_for(rewards)
    if not isinstance(rewards, Sequence) and not hasattr(rewards, "tolist"):
        raise TypeError(f"it returned a {type(rewards).__name__}, not a list of one reward")
    if len(rewards) != 1:
        raise ValueError(f"it returned {len(rewards)} rewards for 1 response")
    return None if rewards[0] is None else float(rewards[0])


def _wait_for(rewards: Awaitable[Any]) -> Any:
    """Return an asynchronous function's result, also where this thread has a running event loop, as in a notebook."""
    with _starting:
        loop = _loop()
    future = asyncio.run_coroutine_threadsafe(_result(rewards), loop)
    try:
        return future.result()
    finally:
        future.cancel()  # after Ctrl-C, when nobody waits for it; one that is done stays so


async def _result(rewards: Awaitable[Any]) -> Any:
    return await rewards


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the process's event loop, in a thread of its own: clients of the user's file work in one loop only."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=_run, args=(loop,), daemon=True).start()
    return loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        with contextlib.suppress(SystemExit, KeyboardInterrupt):  # from a function, whose caller gets it too
            loop.run_forever()


def explain(error: BaseException) -> str:
    """Return one line: the error, and the place in the user's file that raised it; no place if this package did."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != importlib.__file__ and not frame.filename.startswith((PACKAGE, "<frozen"))
    ]
    where = f", {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    words = (str(error).strip() or "no message").splitlines()[0]
    return words if isinstance(error, LookupError) and not frames else f"{type(error).__name__}: {words}{where}"


def _end_after(parent: int) -> None:
    """End this process and those that it has started once its parent is another one, since the first has ended."""
    while os.getppid() == parent:
        time.sleep(WATCH)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    if hasattr(os, "killpg"):
        threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # a function, or a process that it starts, would wait for input, or take the requests
    os.close(nothing)
    os.dup2(2, 1)  # what a function prints is no reply
    try:
        functions = [load(source, name) for source, name in json.loads(sys.argv[1])]
    except BaseException as error:
        replies.write(explain(error) + "\n")
        sys.exit(1)
    replies.write("ready\n")
    for line in requests:
        try:
            columns = json.loads(line)
            reply: dict[str, Any] = {"rewards": [call(function, columns) for function in functions]}
        except Exception as error:
            reply = {"error": explain(error)}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
