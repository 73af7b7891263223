"""Milliseconds a decode step: our loop, guided and not, `transformers` with a LogitsProcessor, vLLM, and the bound.

    python benchmarks/decode.py [--models small] [--batch 1,16] [--rounds 5] [--settings run,bare] [--without-torch]
    python benchmarks/decode.py --models 8b --batch 1,16,64          # on an accelerator, see h200.sh
    python benchmarks/decode.py --models 8b --quantize int8          # the same models with 8-bit weights; ours alone

Random weights, the same in all programs. `small`: float32, a Llama-shaped reference of 110M parameters (768 x 12) and a
guide of 23M (384 x 6), vocabulary 32,000. `8b`: the shapes of Llama 3.1 8B and Llama 3.2 1B in bfloat16. `tiny` takes
the same way in seconds. 20 candidates, eta 0.1. Two settings:

  run    as a run of the paper decodes: T 0.8, top-p 0.9, log-probabilities, KL and values recorded; prompts of 60 to
         660 tokens, room for 1,024 new ones, of which 168 are timed: rows hold 444 tokens on average, a quarter of the
         cache, as with the lengths of MATH (`8b`; others smaller)
  bare   T 1, nothing recorded, prompts and responses of 512 tokens

The guide is float32, as it is after a fit, and brought into the decoding form as a run does. With --quantize both
models are rounded there, and the bound counts their bytes. Steps are timed apart from prefill, for other programs as
the difference to a run of one new token. These get prompts of equal lengths, with as many tokens on average. All
programs are measured in turn in each round, so that their ratios hold when the machine's speed drifts; the median over
rounds is printed. The bound is that of the machine's own speed of reading and of multiplying matrices, both measured in
the same run, with what rows hold of their caches: see `bound`.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import decoding
from qsharp_jax.models import config, decoder, hf, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import Sampling
from qsharp_jax.system.errors import first_line

CANDIDATES, ETA = 20, 0.1
SLOTS = 4  # guide positions that a row has on average when candidates are packed
PROGRAMS = ("unguided", "guided", "packed")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How to decode, and lengths in tokens."""

    temperature: float
    top_p: float
    record: tuple[str, ...]
    prompts: tuple[int, int]  # the shortest and the longest prompt
    bucket: int  # shortest padded length of prompts
    room: int  # new tokens that the caches have room for
    steps: int  # new tokens that are timed

    def sampling(self, slots: int | None) -> Sampling:
        return Sampling(
            eta=ETA, temperature=self.temperature, top_p=self.top_p, top_k_candidates=CANDIDATES, candidate_slots=slots,
            max_new_tokens=self.room, prompt_bucket=self.bucket,
        )  # fmt: skip


_run = functools.partial(Setting, temperature=0.8, top_p=0.9, record=decoding.RECORDED)
_bare = functools.partial(Setting, temperature=1.0, top_p=1.0, record=())
SETTINGS = {
    "tiny": {
        "run": _run(prompts=(4, 40), bucket=16, room=64, steps=8),
        "bare": _bare(prompts=(32, 32), bucket=16, room=16, steps=16),
    },
    "small": {
        "run": _run(prompts=(15, 165), bucket=16, room=256, steps=40),
        "bare": _bare(prompts=(128, 128), bucket=16, room=256, steps=256),
    },
    "8b": {
        "run": _run(prompts=(60, 660), bucket=64, room=1024, steps=168),
        "bare": _bare(prompts=(512, 512), bucket=16, room=512, steps=512),
    },
}


def llama_shape(embed: int, layers: int, heads: int, vocab_size: int = 32_000) -> DecoderConfig:
    return config.make(
        "tiny", vocab_size=vocab_size, embed=embed, layers=layers, heads=heads, kv_heads=heads, head_dim=embed // heads,
        mlp=4 * embed * 2 // 3, max_positions=1024, tied=True,
    )  # fmt: skip


def shapes(name: str) -> tuple[DecoderConfig, DecoderConfig]:
    """Configs of the reference and of the guide's trunk."""
    if name == "tiny":
        return llama_shape(96, 2, 4, vocab_size=256), llama_shape(48, 2, 4, vocab_size=256)
    if name == "small":
        return llama_shape(768, 12, 12), llama_shape(384, 6, 6)
    return tuple(config.make(size, dtype="bfloat16") for size in ("llama3.1-8b", "llama3.2-1b"))


