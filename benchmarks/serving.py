"""The server under load, beside `ContinuousBatch` on the same requests: throughput, time to first token, overload.

    python benchmarks/serving.py --ref MODEL --guide DIR [--clients 16] [--requests 64] [--minutes 5] [--parts first]

Starts `qsharp serve` with as many rows as clients, and asks by HTTP, one request after the other from each client:
prompts of 20 to 120 tokens cut from a text, at most 64 new tokens, T 0.8, top-p 0.9, eta 0.1, streamed.

  throughput    tokens per second of the server at so many clients, and of `ContinuousBatch` with as many rows on the
                same prompts, settings and seeds; in turn, three times. Guided, and unguided.
  first token   of one client, in seconds, beside a prefill of the same prompt and one step of all rows, timed in this
                process by the programs that the server runs
  overload      four times as many clients for some minutes: answered, refused with 429, lost; the longest and the 50th,
                95th and 99th percentile of seconds to the first token; the server's memory at the start and at the end

Needs the extras serve and test.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import jax
import numpy as np
import psutil

from qsharp_jax.decoding import ContinuousBatch, row_seeds
from qsharp_jax.run.folders import Loaded, load
from qsharp_jax.serving.engine import Engine
from qsharp_jax.serving.requests import Request

NEW_TOKENS, CONTEXT, ETA = 64, 256, 0.1
PROMPTS = (20, 120)  # tokens
TEXT = Path(__file__).with_name("RESULTS.md")  # what prompts are cut from
ROUNDS = 3
PARTS = ["throughput", "first", "overload"]
CHUNK = 64  # as of `qsharp serve` on a CPU


@dataclasses.dataclass(frozen=True)
class Item:
    """A request, for both ways."""

    prompt: list[int]
    seed: int


@contextlib.contextmanager
def server(options: argparse.Namespace, rows: int, queue: int) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a running server, and its process."""
    words = ["--ref", options.ref, "--guide", f"guide={options.guide}", "--port", "0", "--rows", str(rows)]
    words += ["--context", str(CONTEXT), "--queue", str(queue), "--name", "ref", "--dtype", options.dtype]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", folder)}
        with log.open("w") as file:
            command = [sys.executable, "-m", "qsharp_jax.cli", "serve", *words]
            process = subprocess.Popen(command, stderr=file, env=environment)
        try:
            while "\nready\n" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            yield re.search(r" at (http\S+)", log.read_text())[1], psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 0
            assert "Traceback" not in log.read_text()


async def ask(client: httpx.AsyncClient, one: Item, guided: bool) -> tuple[int, int, float]:
    """Send a request; returns the status, how many tokens came, and the seconds to the first."""
    body = dict(
        model="guide" if guided else "ref", prompt=one.prompt, max_tokens=NEW_TOKENS, seed=one.seed, temperature=0.8,
        top_p=0.9, stream=True, stream_options={"include_usage": True},
    ) | ({"eta": ETA} if guided else {})  # fmt: skip
    begun, first, tokens = time.monotonic(), np.nan, 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                first = time.monotonic() - begun if np.isnan(first) else first
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return answer.status_code, tokens, first


async def from_clients(
    url: str, items: Sequence[Item], clients: int, guided: bool
) -> tuple[float, list[tuple[int, int, float]]]:
    """Send requests, one after the other from each client; returns the seconds, and what came of each."""
    waiting, results = iter(items), []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as http:

        async def one_client() -> None:
            for one in waiting:
                results.append(await ask(http, one, guided))

        begun = time.monotonic()
        await asyncio.gather(*[one_client() for _ in range(clients)])
        return time.monotonic() - begun, results


def offline(models: Loaded, items: Sequence[Item], rows: int, guided: bool) -> float:
    """Tokens per second of `ContinuousBatch`."""
    sampling = dataclasses.replace(
        models.sampling, max_new_tokens=NEW_TOKENS, temperature=0.8, top_p=0.9, eta=ETA if guided else np.inf
    )
    seeds = np.concatenate([row_seeds(one.seed, 1) for one in items])
    begun = time.monotonic()
    batch = ContinuousBatch(
        models.ref, models.guide if guided else None, [one.prompt for one in items], sampling, rng=seeds, rows=rows
    )
    for _ in batch:
        pass
    return batch.tokens / (time.monotonic() - begun)


