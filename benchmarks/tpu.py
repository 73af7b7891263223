"""Compile guided decoding for a slice of TPUs on a machine that has none.

    pip install ".[tpu]"
    python benchmarks/tpu.py [--only NAME ...] [--layers N] [--quantize int8] [--json]

Compiles `decoding.decode` for each case with abstract weights (none are ever made) and prints a markdown table: memory
a chip, what is updated in place, copies, collectives and bytes of one step. Batch 16 or 64, 2,048 positions (8,320 of
QuALITY's prompts), 20 candidates a row, a Bernoulli V-type guide, top-p and all records on, bfloat16. Where rows fill a
quarter of the cache, the bound is of these positions. The attention kernel's operands are whole buffers; counted are
the tiles that it copies: as many as the filled positions make up and one more, as rows do not begin where tiles do.
`--layers N [M]` keeps so many layers of the reference and of the guide; with few of them weights may stay in fast
memory from one step to the next, and bytes are below the bound. `--quantize` has the weights of both in 8 or 4 bits.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import time
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # before JAX is loaded: there is no TPU to be found

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from decode_program import REDUCTIONS, DecodeProgram, count, is_write_back  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from qsharp_jax import decoding  # noqa: E402
from qsharp_jax.models import config, decoder, memory, meshes, quantized, sharding, value  # noqa: E402
from qsharp_jax.models.decoder import LanguageModel  # noqa: E402
from qsharp_jax.models.tpu_attention import TILE  # noqa: E402
from qsharp_jax.models.value import ValueConfig, ValueModel  # noqa: E402
from qsharp_jax.plan.program import result_bytes  # noqa: E402

POSITIONS, NEW, CANDIDATES, VOCABULARY = 2048, 1024, 20, 128_256
HBM = {"v5e": 16 * 2**30, "v6e": 32 * 2**30, "v5p": 95 * 2**30}  # bytes a chip
BANDWIDTH = {"v5e": 819e9, "v6e": 1640e9, "v5p": 2765e9}  # bytes a second to it
ATTENTION = "decode_attention"  # the name of our kernel


@dataclasses.dataclass(frozen=True)
class Case:
    """A slice, a mesh and models.

    Attributes:
      slots: guide positions that a row has on average; 0 is one for each candidate.
      filled: share of the positions that the rows hold.
      samples: rows of one prompt, which share it if it is long.
    """

    topology: str
    mesh: dict[str, int]
    ref: str
    guide: str
    slots: int = 0
    rows: int = 16
    filled: float = 1.0
    positions: int = POSITIONS
    new: int = NEW
    samples: int = 1


SMALL, LARGE = ("llama3.1-8b", "llama3.2-1b"), ("llama3.1-70b", "llama3.2-3b")
MIXED = ("llama3.1-70b", "llama3.2-1b")
CASES = {
    "8b-v5e": Case("v5e:2x4", {"data": 1, "tensor": 8}, *SMALL),
    "8b-v5e-packed": Case("v5e:2x4", {"data": 1, "tensor": 8}, *SMALL, slots=4),
    "8b-v6e": Case("v6e:2x2", {"data": 1, "tensor": 4}, *SMALL),
    "8b-v5p": Case("v5p:2x2x1", {"data": 1, "tensor": 4}, *SMALL),
    "70b-v5p": Case("v5p:2x2x2", {"data": 1, "tensor": 8}, *LARGE),
    "8b-v5e-16": Case("v5e:4x4", {"data": 4, "tensor": 4}, *SMALL, rows=64),
    "8b-v5e-16-quarter": Case("v5e:4x4", {"data": 4, "tensor": 4}, *SMALL, rows=64, filled=0.25),
    # Sixteen responses to one long text: with a copy each, and sharing it.
    "quality-v5e-copies": Case("v5e:2x4", {"data": 1, "tensor": 8}, *SMALL, positions=8320, new=128),
    "quality-v5e": Case("v5e:2x4", {"data": 1, "tensor": 8}, *SMALL, positions=8320, new=128, samples=16),
    # More chips than kv heads: two groups of eight have half of the rows' caches each, and share the rest.
    "70b-v5e": Case("v5e:4x4", {"attention_data": 2, "tensor": 8}, *LARGE),
    "70b-1b-v5e": Case("v5e:4x4", {"attention_data": 2, "tensor": 8}, *MIXED),
}


def compile_case(case: Case, layers: list[int] | None = None, quantize: str = "none") -> dict[str, Any]:
    """The table's entries for a case, by column, and the facts that the tests check."""
    began = time.monotonic()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices
    mesh = meshes.make_mesh(case.mesh, sharding.DECODE, devices)
    kept = [{}, {}] if layers is None else [dict(layers=layers[0]), dict(layers=layers[-1])]
    ref_config, trunk = (
        config.make(name, dtype="bfloat16", quantize=quantize, **few)
        for name, few in zip((case.ref, case.guide), kept, strict=True)
    )
    guide_config = ValueConfig(trunk)
    ref = abstract(lambda key: LanguageModel(decoder.unstack(decoder.init(key, ref_config)), ref_config))
    guide = abstract(lambda key: ValueModel(value.unstack(value.init(key, guide_config)), guide_config))
    settings = decoding.Settings(
        stop_ids=(128_001, 128_009), vocab_size=VOCABULARY, candidates=CANDIDATES, slots=case.slots * case.rows,
        truncate=True,
    )  # fmt: skip
    ref, guide = (_placed(model, sharding.of_model(model, mesh, sharding.DECODE)) for model in (ref, guide))
    first = state(ref, guide, settings, case.rows, case.positions, case.new, case.samples)
    rows = (first, controls(case.rows))
    carry, each_row = _placed(rows, sharding.of_rows(rows, mesh, sharding.DECODE))
    with jax.set_mesh(mesh):
        lowered = decoding.decode.lower(ref, guide, carry, each_row, settings=settings)
        lowering = time.monotonic()
        compiled = lowered.compile()
    done = time.monotonic()

    usage = compiled.memory_analysis()
    read = DecodeProgram(compiled.as_text())
    caches = buffers(carry)
    kernels = [leaf for leaf in jax.tree.leaves((ref, guide)) if leaf.ndim == 2 and min(_shard(leaf)) > 1]
    copies = read.copies({_shard(leaf) for leaf in jax.tree.leaves(caches) + kernels})
    collectives = read.collectives()
    embeddings = [guide.params["trunk"]["embedding"]] + ([] if ref_config.tied else [ref.params["embedding"]])
    bound = _bytes((ref, guide)) - _bytes(embeddings) + round(case.filled * _bytes(caches))
    step = {i.name: i for i in read.computations[read.step]}
    attentions = [i for i in step.values() if i.kind == "custom-call" and i.name.startswith(ATTENTION)]
    read_by_tile = 2 if quantize == "none" else 4  # the last operands: keys and values, or those and their scales
    operands = [step[name].results[0] for i in attentions for name in i.operands[-read_by_tile:]]
    whole = sum(array.bytes for array in operands if not array.fast)
    unread = round(whole * max(0.0, 1 - case.filled - TILE / carry.ref_cache.size))
    return dict(
        hbm=HBM[case.topology[:3]],
        arguments=usage.argument_size_in_bytes,
        temporaries=usage.temp_size_in_bytes,
        peak=usage.argument_size_in_bytes + usage.output_size_in_bytes - usage.alias_size_in_bytes
        + usage.temp_size_in_bytes + usage.generated_code_size_in_bytes,
        aliased=usage.alias_size_in_bytes,
        cache=_bytes(caches),
        copies=[i.text[:200] for i in copies if not is_write_back(i)],
        write_backs=[i.text[:200] for i in copies if is_write_back(i)],
        write_back_bytes=sum(i.results[0].bytes for i in copies if is_write_back(i)),
        layers=ref_config.layers + guide_config.trunk.layers,
        reductions=[f"{i.source}: {i.text[:200]}" for i in collectives if i.kind in REDUCTIONS],
        collectives=count(collectives),
        collective_bytes=sum(map(result_bytes, collectives)),
        outside_layers=collections.Counter(f"{i.kind} {i.source}" for i in collectives if "Block" not in i.source),
        repeated=len(read.repeated_collectives()),
        kernels=len(attentions),
        hbm_bytes=read.hbm_bytes() - unread,
        bound_bytes=bound,
        bound_ms=bound / BANDWIDTH[case.topology[:3]] * 1e3,
        trace_seconds=lowering - began,
        compile_seconds=done - lowering,
    )  # fmt: skip


