"""Milliseconds a decode step: our loop, guided and not, `transformers` with a LogitsProcessor, and the bound.

    python benchmarks/decode.py [--models small] [--batch 1,16] [--rounds 5] [--new-tokens 256] [--without-torch]
    python benchmarks/decode.py --models 8b --batch 1,16,64 --new-tokens 512          # on an accelerator

Random weights, the same in both programs. `small`: float32, a Llama-shaped reference of 110M parameters (768 x 12) and
a guide of 23M (384 x 6), vocabulary 32,000, prompts of 128 tokens. `8b`: bfloat16, the shapes of Llama 3.1 8B and Llama
3.2 1B, prompts of 512. 20 candidates, sampling at temperature 1. Steps are timed apart from prefill, for `transformers`
as the difference to a run of one new token. All variants are measured in turn in each round, so that their ratios hold
when the machine's speed drifts; the median over rounds is printed. The bound is that of the machine's own speed of
reading and of multiplying matrices, both measured in the same run: see `bound`.
"""

import argparse
import dataclasses
import functools
import os
import platform
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import decoding
from qsharp_jax.models import config, decoder, hf, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import Sampling

CANDIDATES, ETA = 20, 0.1
SLOTS = 4  # guide positions that a row has on average when candidates are packed
PROMPT = {"small": 128, "8b": 512}


def llama_shape(embed: int, layers: int, heads: int) -> DecoderConfig:
    return config.make(
        "tiny", vocab_size=32_000, embed=embed, layers=layers, heads=heads, kv_heads=heads, head_dim=embed // heads,
        mlp=4 * embed * 2 // 3, max_positions=1024, tied=True,
    )  # fmt: skip


def shapes(name: str) -> tuple[DecoderConfig, DecoderConfig]:
    """Configs of the reference and of the guide's trunk."""
    if name == "small":
        return llama_shape(768, 12, 12), llama_shape(384, 6, 6)
    return tuple(config.make(size, dtype="bfloat16") for size in ("llama3.1-8b", "llama3.2-1b"))


