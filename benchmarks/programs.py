"""Compile the programs of decoding that a row of the paper's tables runs on an H200, on a machine that has none.

    python benchmarks/programs.py [--layers N [M]] [--models REF GUIDE]        # install what benchmarks/gpu.py names

Prints the seconds that XLA takes for each, by default of Llama 3.1 8B and a 1B guide: 64 rows, 16 prompts at
once, prompts of up to 768 and responses of up to 1,024 tokens, bfloat16. `tests/run/test_paper_configs.py` counts the
programs of a small run.
"""

import argparse
import time
from typing import Any

from gpu import VOCABULARY, abstract_models, placed  # first: it chooses the platform
from tpu import controls, state

# isort: split
import jax
import jax.numpy as jnp

from qsharp_jax import decoding, rollouts
from qsharp_jax.decoding import engine
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.models.value import ValueModel

ROWS, PROMPT, NEW = 64, 768, 1024
POSITIONS = 1856  # of a row, as `ContinuousBatch` has them


def prefill(params: Params, config: DecoderConfig) -> Any:
    tokens, start = (jax.ShapeDtypeStruct((engine.PROMPTS, *size), jnp.int32) for size in ((PROMPT - 1,), ()))
    params, tokens, start = placed((params, tokens, start))
    chunk = engine.tokens_at_once(engine.PROMPTS)
    return decoding.prefill.lower(params, config, tokens, start, size=PROMPT - 1, chunk=chunk)


def decode(ref: LanguageModel, guide: ValueModel, *, guided: bool, top_k: bool = False) -> Any:
    member = guide if guided else None
    settings = decoding.Settings(
        stop_ids=(128_001, 128_009), vocab_size=VOCABULARY, candidates=20, truncate=True, top_k=top_k,
        record=rollouts.recorded(member),
    )  # fmt: skip
    carry = state(ref, guide, settings, ROWS, POSITIONS, NEW)
    ring = carry.guide_cache.replace(ring=True) if guided else None
    carry = carry.replace(ref_cache=carry.ref_cache.replace(ring=True), guide_cache=ring)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = placed((ref, member, carry, controls(ROWS)))
    return decoding.decode.lower(*arguments, settings=settings, block=engine.BLOCK, enough=number, steps=number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", help="of the reference and of the guide; by default all")
    parser.add_argument("--models", nargs=2, default=["llama3.1-8b", "llama3.2-1b"], metavar="SIZE")
    options = parser.parse_args()
    ref, guide = abstract_models(options.models, options.layers, "none")
    programs = {
        "prefill, reference": lambda: prefill(ref.params, ref.config),
        "prefill, guide": lambda: prefill(guide.params["trunk"], guide.config.trunk),
        "decode, reference: round 1, pi_ref": lambda: decode(ref, guide, guided=False),
        "decode, reference cut to top-k": lambda: decode(ref, guide, guided=False, top_k=True),
        "decode, guided: round 2, evaluation": lambda: decode(ref, guide, guided=True),
    }
    print("| program | s to trace | s to compile | GiB of temporaries |\n|" + " --- |" * 4)
    for name, lowered in programs.items():
        began = time.monotonic()
        program = lowered()
        traced = time.monotonic()
        memory = program.compile().memory_analysis()
        seconds = f"{traced - began:.0f} | {time.monotonic() - traced:.0f}"
        print(f"| {name} | {seconds} | {memory.temp_size_in_bytes / 2**30:.2f} |", flush=True)


if __name__ == "__main__":
    main()