def abstract(init: Any) -> Any:
    """The bfloat16 shapes of the model that `init` makes from a key, or those of its quantized weights."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)
    return jax.eval_shape(quantized.model, shapes)


def state(
    ref: LanguageModel, guide: ValueModel, settings: decoding.Settings, rows: int, size: int, new: int, samples: int = 1
) -> decoding.State:
    """The abstract carry of the loop, for rows of `size` positions, `new` of them for new tokens."""
    prompt = size - new
    sizes = decoding.cache_sizes(rows, samples, prompt, new, prompt, parts=1)
    tokens, start = np.zeros((rows, prompt), np.int32), np.zeros(rows, np.int32)
    prompts = slice(sizes.prompts or rows)

    def first(ref_params: Any, trunk: Any) -> decoding.State:
        caches = [
            decoding.prefill_rows(params, config, tokens[prompts, :-1], start[prompts], sizes)
            for params, config in ((ref_params, ref.config), (trunk, guide.config.trunk))
        ]
        return decoding.first_state(*caches, tokens, start, new, settings)

    return jax.eval_shape(first, *jax.tree.map(_bare, (ref.params, guide.params["trunk"])))


def buffers(carry: decoding.State) -> list[Any]:
    """The buffers of all caches, shared prompts among them."""
    caches = [carry.ref_cache, carry.guide_cache]
    caches += [cache.prefix for cache in caches if cache.prefix is not None]
    return [cache.keys + cache.values for cache in caches]


def controls(rows: int) -> decoding.Controls:
    number, whole, seed = (jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.float32, jnp.int32, jnp.uint32))
    return decoding.Controls(
        eta=number, temperature=number, top_p=number, top_k=whole, threshold=number, budget=whole, seed=seed,
        mode=whole,
    )


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)


def _bare(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _shard(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return leaf.sharding.shard_shape(leaf.shape)


def _bytes(tree: Any) -> int:
    """On one chip."""
    return round(sum(math.prod(_shard(leaf)) * memory.item_bytes(leaf.dtype, "tpu") for leaf in jax.tree.leaves(tree)))


def row(name: str, case: Case, facts: dict[str, Any]) -> list[str]:
    gib, mb = lambda size: f"{size / 2**30:.2f}", lambda size: f"{size / 1e6:.0f}"
    others = {kind: count for kind, count in facts["collectives"].items() if kind not in REDUCTIONS}
    return [
        name,
        case.topology,
        f"{case.rows}, {case.filled:.2f}",
        " x ".join(f"{axis} {size}" for axis, size in case.mesh.items() if size > 1),
        f"{case.ref} + {case.guide}",
        f"{gib(facts['peak'])} of {facts['hbm'] / 2**30:.0f}",
        gib(facts["arguments"]),
        gib(facts["temporaries"]),
        f"{gib(facts['aliased'])} / {gib(facts['cache'])}",
        str(facts["kernels"]),
        str(len(facts["copies"])),
        f"{len(facts['write_backs'])} ({mb(facts['write_back_bytes'])} MB)",
        f"2 x {facts['layers']} + {len(facts['reductions']) - 2 * facts['layers']}",
        ", ".join(f"{count} {kind}" for kind, count in sorted(others.items())),
        mb(facts["collective_bytes"]),
        f"{mb(facts['hbm_bytes'])} / {mb(facts['bound_bytes'])}",
        f"{facts['bound_ms']:.2f}",
        f"{facts['compile_seconds']:.0f}",
    ]


HEADER = (
    "case", "slice", "rows, filled", "mesh", "models", "GiB a chip at peak", "arguments GiB", "temporaries GiB",
    "updated in place / caches GiB", "attention kernels", "copies", "write-backs", "reductions a step",
    "other collectives a step", "MB they bring", "MB of HBM a step / bound", "bound ms", "compile s",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--layers", type=int, nargs="+", help="of the reference and of the guide; by default all")
    parser.add_argument("--quantize", choices=("int8", "int4"), default="none")
    parser.add_argument("--json", action="store_true", help="print one JSON object of facts by case")
    options = parser.parse_args()
    if options.json:
        facts = {name: compile_case(CASES[name], options.layers, options.quantize) for name in options.only}
        print(json.dumps(facts))
        return
    print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER))
    for name in options.only:
        facts = compile_case(CASES[name], options.layers, options.quantize)
        print("| " + " | ".join(row(name, CASES[name], facts)) + " |", flush=True)


if __name__ == "__main__":
    main()