def models(name: str) -> tuple[LanguageModel, ValueModel]:
    def in_dtype(params, config: DecoderConfig):
        return jax.tree.map(lambda leaf: leaf.astype(config.compute_dtype), params)

    def make_guide(key: jax.Array, config: ValueConfig):
        params = value.init(key, config)
        params["head"]["kernel"] = jax.random.normal(key, params["head"]["kernel"].shape) * 0.05
        return in_dtype(params, config.trunk)

    ref_config, trunk = shapes(name)
    guide_config = ValueConfig(trunk)
    ref = jax.jit(lambda key: in_dtype(decoder.init(key, ref_config), ref_config))(jax.random.key(0))
    guide = jax.jit(lambda key: make_guide(key, guide_config))(jax.random.key(1))
    return LanguageModel(ref, ref_config), ValueModel(guide, guide_config)


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of every program: `batch` prompts of `prompt` tokens, `steps` new ones for each."""

    batch: int
    prompt: int
    steps: int
    vocabulary: int

    def prompts(self) -> np.ndarray:
        return np.random.default_rng(0).integers(self.vocabulary, size=(self.batch, self.prompt)).astype(np.int32)


def ours(
    ref: LanguageModel, guide: ValueModel | None, work: Work, steps: int, slots: int | None = None
) -> tuple[float, float]:
    """Milliseconds of the prefill, and of one decode step, the mean of the first `steps` of the work."""
    began = time.perf_counter()
    run = decoding.Run(
        ref, guide, work.prompts().tolist(),
        Sampling(eta=ETA, top_k_candidates=CANDIDATES, candidate_slots=slots, max_new_tokens=work.steps),
        rng=0, record=(),
    )  # fmt: skip
    jax.block_until_ready(run.state)
    filled = time.perf_counter()
    jax.block_until_ready(
        decoding.decode(run.ref, run.guide, run.state, run.controls, settings=run.settings, steps=jnp.int32(steps))
    )
    return (filled - began) * 1e3, (time.perf_counter() - filled) / steps * 1e3


def bound(
    ref: LanguageModel, guide: ValueModel | None, work: Work, slots: int | None, machine: tuple[float, float]
) -> float:
    """Milliseconds that a step takes at least: for each model the larger of reading and of computing.

    Read are the weights and the whole cache buffers, once each; of an embedding that is not the head only a few rows.
    Computed are the products with the weights for every token that goes through the model, and attention's two.

    Args:
      machine: bytes read a second, and floating-point operations a second.
    """
    candidates = CANDIDATES if slots is None else slots
    decoders = [(ref.params, ref.config, work.batch)]
    if guide is not None:
        decoders.append((guide.params["trunk"], guide.config.trunk, work.batch * (1 + candidates)))
    total = 0.0
    for params, shape, tokens in decoders:
        unused = () if params is ref.params else ("embedding",)
        weights = sum(leaf.size for name in params if name not in unused for leaf in jax.tree.leaves(params[name]))
        positions = work.prompt - 1 + work.steps
        cache = 2 * shape.layers * work.batch * shape.kv_heads * positions * shape.head_dim
        attention = 4 * shape.layers * tokens * shape.heads * positions * shape.head_dim
        reading = (weights + cache) * shape.compute_dtype.itemsize / machine[0]
        total += max(reading, (2 * tokens * weights + attention) / machine[1])
    return total * 1e3


def read_bandwidth() -> float:
    """Bytes read a second, by sums over 1 GiB on all cores."""
    step = jax.jit(lambda x: x.reshape(64, -1).sum(1))
    x = jnp.ones(2**28, jnp.float32)
    jax.block_until_ready(step(x))
    began = time.perf_counter()
    jax.block_until_ready(step(x))
    return x.nbytes / (time.perf_counter() - began)


def matmul_speed(dtype: jnp.dtype) -> float:
    """Floating-point operations a second of a product of two matrices of 4096 x 4096."""
    multiply = jax.jit(jnp.matmul)
    x = jnp.ones((4096, 4096), dtype)
    jax.block_until_ready(multiply(x, x))
    began = time.perf_counter()
    jax.block_until_ready(multiply(x, x))
    return 2 * 4096**3 / (time.perf_counter() - began)


class Torch:
    """The same weights in `transformers`, through an export."""

    def __init__(self, ref: LanguageModel, guide: ValueModel):
        import logits_processor
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

        device = "cuda" if torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory() as folder:
            hf.export_ref(ref, f"{folder}/ref")
            hf.export_guide(guide, f"{folder}/guide")
            self.ref = AutoModelForCausalLM.from_pretrained(f"{folder}/ref", dtype="auto").to(device).eval()
            self.guide = (
                AutoModelForTokenClassification.from_pretrained(f"{folder}/guide", dtype="auto").to(device).eval()
            )
        self.generate = functools.partial(logits_processor.generate, candidates=CANDIDATES, eta=ETA)

    def milliseconds(self, guided: bool, work: Work, steps: int) -> tuple[float, float]:
        """Time of a run of one new token, and of each further step (mean of `steps` - 1)."""
        guide = self.guide if guided else None
        _, first = self.generate(self.ref, guide, work.prompts(), 1)
        _, all_ = self.generate(self.ref, guide, work.prompts(), steps)
        return first * 1e3, (all_ - first) / (steps - 1) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=PROMPT, default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--without-torch", action="store_true")
    options = parser.parse_args()
    stacked = models(options.models)
    ref, guide = map(decoding.for_decoding, stacked)
    works = {
        int(batch): Work(int(batch), PROMPT[options.models], options.new_tokens, ref.config.vocab_size)
        for batch in options.batch.split(",")
    }
    print(f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}")
    variants = {
        "ours, unguided": lambda work, steps: ours(ref, None, work, steps),
        "ours, guided": lambda work, steps: ours(ref, guide, work, steps),
        "ours, packed": lambda work, steps: ours(ref, guide, work, steps, SLOTS),
    }
    if not options.without_torch:
        torch = Torch(*stacked)
        variants |= {
            "transformers, unguided": lambda work, steps: torch.milliseconds(False, work, steps),
            "transformers, guided": lambda work, steps: torch.milliseconds(True, work, steps),
        }
    times = {(batch, name): [] for batch in works for name in variants}
    machine = []
    for round_ in range(options.rounds + 1):
        for batch, name in times:
            steps = works[batch].steps if round_ else decoding.BLOCK  # the first round compiles
            times[batch, name].append(variants[name](works[batch], steps))
        machine.append((read_bandwidth(), matmul_speed(ref.config.compute_dtype)))
    machine = np.max(machine, axis=0)
    print(f"reading 1 GiB: {machine[0] / 1e9:.1f} GB/s; a product of matrices: {machine[1] / 1e9:.0f} GFLOP/s\n")
    heads = ("batch", f"{'program':22s}", "prefill ms", "ms a step", "bound ms", "bound / measured", "this / ours")
    heads += ("compiled in s",)
    print(f"| {' | '.join(heads)} |\n| {' | '.join('-' * len(head) for head in heads)} |")
    for (batch, name), (first, *measured) in times.items():
        prefill, step = np.median(measured, axis=0)
        guided = not name.endswith("unguided")
        least = bound(ref, guide if guided else None, works[batch], SLOTS if "packed" in name else None, machine)
        mine = np.asarray(times[batch, "ours, guided" if guided else "ours, unguided"])[1:, 1]
        ratio = np.median(np.asarray(measured)[:, 1] / mine)
        compiling = first[0] - prefill + decoding.BLOCK * (first[1] - step)
        compiled = f"{compiling / 1e3:.1f}" if name.startswith("ours") else ""
        print(
            f"| {batch:5d} | {name:22s} | {prefill:10.1f} | {step:9.2f} | {least:8.2f} | {least / step:16.2f} |"
            f" {ratio:10.2f}x | {compiled:>13s} |"
        )


if __name__ == "__main__":
    main()