def models(name: str, quantize: str) -> tuple[LanguageModel, ValueModel]:
    """The reference, and the guide as fitted; `decoding.for_decoding` quantizes both."""

    def in_dtype(params, config: DecoderConfig):
        return jax.tree.map(lambda leaf: leaf.astype(config.compute_dtype), params)

    def make_guide(key: jax.Array, config: ValueConfig):
        params = value.init(key, config)
        params["head"]["kernel"] = jax.random.normal(key, params["head"]["kernel"].shape) * 0.05
        return params

    ref_config, trunk = (dataclasses.replace(config, quantize=quantize) for config in shapes(name))
    guide_config = ValueConfig(trunk)
    ref = jax.jit(lambda key: in_dtype(decoder.init(key, ref_config), ref_config))(jax.random.key(0))
    guide = jax.jit(lambda key: make_guide(key, guide_config))(jax.random.key(1))
    return LanguageModel(ref, ref_config), ValueModel(guide, guide_config)


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of every program: `batch` prompts."""

    setting: Setting
    batch: int
    vocabulary: int

    @property
    def lengths(self) -> np.ndarray:
        shortest, longest = self.setting.prompts
        even = np.linspace(shortest, longest, self.batch) if self.batch > 1 else np.asarray([(shortest + longest) / 2])
        return even.round().astype(int)

    @property
    def held(self) -> float:
        """Positions of its cache that a row reads in a step, on average over rows and steps."""
        return self.lengths.mean() + self.setting.steps / 2

    @property
    def buffer(self) -> int:
        """Positions of the caches."""
        return decoding.cache_size(int(self.lengths.max()), self.setting.room, self.setting.bucket)

    def prompts(self) -> list[list[int]]:
        rng = np.random.default_rng(0)
        return [rng.integers(self.vocabulary, size=length).tolist() for length in self.lengths]

    def even_prompts(self) -> np.ndarray:
        """Prompts of one length, [batch, T], with as many tokens in all."""
        shape = self.batch, round(self.lengths.mean())
        return np.random.default_rng(0).integers(self.vocabulary, size=shape).astype(np.int32)


def ours(
    ref: LanguageModel, guide: ValueModel | None, work: Work, steps: int, slots: int | None = None
) -> tuple[float, float]:
    """Milliseconds of the prefill, and of one decode step, the mean of the first `steps` of the work."""
    setting = work.setting
    began = time.perf_counter()
    run = decoding.Run(ref, guide, work.prompts(), setting.sampling(slots), rng=0, record=setting.record)
    jax.block_until_ready(run.state)
    filled = time.perf_counter()
    jax.block_until_ready(
        decoding.decode(run.ref, run.guide, run.state, run.controls, settings=run.settings, steps=jnp.int32(steps))
    )
    return (filled - began) * 1e3, (time.perf_counter() - filled) / steps * 1e3


def bound(
    ref: LanguageModel, guide: ValueModel | None, work: Work, positions: float, slots: int | None, machine: np.ndarray
) -> float:
    """Milliseconds that a step takes at least: for each model the larger of reading and of computing.

    Read are the weights, in the dtype of the computation or in 8 bits, and the caches, once each; of an embedding that
    is not the head only a few rows. Computed are the products with the weights for every token that goes through the
    model, and attention's two.

    Args:
      positions: of its cache that a row reads.
      machine: bytes read a second, and floating-point operations a second.
    """
    candidates = CANDIDATES if slots is None else slots
    decoders = [(ref.params, ref.config, work.batch)]
    if guide is not None:
        decoders.append((guide.params["trunk"], guide.config.trunk, work.batch * (1 + candidates)))
    total = 0.0
    for params, shape, tokens in decoders:
        unused = () if params is ref.params and shape.tied else ("embedding",)
        weights = sum(leaf.size for name in params if name not in unused for leaf in jax.tree.leaves(params[name]))
        cache = 2 * shape.layers * work.batch * shape.kv_heads * positions * shape.head_dim
        attention = 4 * shape.layers * tokens * shape.heads * positions * shape.head_dim
        bytes_each = 1 if shape.quantize == "int8" else shape.compute_dtype.itemsize
        reading = (weights + cache) * bytes_each / machine[0]
        total += max(reading, (2 * tokens * weights + attention) / machine[1])
    return total * 1e3


def seconds_of(call: Callable[[], jax.Array]) -> float:
    """Seconds of one call; of one that a GPU does in less time than the host launches it, the mean of many in a row."""

    def seconds(count: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready([call() for _ in range(count)])
        return (time.perf_counter() - began) / count

    seconds(1)
    once = seconds(1)
    return once if once > 0.01 else seconds(32)


def read_bandwidth() -> float:
    """Bytes read a second, by sums over 1 GiB on all cores."""
    step = jax.jit(lambda x: x.reshape(64, -1).sum(1))
    x = jnp.ones(2**28, jnp.float32)
    return x.nbytes / seconds_of(lambda: step(x))


def matmul_speed(dtype: jnp.dtype) -> float:
    """Floating-point operations a second of a product of two matrices of 4096 x 4096."""
    multiply = jax.jit(jnp.matmul)
    x = jax.random.normal(jax.random.key(0), (4096, 4096), dtype)  # of equal numbers GPUs are faster
    return 2 * 4096**3 / seconds_of(lambda: multiply(x, x))


class Compilations:
    """Seconds to compile, by program, since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **labels: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._seconds[labels["fun_name"]].append(seconds)

    def take(self) -> dict[str, list[float]]:
        taken, self._seconds = self._seconds, defaultdict(list)
        return taken


