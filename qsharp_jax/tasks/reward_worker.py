"""Script that calls reward functions; `rewards.py` runs it in processes, and nothing imports it.

    python reward_worker.py FUNCTIONS

FUNCTIONS is a JSON list of [file or module, name]. It writes "ready" once it has loaded them, or the reason that
prevents it. For a line with {"columns": {...}}, the keyword arguments of one response, it writes {"rewards": [...]},
one per function, or {"error": "..."}.
"""

import asyncio
import concurrent.futures
import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

# Functions by which TRL lets a reward function write to its log; here they do nothing.
LOGGING: dict[str, Any] = {"log_extra": lambda column, values: None, "log_metric": lambda name, value: None}


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
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_result(rewards))
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _result(rewards)).result()


async def _result(rewards: Awaitable[Any]) -> Any:
    return await rewards


def explain(error: BaseException) -> str:
    """Return one line: the error, and the place in the user's file that raised it."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__) and not frame.filename.startswith("<frozen")
    ]
    where = f", {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    words = (str(error).strip() or "no message").splitlines()[0]
    return words if isinstance(error, LookupError) and not frames else f"{type(error).__name__}: {words}{where}"


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a function prints is no reply
    try:
        functions = [load(source, name) for source, name in json.loads(sys.argv[1])]
    except BaseException as error:
        replies.write(explain(error) + "\n")
        sys.exit(1)
    replies.write("ready\n")
    for line in sys.stdin:
        try:
            columns = json.loads(line)
            reply: dict[str, Any] = {"rewards": [call(function, columns) for function in functions]}
        except Exception as error:
            reply = {"error": explain(error)}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
