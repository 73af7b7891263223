"""Milliseconds a decode step: our guided loop, our unguided loop, and the bound set by the bytes that a step must read.

    python benchmarks/decode.py [--rounds 5]

Random weights, float32: a Llama-shaped reference of 110M parameters (768 x 12) and a guide of 23M (384 x 6), vocabulary
32,000, 20 candidates, prompts of 128 tokens, 64 steps timed apart from prefill. All variants are measured in turn in
each round, so that their ratios hold when the machine's speed drifts; the median over rounds is printed.
"""

import argparse
import functools
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import generate
from qsharp_jax.models import config, decoder, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel

VOCABULARY, PROMPT, STEPS, CANDIDATES = 32_000, 128, 64, 20
BATCHES = (1, 16)


def llama_shape(embed: int, layers: int, heads: int) -> DecoderConfig:
    return config.make(
        "tiny", vocab_size=VOCABULARY, embed=embed, layers=layers, heads=heads, kv_heads=heads, head_dim=embed // heads,
        mlp=4 * embed * 2 // 3, max_positions=1024, tied=True,
    )  # fmt: skip


def models() -> tuple[LanguageModel, ValueModel]:
    ref_config, trunk = llama_shape(768, 12, 12), llama_shape(384, 6, 6)
    ref = LanguageModel(decoder.init(jax.random.key(0), ref_config), ref_config)
    guide_config = ValueConfig(trunk)
    params = value.init(jax.random.key(1), guide_config)
    params["head"]["kernel"] = jax.random.normal(jax.random.key(2), params["head"]["kernel"].shape) * 0.05
    return generate.for_decoding(ref), generate.for_decoding(ValueModel(params, guide_config))


def step_milliseconds(ref: LanguageModel, guide: ValueModel | None, batch: int) -> float:
    """Of one decode step; the loop starts from fresh caches, whose making is not timed."""
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(batch, PROMPT)).astype(np.int32)
    start = np.zeros(batch, np.int32)
    fill = functools.partial(generate.prefill, tokens=tokens[:, :-1], start=start, size=PROMPT - 1 + STEPS)
    controls = generate.Controls(
        eta=jnp.full(batch, 0.1), temperature=jnp.ones(batch), top_p=jnp.ones(batch),
        top_k=jnp.zeros(batch, jnp.int32), budget=jnp.full(batch, STEPS), seed=jnp.arange(batch, dtype=jnp.uint32),
    )  # fmt: skip
    state = generate.first_state(
        fill(ref.params, ref.config),
        None if guide is None else fill(guide.params["trunk"], guide.config.trunk),
        tokens,
        start,
        STEPS,
    )
    settings = generate.Settings(stop_ids=(), candidates=CANDIDATES, mode="qsharp", truncate=False)
    jax.block_until_ready(state)
    began = time.perf_counter()
    jax.block_until_ready(generate.decode(ref, guide, state, controls, settings=settings))
    return (time.perf_counter() - began) / STEPS * 1e3


def step_bytes(ref: LanguageModel, guide: ValueModel | None, batch: int) -> int:
    """Weights and whole cache buffers once each; of an embedding table that is not the head only a few rows."""
    total = 0
    decoders = [(ref.params, ref.config)] + ([] if guide is None else [(guide.params["trunk"], guide.config.trunk)])
    for params, shape in decoders:
        is_head = params is ref.params
        weights = {name: leaf for name, leaf in params.items() if name != "embedding" or is_head}
        total += sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
        cache = 2 * shape.layers * batch * shape.kv_heads * (PROMPT - 1 + STEPS) * shape.head_dim
        total += cache * shape.compute_dtype.itemsize
    return total


def copy_bandwidth() -> float:
    """Bytes read and written a second by a pass over 1 GiB, in place: new pages would cost more than the copy."""
    step = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    x = jax.block_until_ready(step(jnp.zeros(2**28, jnp.float32)))
    began = time.perf_counter()
    x = jax.block_until_ready(step(x))
    return 2 * x.nbytes / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    ref, guide = models()
    print(f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}, float32")
    variants = {"unguided": None, "guided": guide}
    times = {(batch, name): [] for batch in BATCHES for name in variants}
    bandwidths = []
    for number in range(rounds + 1):
        for batch, name in times:
            milliseconds = step_milliseconds(ref, variants[name], batch)
            if number:  # the first round compiles
                times[batch, name].append(milliseconds)
        bandwidths.append(copy_bandwidth())
    bandwidth = float(np.median(bandwidths))
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s (read + write)\n")
    print("| batch | loop     | ms a step | MB a step | bound ms | bound / measured | guided / unguided |")
    print("| ----- | -------- | --------- | --------- | -------- | ---------------- | ----------------- |")
    for (batch, name), measured in times.items():
        median, bytes_ = float(np.median(measured)), step_bytes(ref, variants[name], batch)
        bound = bytes_ / bandwidth * 1e3
        ratio = "" if name == "unguided" else f"{np.median(np.divide(measured, times[batch, 'unguided'])):.2f}"
        print(
            f"| {batch:5d} | {name:8s} | {median:9.2f} | {bytes_ / 1e6:9.0f} | {bound:8.2f} | {bound / median:16.2f} |"
            f" {ratio:17s} |"
        )


if __name__ == "__main__":
    main()
