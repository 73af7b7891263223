"""Milliseconds a decode step: our loop, guided and not, `transformers` with a LogitsProcessor, and the bytes' bound.

    python benchmarks/decode.py [--rounds 5] [--batch 1,16] [--new-tokens 256] [--without-torch]

Random weights, float32, the same in both programs: a Llama-shaped reference of 110M parameters (768 x 12) and a guide
of 23M (384 x 6), vocabulary 32,000, 20 candidates, prompts of 128 tokens, sampling at temperature 1. Steps are timed
apart from prefill, for `transformers` as the difference to a run of one new token. All variants are measured in turn in
each round, so that their ratios hold when the machine's speed drifts; the median over rounds is printed.
"""

import argparse
import functools
import os
import platform
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import generate
from qsharp_jax.models import config, decoder, hf, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel

VOCABULARY, PROMPT, CANDIDATES, ETA = 32_000, 128, 20, 0.1
SLOTS = 4  # guide positions that a row has on average when candidates are packed


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


def prompts(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(VOCABULARY, size=(batch, PROMPT)).astype(np.int32)


def ours(
    ref: LanguageModel, guide: ValueModel | None, batch: int, steps: int, slots: int = 0
) -> tuple[np.ndarray, float, float]:
    """Tokens, milliseconds of the prefill, and of one decode step."""
    tokens, start = prompts(batch), np.zeros(batch, np.int32)
    size = -(-(PROMPT - 1 + steps) // 8) * 8
    fill = functools.partial(generate.prefill, tokens=tokens[:, :-1], start=start, size=size)
    controls = generate.Controls(
        eta=jnp.full(batch, ETA), temperature=jnp.ones(batch), top_p=jnp.ones(batch),
        top_k=jnp.zeros(batch, jnp.int32), threshold=jnp.full(batch, 1e-3), budget=jnp.full(batch, steps),
        seed=jnp.arange(batch, dtype=jnp.uint32),
    )  # fmt: skip
    settings = generate.Settings(
        stop_ids=(), vocab_size=VOCABULARY, candidates=CANDIDATES, slots=slots * batch, record=()
    )
    began = time.perf_counter()
    caches = [fill(ref.params, ref.config)]
    caches.append(None if guide is None else fill(guide.params["trunk"], guide.config.trunk))
    jax.block_until_ready(caches)
    filled = time.perf_counter()
    state = jax.block_until_ready(generate.first_state(*caches, tokens, start, steps, settings))
    ready = time.perf_counter()
    state = jax.block_until_ready(generate.decode(ref, guide, state, controls, settings=settings))
    done = time.perf_counter()
    return np.asarray(state.record.token), (filled - began) * 1e3, (done - ready) / steps * 1e3


def step_bytes(ref: LanguageModel, guide: ValueModel | None, batch: int, steps: int) -> int:
    """Weights and whole cache buffers once each; of an embedding table that is not the head only a few rows."""
    total = 0
    decoders = [(ref.params, ref.config)] + ([] if guide is None else [(guide.params["trunk"], guide.config.trunk)])
    for params, shape in decoders:
        is_head = params is ref.params
        weights = {name: leaf for name, leaf in params.items() if name != "embedding" or is_head}
        total += sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
        cache = 2 * shape.layers * batch * shape.kv_heads * (PROMPT - 1 + steps) * shape.head_dim
        total += cache * shape.compute_dtype.itemsize
    return total


def read_bandwidth() -> float:
    """Bytes read a second, by sums over 1 GiB on all cores."""
    step = jax.jit(lambda x: x.reshape(64, -1).sum(1))
    x = jnp.ones(2**28, jnp.float32)
    jax.block_until_ready(step(x))
    began = time.perf_counter()
    jax.block_until_ready(step(x))
    return x.nbytes / (time.perf_counter() - began)


class Torch:
    """The same weights in `transformers`, through an export."""

    def __init__(self, ref: LanguageModel, guide: ValueModel):
        import logits_processor
        from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

        with tempfile.TemporaryDirectory() as folder:
            hf.export_ref(ref, f"{folder}/ref")
            hf.export_guide(guide, f"{folder}/guide")
            self.ref = AutoModelForCausalLM.from_pretrained(f"{folder}/ref").eval()
            self.guide = AutoModelForTokenClassification.from_pretrained(f"{folder}/guide").eval()
        self.generate = functools.partial(logits_processor.generate, candidates=CANDIDATES, eta=ETA)

    def milliseconds(self, guided: bool, batch: int, steps: int) -> tuple[float, float]:
        """Of a run of one new token, and of one step more."""
        guide = self.guide if guided else None
        _, first = self.generate(self.ref, guide, prompts(batch), 1)
        _, all_ = self.generate(self.ref, guide, prompts(batch), steps)
        return first * 1e3, (all_ - first) / (steps - 1) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--without-torch", action="store_true")
    options = parser.parse_args()
    steps, batches = options.new_tokens, [int(batch) for batch in options.batch.split(",")]
    ref, guide = models()
    print(
        f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, float32"
    )
    variants = {
        "ours, unguided": lambda batch: ours(ref, None, batch, steps)[1:],
        "ours, guided": lambda batch: ours(ref, guide, batch, steps)[1:],
        "ours, packed": lambda batch: ours(ref, guide, batch, steps, SLOTS)[1:],
    }
    if not options.without_torch:
        torch = Torch(ref, guide)
        variants |= {
            "transformers, unguided": lambda batch: torch.milliseconds(False, batch, steps),
            "transformers, guided": lambda batch: torch.milliseconds(True, batch, steps),
        }
    times = {(batch, name): [] for batch in batches for name in variants}
    bandwidths = []
    for number in range(options.rounds + 1):
        for batch, name in times:
            measured = variants[name](batch)
            if number:  # the first round compiles
                times[batch, name].append(measured)
        bandwidths.append(read_bandwidth())
    bandwidth = float(np.max(bandwidths))
    print(f"reading 1 GiB: {bandwidth / 1e9:.1f} GB/s\n")
    print("| batch | program                | prefill ms | ms a step | MB a step | bound / measured | ours / this |")
    print("| ----- | ---------------------- | ---------- | --------- | --------- | ---------------- | ----------- |")
    for (batch, name), measured in times.items():
        prefill, step = np.median(measured, axis=0)
        guided = not name.endswith("unguided")
        bytes_ = step_bytes(ref, guide if guided else None, batch, steps)
        mine = np.asarray(times[batch, "ours, guided" if guided else "ours, unguided"])[:, 1]
        ratio = np.median(np.asarray(measured)[:, 1] / mine)
        print(
            f"| {batch:5d} | {name:22s} | {prefill:10.1f} | {step:9.2f} | {bytes_ / 1e6:9.0f} |"
            f" {bytes_ / bandwidth * 1e3 / step:16.2f} | {ratio:10.2f}x |"
        )


if __name__ == "__main__":
    main()