class Torch:
    """The same weights in `transformers`, through an export, in the dtypes of the computation."""

    def __init__(self, ref: LanguageModel, guide: ValueModel):
        import logits_processor
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

        device = "cuda" if torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory() as folder:
            hf.export_ref(ref, f"{folder}/ref")
            hf.export_guide(guide, f"{folder}/guide")
            self.ref = AutoModelForCausalLM.from_pretrained(f"{folder}/ref", dtype="auto").to(device).eval()
            dtype = getattr(torch, guide.config.trunk.dtype)
            classifier = AutoModelForTokenClassification.from_pretrained(f"{folder}/guide", dtype=dtype)
            self.guide = classifier.to(device).eval()
        self.generate = functools.partial(logits_processor.generate, candidates=CANDIDATES, eta=ETA)

    def milliseconds(self, guided: bool, work: Work, steps: int) -> tuple[float, float]:
        """Time of a run of one new token, and of each further step (mean of `steps` - 1)."""
        setting, prompts = work.setting, work.even_prompts()
        generate = functools.partial(
            self.generate, self.ref, self.guide if guided else None, prompts, temperature=setting.temperature,
            top_p=setting.top_p,
        )  # fmt: skip
        (_, first), (_, all_) = generate(1), generate(steps)
        return first * 1e3, (all_ - first) / (steps - 1) * 1e3


class Vllm:
    """The reference alone in vLLM, through an export."""

    def __init__(self, ref: LanguageModel):
        import vllm

        self.vllm = vllm
        with tempfile.TemporaryDirectory() as folder:
            hf.export_ref(ref, folder)
            # A third of the device's memory; JAX and PyTorch hold the rest.
            self.model = vllm.LLM(folder, skip_tokenizer_init=True, max_model_len=2048, gpu_memory_utilization=0.33)

    def milliseconds(self, work: Work, steps: int) -> tuple[float, float]:
        """The same two times as in `Torch`."""
        prompts = [{"prompt_token_ids": prompt} for prompt in work.even_prompts().tolist()]

        def seconds(new_tokens: int) -> float:
            sampling = self.vllm.SamplingParams(
                temperature=work.setting.temperature, top_p=work.setting.top_p, max_tokens=new_tokens, ignore_eos=True,
                detokenize=False,
            )  # fmt: skip
            began = time.perf_counter()
            self.model.generate(prompts, sampling, use_tqdm=False)
            return time.perf_counter() - began

        first, all_ = seconds(1), seconds(steps)
        return first * 1e3, (all_ - first) / (steps - 1) * 1e3


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def variants(options: argparse.Namespace, ref: LanguageModel, guide: ValueModel) -> dict:
    """The programs by name: (work, steps) -> milliseconds of prefill and of a step."""
    models = decoding.for_decoding(ref), decoding.for_decoding(guide)

    def program(name: str) -> Callable[[Work, int], tuple[float, float]]:
        def measured(work: Work, steps: int) -> tuple[float, float]:
            slots = SLOTS if name == "packed" else None
            return ours(models[0], None if name == "unguided" else models[1], work, steps, slots)

        return measured

    programs = {f"ours, {name}": program(name) for name in options.programs.split(",")}
    if options.without_torch or options.quantize != "none":
        return programs
    if not importlib.util.find_spec("torch"):
        print("transformers is not measured: there is no PyTorch")
        return programs
    if jax.default_backend() != "cpu" and not has_cuda():
        print("transformers is not measured: this PyTorch finds no GPU")
        return programs
    try:
        torch = Torch(ref, guide)
    except Exception as error:  # of the export's disk, the device's memory, or another version of transformers
        print(f"transformers is not measured: {first_line(error)}")
        return programs
    programs |= {
        "transformers, unguided": functools.partial(torch.milliseconds, False),
        "transformers, guided": functools.partial(torch.milliseconds, True),
    }
    if importlib.util.find_spec("vllm"):
        programs["vLLM, unguided"] = Vllm(ref).milliseconds
    return programs


