"""Compile guided decoding for an H200 on a machine that has none.

    pip install --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2     # with jax 0.10.2; no CUDA is needed
    python benchmarks/gpu.py [--rows 1 16 64] [--layers N [M]] [--models REF GUIDE] [--quantize int8]
    python benchmarks/gpu.py --rows 16 --positions 8320 --new 128 --filled 1 [--samples 16]

XLA compiles `decoding.decode` with abstract weights, by default of Llama 3.1 8B and of a 1B guide. The program is read,
not run: kernels and bytes of one step, and what makes a step wait for the host. 1,792 positions, of which each row
holds a quarter, 20 candidates, top-p and all records on, bfloat16, or weights in 8 or 4 bits. Kernels are not tuned
without a device: where cuBLAS is faster than the kernel here, a GPU's program has it instead. With jax 0.11 and later
nothing is compiled without one, since the lowering of our kernel asks the device for its kind. With `--samples` so many
rows have one prompt, which they share if it is long, as in `ContinuousBatch`.
"""

import argparse
import collections
from pathlib import Path
from typing import Any

from tpu import abstract, buffers, controls, state  # first: it chooses the platform

# isort: split
import jax
from decode_program import DecodeProgram
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from qsharp_jax import decoding
from qsharp_jax.models import config, decoder, gpu_form, memory, value
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel

TARGET = Path(__file__).with_name("h200.txtpb")
VOCABULARY = 128_256
BANDWIDTH = 4.3e12  # bytes a second of a copy on the device
ATTENTION = "decode_attention"  # the name of our kernel


def compile_step(rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """The table's entries for one number of rows, by column."""
    filled = options.filled
    ref, guide = abstract_models(options.models, options.layers, options.quantize)
    settings = decoding.Settings(
        stop_ids=(128_001, 128_009), vocab_size=VOCABULARY, candidates=20, truncate=True
    )  # fmt: skip
    carry = state(ref, guide, settings, rows, options.positions, options.new, options.samples)
    ring = {name: getattr(carry, name).replace(ring=True) for name in ("ref_cache", "guide_cache")}
    arguments = placed((ref, guide, carry.replace(**ring), controls(rows)))
    compiled = decoding.decode.lower(*arguments, settings=settings).compile()

    program = DecodeProgram(compiled.as_text())
    step = program.computations[program.step]
    caches = _bytes(buffers(carry))
    tables = [guide.params["trunk"]["embedding"], ref.params["embedding"]]  # only a few rows are read
    bound = _bytes((ref, guide)) - _bytes(tables) + filled * caches
    # The kernel's operands are whole buffers; it reads the filled part.
    by_kernel = any(i.kind == "custom-call" and ATTENTION in i.text for i in step)
    loops = [i for name in program.loop for i in program.computations[name] if i.kind == "while"]
    sorts = [line for line in compiled.as_text().splitlines() if " sort(" in line and f"{VOCABULARY}]" in line]
    return {
        "rows": rows,
        "kernels a step": sum(count for kind, count in _kinds(step).items() if kind in ("fusion", "custom-call")),
        "MB a step": round((program.hbm_bytes() - by_kernel * (1 - filled) * caches) / 1e6),
        "bound MB": round(bound / 1e6),
        "bound ms": round(bound / BANDWIDTH * 1e3, 2),
        "loops without a count": sum("known_trip_count" not in i.text for i in loops),
        "sorts of the vocabulary": len(sorts),
        "GiB of arguments": round(compiled.memory_analysis().argument_size_in_bytes / 2**30, 2),
        "GiB of temporaries": round(compiled.memory_analysis().temp_size_in_bytes / 2**30, 2),
    }


def abstract_models(names: list[str], layers: list[int] | None, quantize: str) -> tuple[LanguageModel, ValueModel]:
    """The reference and the guide in the form for a GPU."""
    kept = [{}, {}] if layers is None else [dict(layers=layers[0]), dict(layers=layers[-1])]
    kind = dict(dtype="bfloat16", quantize=quantize)
    ref_config, trunk = (config.make(name, **kind, **few) for name, few in zip(names, kept, strict=True))
    guide_config = ValueConfig(trunk)
    ref = _fused(abstract(lambda key: LanguageModel(decoder.unstack(decoder.init(key, ref_config)), ref_config)))
    guide = abstract(lambda key: ValueModel(value.unstack(value.init(key, guide_config)), guide_config))
    return ref, guide.replace(params=guide.params | {"trunk": _fused(value.trunk(guide)).params})


def placed(tree: Any) -> Any:
    """Abstract arrays on an H200."""
    device = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=TARGET.read_text()
    ).devices[0]
    here = SingleDeviceSharding(device)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)


def _fused(model: LanguageModel) -> LanguageModel:
    """An abstract decoder in the form for a GPU, as of `decoding.for_decoding`."""
    return model.replace(params=jax.eval_shape(lambda params: gpu_form.fuse(params, model.config), model.params))


def _bytes(tree: Any) -> int:
    return round(sum(leaf.size * memory.item_bytes(leaf.dtype, "gpu") for leaf in jax.tree.leaves(tree)))


def _kinds(instructions: list[Any]) -> collections.Counter[str]:
    return collections.Counter(i.kind for i in instructions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--layers", type=int, nargs="+", help="of the reference and of the guide; by default all")
    parser.add_argument("--models", nargs=2, default=["llama3.1-8b", "llama3.2-1b"], metavar="SIZE")
    parser.add_argument("--quantize", choices=("int8", "int4"), default="none")
    parser.add_argument("--positions", type=int, default=1792, help="of a row, --new among them")
    parser.add_argument("--new", type=int, default=1024, help="tokens of a response at most")
    parser.add_argument("--filled", type=float, default=0.25, help="share of the positions that rows hold")
    parser.add_argument("--samples", type=int, default=1, help="rows of one prompt")
    options = parser.parse_args()
    for number, rows in enumerate(options.rows):
        entries = compile_step(rows, options)
        if number == 0:
            print("| " + " | ".join(entries) + " |\n|" + " --- |" * len(entries))
        print("| " + " | ".join(map(str, entries.values())) + " |", flush=True)


if __name__ == "__main__":
    main()
