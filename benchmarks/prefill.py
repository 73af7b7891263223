"""Compile prefill for a slice of TPUs or an H200 on a machine that has none: its memory by the length of the prompts.

    pip install ".[tpu]"        # for an H200 what benchmarks/gpu.py names
    python benchmarks/prefill.py [--case ROWSxTOKENS ...] [--topology v5e:2x4 | h200] [--tensor 8] [--layers N]

Compiles `decoding.prefill` with abstract weights (none are ever made), in chunks and for the whole prompt at once, and
prints a markdown table: bytes a chip of the arguments (weights and prompts), of the result (the cache), and of what the
program needs beside them. bfloat16, 1,024 positions for new tokens.
"""

import argparse
import os
import re
import time
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # before JAX is loaded: there is no TPU to be found

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from qsharp_jax import decoding  # noqa: E402
from qsharp_jax.models import attention, config, decoder, gpu_form, meshes, sharding  # noqa: E402
from qsharp_jax.models.decoder import LanguageModel  # noqa: E402

CASES = ("16x511", "16x1023", "16x2047", "16x4095", "16x8191", "1x131071")
TARGET = Path(__file__).with_name("h200.txtpb")
NEW = 1024  # positions of the cache beside the prompt's


def compile_prefill(
    rows: int, tokens: int, *, model: str, topology: str, tensor: int, layers: int | None, chunk: int
) -> dict[str, Any]:
    """Bytes a chip of arguments, cache and temporaries, and seconds to compile; or the compiler's words of refusal."""
    shape = config.make(model, dtype="bfloat16", **({} if layers is None else dict(layers=layers)))
    on_gpu = topology == "h200"
    target = dict(topology="1x1x1", target_config=TARGET.read_text()) if on_gpu else {}
    platform = "cuda" if on_gpu else "tpu"
    devices = topologies.get_topology_desc(platform=platform, topology_name=topology, **target).devices[:tensor]
    mesh = meshes.make_mesh({"data": 1, "tensor": tensor}, sharding.DECODE, devices)

    def for_decoding(params: Any) -> Any:
        return gpu_form.fuse(decoder.unstack(params), shape) if on_gpu else decoder.unstack(params)

    ref = LanguageModel(jax.eval_shape(for_decoding, decoder.abstract(shape, "bfloat16")), shape)
    ref = sharding.move(ref, mesh, sharding.DECODE)
    prompts = jax.ShapeDtypeStruct((rows, tokens), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    prompts = sharding.placed(prompts, sharding.of_rows(prompts, mesh, sharding.DECODE))
    began = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = decoding.prefill.lower(ref.params, shape, *prompts, size=tokens + 1 + NEW, chunk=chunk)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return dict(refused=", ".join(re.findall(r"[\d.]+[GM]\b", str(error).splitlines()[0])))
    memory = compiled.memory_analysis()
    return dict(
        arguments=memory.argument_size_in_bytes,
        cache=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        seconds=time.monotonic() - began,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", default=CASES)
    parser.add_argument("--model", choices=config.SIZES, default="llama3.1-8b")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--tensor", type=int, default=8, help="chips that divide the heads")
    parser.add_argument("--layers", type=int, help="of the model; by default all")
    parser.add_argument("--chunked-only", action="store_true", help="leave out whole prompts")
    options = parser.parse_args()
    print("| rows x tokens | at once | arguments GiB | cache GiB | temporaries GiB | compile s |\n|" + " --- |" * 6)
    for case in options.case:
        rows, tokens = map(int, case.split("x"))
        for chunk in sorted({min(attention.CHUNK, tokens), attention.CHUNK if options.chunked_only else tokens}):
            facts = compile_prefill(
                rows, tokens, model=options.model, topology=options.topology, tensor=options.tensor,
                layers=options.layers, chunk=chunk,
            )  # fmt: skip
            cells = [facts["refused"]] if "refused" in facts else [
                *(f"{facts[name] / 2**30:.2f}" for name in ("arguments", "cache", "temporaries")),
                f"{facts['seconds']:.0f}",
            ]  # fmt: skip
            print("| " + " | ".join([case, str(chunk), *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