HEADS = (
    "setting", "batch", "program               ", "prefill ms", "ms a step", "bound ms", "bound / measured",
    "bound of whole buffers ms", "this / ours",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=SETTINGS, default="small")
    parser.add_argument("--settings", default="run,bare")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="ours, among " + ", ".join(PROGRAMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--steps", type=int, help="new tokens that are timed, at most the setting's room")
    parser.add_argument("--quantize", choices=("none", "int8"), default="none", help="weights; ours alone")
    parser.add_argument("--without-torch", action="store_true")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}")
    ref, guide = models(options.models, options.quantize)
    programs = variants(options, ref, guide)
    works = {}
    for name in options.settings.split(","):
        setting = SETTINGS[options.models][name]
        setting = dataclasses.replace(setting, steps=options.steps or setting.steps)
        for batch in map(int, options.batch.split(",")):
            works[name, batch] = Work(setting, batch, ref.config.vocab_size)
    times = {(*key, program): [] for key in works for program in programs}
    machine, compilations, compiled = [], Compilations(), {}
    for round_ in range(options.rounds + 1):
        for setting, batch, program in times:
            work = works[setting, batch]
            steps = work.setting.steps if round_ else decoding.BLOCK  # the first round compiles
            prefill, step = programs[program](work, steps)
            times[setting, batch, program].append((prefill, step))
            what = f"round {round_}: {setting}, batch {batch}, {program}"  # what is left of a run that is cut off
            print(f"{what}: prefill {prefill:.1f} ms, {step:.2f} ms a step", file=sys.stderr, flush=True)
            if not round_:
                compiled[setting, batch, program] = compilations.take()
        machine.append((read_bandwidth(), matmul_speed(ref.config.compute_dtype)))
    machine = np.max(machine, axis=0)
    print(f"reading 1 GiB: {machine[0] / 1e9:.1f} GB/s; a product of matrices: {machine[1] / 1e9:.0f} GFLOP/s\n")
    print(f"| {' | '.join(HEADS)} |\n| {' | '.join('-' * len(head) for head in HEADS)} |")
    for (setting, batch, program), (_, *measured) in times.items():
        prefill, step = np.median(measured, axis=0)
        guided = not program.endswith("unguided")
        of_work = functools.partial(bound, ref, guide if guided else None, work := works[setting, batch])
        slots = SLOTS if "packed" in program else None
        least, whole = (of_work(positions, slots, machine) for positions in (work.held, work.buffer))
        mine = times.get((setting, batch, "ours, guided" if guided else "ours, unguided"))
        ratio = f"{np.median(np.asarray(measured)[:, 1] / np.asarray(mine)[1:, 1]):.2f}x" if mine else ""
        print(
            f"| {setting:7s} | {batch:5d} | {program:22s} | {prefill:10.1f} | {step:9.2f} | {least:8.2f} |"
            f" {least / step:16.2f} | {whole:25.2f} | {ratio:>11s} |"
        )
    print("\nSeconds to compile each program, the first of those that a row shares with earlier ones:\n")
    for (setting, batch, program), seconds in compiled.items():
        parts = [
            f"{name} {' + '.join(f'{s:.1f}' for s in seconds[f'jit({name})'])}"
            for name in ("prefill", "decode")
            if seconds.get(f"jit({name})")
        ]
        if parts:
            print(f"- {setting}, batch {batch}, {program}: {'; '.join(parts)}")


if __name__ == "__main__":
    main()
