"""Seconds of a training step of the guide: ours, that of `transformers` in PyTorch, and the bare matrix products.

    python benchmarks/train.py [--rounds 5] [--profile]                # on a CPU: 24M parameters, float32
    python benchmarks/train.py --length 128 --attention xla --beside blocks --without-torch
    python benchmarks/train.py --model 1b                              # on an accelerator: Llama 3.2 1B, bfloat16

Random weights and tokens; binary cross-entropy at every token, AdamW, the global norm clipped. `24m`: a Llama-shaped
guide (512 x 8, 8 heads, 4 kv heads), 8 rows of 512 tokens, against `LlamaForTokenClassification` in turn in each round,
so that the ratio holds when the machine's speed drifts; both use all cores. `1b`: 8 rows of 2,048 tokens with four
segments each, float32 weights and moments, bfloat16 products; its share of the device's peak (MFU) and its memory are
printed. `tiny` takes the same way in seconds.
"""

import argparse
import collections
import dataclasses
import functools
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import train
from qsharp_jax.data.batches import Batch
from qsharp_jax.models import config, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.value import ValueConfig

LEARNING_RATE, B1, B2, WEIGHT_DECAY, CLIP = 1e-4, 0.9, 0.98, 0.01, 1.0


@dataclasses.dataclass(frozen=True)
class Work:
    """The model, the data and the settings of a training."""

    trunk: DecoderConfig
    rows: int
    length: int
    segments: int
    attend_by: str
    remat: str

    def batch(self) -> Batch:
        rng, shape = np.random.default_rng(0), (self.rows, self.length)
        each = np.arange(self.length, dtype=np.int32) * self.segments // self.length
        starts = np.searchsorted(each, each)
        return Batch(
            tokens=rng.integers(self.trunk.vocab_size, size=shape).astype(np.int32),
            segments=np.broadcast_to(each + 1, shape),
            positions=np.broadcast_to(np.arange(self.length, dtype=np.int32) - np.int32(starts), shape),
            response_mask=np.ones(shape, bool),
            label_mask=np.ones(shape, bool),
            reward_to_go=rng.integers(2, size=(self.rows, 1)).repeat(self.length, 1).astype(np.float32),
        )

    def products(self) -> list[tuple[int, int, int]]:
        """Shapes (m, k, n) of the products with a layer's weights, forward alone."""
        t, tokens = self.trunk, self.rows * self.length
        wide, narrow = t.heads * t.head_dim, t.kv_heads * t.head_dim
        pairs = [(t.embed, wide), (t.embed, narrow), (t.embed, narrow), (wide, t.embed)]
        return [(tokens, *pair) for pair in [*pairs, (t.embed, t.mlp), (t.embed, t.mlp), (t.mlp, t.embed)]]

    def flops(self) -> tuple[int, int]:
        """FLOPs of a step: the products with weights, and attention's (each token with half of its segment)."""
        t = self.trunk
        weights = 3 * 2 * t.layers * sum(m * k * n for m, k, n in self.products())
        pairs = self.rows * self.length * self.length // self.segments // 2
        return weights, 3 * 4 * t.layers * t.heads * t.head_dim * pairs


def works(name: str, attend_by: str | None, remat: str | None) -> Work:
    if name == "1b":
        trunk = config.make("llama3.2-1b", dtype="bfloat16")
        return Work(trunk, 8, 2048, 4, attend_by or "xla", remat or "dots")
    small = dict(kv_heads=4, head_dim=64, tied=True)
    if name == "24m":
        trunk = config.make("tiny", vocab_size=2048, embed=512, layers=8, heads=8, mlp=1376, max_positions=512, **small)
        return Work(trunk, 8, 512, 1, attend_by or "blocks", remat or "none")
    trunk = config.make("tiny", vocab_size=256, embed=128, layers=2, heads=8, mlp=256, dtype="bfloat16", **small)
    return Work(trunk, 2, 256, 4, attend_by or "xla", remat or "dots")


class Ours:
    def __init__(self, work: Work):
        guide = ValueConfig(work.trunk)
        settings = config_of_optimizer()
        optimizer = train.make_optimizer(settings)
        loss_fn = functools.partial(
            train.value_loss, config=guide, remat=work.remat, attend_by=work.attend_by, packed=work.segments > 1
        )
        step = functools.partial(train.train_step, loss_fn=loss_fn, optimizer=optimizer)
        params = jax.jit(functools.partial(value.init, config=guide))(jax.random.key(0))
        self.state = train.init_state(params, optimizer)
        self.batch = jax.device_put(work.batch())
        began = time.perf_counter()
        self.step = jax.jit(step, donate_argnums=0).lower(self.state, self.batch, jnp.float32(1)).compile()
        self.compile_seconds = time.perf_counter() - began

    def __call__(self) -> float:
        began = time.perf_counter()
        self.state, metrics = self.step(self.state, self.batch, jnp.float32(1))
        jax.block_until_ready((self.state, metrics))
        self.loss = float(metrics["loss"])
        return time.perf_counter() - began


def config_of_optimizer() -> argparse.Namespace:
    return argparse.Namespace(
        name="adamw", learning_rate=LEARNING_RATE, b2=B2, weight_decay=WEIGHT_DECAY, clip=CLIP
    )  # fmt: skip