def first_token_bound(models: Loaded, one: Item, rows: int, chunk: int) -> Callable[[], float]:
    """A function that times the prefill of a prompt and one step of all rows, by the engine's programs; median of 5."""
    sampling = dataclasses.replace(
        models.sampling, max_new_tokens=2, temperature=0.8, top_p=0.9, eta=ETA, weights=[1.0]
    )
    engine = Engine(
        models.ref, [models.guide], dataclasses.replace(models.sampling, eta=np.inf), rows=rows, context=CONTEXT,
        queue=1, chunk=chunk, deliver=lambda updates: None,
    )  # fmt: skip

    def once() -> float:
        begun = time.monotonic()
        engine._queue.append(Request(one.prompt, sampling, [0]))
        engine._admit()
        engine._dispatch()
        jax.block_until_ready(engine._state)
        engine._free(0)
        return time.monotonic() - begun

    once()  # compiles
    return lambda: float(np.median([once() for _ in range(5)]))


async def overload(url: str, process: psutil.Process, clients: int, seconds: float, items: Sequence[Item]) -> dict:
    """Ask from `clients` without a pause, until so many seconds have passed."""
    counts, firsts, memory = {"answered": 0, "refused": 0, "lost": 0}, [], [process.memory_info().rss]
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as http:

        async def one_client(number: int) -> None:
            for turn in range(10**9):
                if time.monotonic() > end:
                    return
                try:
                    status, tokens, first = await ask(http, items[(number + turn * clients) % len(items)], True)
                except httpx.HTTPError:
                    counts["lost"] += 1
                    continue
                if status == 429:
                    counts["refused"] += 1
                    await asyncio.sleep(1)  # as Retry-After says
                elif status == 200 and tokens:
                    counts["answered"] += 1
                    firsts.append(first)
                else:
                    counts["lost"] += 1

        async def watch() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(10)
                memory.append(process.memory_info().rss)

        await asyncio.gather(watch(), *[one_client(number) for number in range(clients)])
    places = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    quantiles = {name: round(float(np.quantile(firsts, place)), 2) for name, place in places.items()}
    third = len(memory) // 3
    flat = np.mean(memory[-third:]) / np.mean(memory[third : 2 * third]) if third else np.nan
    return counts | {
        "seconds to the first token": quantiles,
        "memory, last third / middle third": round(float(flat), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", required=True)
    parser.add_argument("--guide", required=True)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0, help="of overload")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS, help=",".join(PARTS))
    parser.add_argument("--out", type=Path, help="where the figures go as JSON, besides the terminal")
    options = parser.parse_args()
    models = load(options.ref, options.guide, dtype=options.dtype, prompt_format="plain")
    rng, text = np.random.default_rng(0), models.tokenizer.encode_prompt(TEXT.read_text()[:200_000])
    lengths = rng.integers(*PROMPTS, size=options.requests)
    begins = rng.integers(0, len(text) - PROMPTS[1], size=options.requests)
    items = [Item(text[b : b + n], int(i)) for i, (b, n) in enumerate(zip(begins, lengths, strict=True))]
    figures: dict = {"clients": options.clients, "requests": options.requests}

    def show(name: str, value: object) -> None:
        figures[name] = value
        print(f"{name}: {value}", flush=True)

    with server(options, options.clients, options.clients) as (url, process):
        for guided in (True, False) if "throughput" in options.parts else ():
            offline(models, items[: options.clients], options.clients, guided)  # compiles
            ratios, rates = [], []
            for _ in range(ROUNDS):
                seconds, results = asyncio.run(from_clients(url, items, options.clients, guided))
                assert all(status == 200 for status, _, _ in results)
                rates.append(sum(tokens for _, tokens, _ in results) / seconds)
                ratios.append(rates[-1] / offline(models, items, options.clients, guided))
            name = "guided" if guided else "unguided"
            show(f"{name}, tokens per second", [round(rate, 1) for rate in rates])
            show(f"{name}, server / ContinuousBatch", [round(ratio, 3) for ratio in ratios])
        if "first" in options.parts:
            bound = first_token_bound(models, items[0], options.clients, CHUNK)
            ratios = []
            for _ in range(ROUNDS):
                _, alone = asyncio.run(from_clients(url, [items[0]] * 5, 1, True))
                seconds = float(np.median([first for _, _, first in alone]))
                ratios.append((round(seconds, 4), round(bound(), 4)))
            show("first token of one client, and a prefill and a step, seconds", ratios)
            show("their ratios", [round(one / other, 3) for one, other in ratios])
        if "overload" in options.parts:
            show(
                f"{4 * options.clients} clients for {options.minutes:g} minutes",
                asyncio.run(overload(url, process, 4 * options.clients, 60 * options.minutes, items)),
            )
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