class Torch:
    """The same step in PyTorch, with the attention, the AdamW and the threads that it chooses by itself."""

    def __init__(self, work: Work):
        import torch
        import transformers

        t = work.trunk
        shape = transformers.LlamaConfig(
            vocab_size=t.vocab_size, hidden_size=t.embed, intermediate_size=t.mlp, num_hidden_layers=t.layers,
            num_attention_heads=t.heads, num_key_value_heads=t.kv_heads, head_dim=t.head_dim, num_labels=1,
            max_position_embeddings=t.max_positions, use_cache=False, classifier_dropout=0.0,
        )  # fmt: skip
        self.torch, self.model = torch, transformers.LlamaForTokenClassification(shape).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(B1, B2), weight_decay=WEIGHT_DECAY
        )
        batch = work.batch()
        self.tokens, self.rewards = torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.reward_to_go)

    def __call__(self) -> float:
        began = time.perf_counter()
        logits = self.model(self.tokens).logits[..., 0]
        loss = self.torch.nn.functional.binary_cross_entropy_with_logits(logits, self.rewards)
        self.optimizer.zero_grad()
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.loss = float(loss.detach())
        return time.perf_counter() - began


class Products:
    """The products with all layers' weights, forward and for both gradients, and nothing else."""

    def __init__(self, work: Work):
        self.layers = work.trunk.layers

        @jax.jit
        def multiply(x: jax.Array, w: jax.Array, y: jax.Array) -> tuple:
            return x @ w, y @ w.T, x.T @ y

        self.multiply = multiply
        self.arguments = [
            tuple(jnp.ones(shape, work.trunk.compute_dtype) for shape in ((m, k), (k, n), (m, n)))
            for m, k, n in work.products()
        ]

    def __call__(self) -> float:
        began = time.perf_counter()
        for _ in range(self.layers):
            for arguments in self.arguments:
                last = self.multiply(*arguments)
        jax.block_until_ready(last)
        return time.perf_counter() - began


PARTS = {  # of the profile, by the names in an operation's source
    "attention": r"bgr|BTNH|BNTS|dot_product|splash|_where|Block/(exp|div|reduce_max|reduce_sum|sub)",
    "products with weights": r"(query|key|value|output|up|gate|down)/",
    "norms": r"norm/",
    "feed-forward's silu": r"silu|Block/mul",
    "rotation": r"Block/concatenate|Block/sub|Block/add|Block/split",
    "optimizer and clipping": r"train_step\)/(?!jvp|transpose)",
}


def profile(ours: Ours) -> None:
    """Split a step's time by the program's operations; on a CPU, sums over its threads."""
    sources = dict(re.findall(r'%?([\w.-]+) = .*op_name="([^"]*)"', ours.step.as_text()))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            ours()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    times: collections.Counter[str] = collections.Counter()
    for event in (event for plane in planes for line in plane.lines for event in line.events):
        if (source := sources.get(event.name)) is not None or re.match(r"[\w-]*fusion", event.name):
            part = next((part for part, words in PARTS.items() if re.search(words, source or "")), "other")
            times[part] += event.duration_ns / 1e6
    total = sum(times.values())
    print("\n" + "\n".join(f"{part:24s} {ms:8.1f} ms {ms / total:6.1%}" for part, ms in times.most_common()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("24m", "1b", "tiny"), default="24m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention", choices=("xla", "blocks", "cudnn", "splash"))
    parser.add_argument("--beside", choices=("xla", "blocks", "cudnn", "splash"), help="another attention, in turn")
    parser.add_argument("--length", type=int, help="of a row, with as many tokens in a batch")
    parser.add_argument("--remat", choices=("none", "dots", "full"))
    parser.add_argument("--peak", type=float, default=989e12, help="of the device, in FLOP/s; by default an H200's")
    parser.add_argument("--profile", action="store_true", help="say where our step's time goes")
    parser.add_argument("--without-torch", action="store_true")
    options = parser.parse_args()
    work = works(options.model, options.attention, options.remat)
    if options.length:
        rows = work.rows * work.length // options.length
        work = dataclasses.replace(work, rows=rows, length=options.length)
    ours = Ours(work)
    ours()
    stats = jax.local_devices()[0].memory_stats()  # of this program, before others take memory
    programs: dict[str, Callable[[], float]] = {"ours": ours}
    if options.beside:
        programs[options.beside] = Ours(dataclasses.replace(work, attend_by=options.beside))
    if options.model == "24m":
        programs["products"] = Products(work)
        if not options.without_torch:
            programs["PyTorch"] = Torch(work)
    size = sum(leaf.size for leaf in jax.tree.leaves(ours.state.params))
    memory = ours.step.memory_analysis()
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}; {size / 1e6:.1f}M parameters"
    )
    print(
        f"compiled in {ours.compile_seconds:.0f} s: {memory.argument_size_in_bytes / 2**30:.2f} GiB of arguments,"
        f" {memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries"
    )
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(options.rounds + 1):
        for name, run in programs.items():
            seconds = run()
            if number:  # the first warms up
                times[name].append(seconds)
            print(f"{name} {seconds:.3f}", end=", " if name != list(programs)[-1] else "\n", flush=True)
    flops = work.flops()
    for name, seconds in times.items():
        ratios = np.asarray(seconds) / times["ours"]
        loss = f", loss {run.loss:.4f}" if hasattr(run := programs[name], "loss") else ""
        print(
            f"{name:9s} {np.median(seconds):8.3f} s a step ({min(seconds):.3f} .. {max(seconds):.3f}), over ours"
            f" {np.median(ratios):.2f} ({ratios.min():.2f} .. {ratios.max():.2f}){loss}"
        )
    step = np.median(times["ours"])
    print(
        f"{work.rows * work.length / step:.0f} tokens/s; products with weights {flops[0] / 1e9:.0f} GFLOP, attention"
        f" {flops[1] / 1e9:.0f}; {sum(flops) / step / 1e12:.3f} TFLOP/s, MFU {sum(flops) / step / options.peak:.2%}"
    )
    if stats:
        print(f"peak memory {stats['peak_bytes_in_use'] / 2**30:.2f} GiB")
    if options.profile:
        profile(ours)


if __name__ == "__main__":
    main()
