"""The guide's fit, and decoding, on every TPU preset: what `qsharp plan` forecasts against what the TPU compiler says.

    pip install ".[tpu]"
    python benchmarks/tpu_fit.py [--only NAME ...] [--use fit decode] [--large] [--layers N] [--attention HOW]
                               [--decode DATA,ATTENTION_DATA,TENSOR] [--forecast]

One row a preset, on a machine without a TPU: memory a chip, collectives of a step by kind, and the share of the peak
that the roofline leaves. The fit: two rows of 1,024 tokens a chip that has rows of its own, AdamW, remat "dots";
decoding: 16 rows of 1,024 positions on one host, 20 candidates; bfloat16. A 1B guide with an 8B reference; with
`--large`, a 3B guide with a 70B one. `--layers N` keeps so many layers of each model, `--decode` may have several hosts
decode together, `--forecast` compiles nothing.
"""

import argparse
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # before JAX

from qsharp_jax import plan  # noqa: E402
from qsharp_jax.models import config as model_configs  # noqa: E402
from qsharp_jax.plan import compiled  # noqa: E402
from qsharp_jax.run import config as configs  # noqa: E402

CONFIG = Path(__file__).parents[1] / "configs" / "arithmetic.py"
PRESETS = {name: preset for name, preset in configs.presets(CONFIG).items() if preset["platform"] == "tpu"}
SMALL, LARGE = ("llama3.1-8b", "llama3.2-1b"), ("llama3.1-70b", "llama3.2-3b")
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
HEADER = (
    "use", "mesh", "chips", "axes", "models", "rows", "GiB a chip: compiler", "plan", "plan / compiler", "of",
    "MB that arrive: " + ", ".join(KINDS), "plan", "computing ms", "collectives ms", "share of the peak", "compile s",
)  # fmt: skip
GIB = 2**30


def job(name: str, models: tuple[str, str], rows: int, attention: str) -> plan.Job:
    changes = [
        f"mesh={name}", "dtype=bfloat16", "fit.optimizer.name=adamw", "fit.length_bucket=64", f"fit.batch_size={rows}",
        f"fit.attention={attention}",
        "generate.max_new_tokens=512", "generate.prompt_bucket=512", "generate.top_k_candidates=20",
        "collect.batch_size=16",
    ]  # fmt: skip
    config = configs.load(CONFIG, [f"--config.{change}" for change in changes])
    return plan.make(config, ref_size=models[0], guide_size=models[1])


def row(use: str, name: str, models: tuple[str, str], attention: str, forecast_only: bool) -> list[str]:
    section = PRESETS[name]
    rows = 2 * section["fit"]["data"] * section["fit"]["fsdp"]
    made = job(name, models, rows, attention)
    found = getattr(plan, use)(made, section)
    began = time.monotonic()
    chip, brought = None, found.collectives
    if not forecast_only:
        chip = getattr(compiled, use)(made, section, found.rows)
        brought = chip.collectives
    seconds = {line.what: line.amount for line in found.times}
    # As the compiler has it; what crosses slices goes by the slower network.
    moved = (sum(brought.values()) - found.slow) / section["ici_bandwidth"] + found.slow / section["dcn_bandwidth"]
    axes = " x ".join(f"{axis} {size}" for axis, size in section[use].items() if size > 1)
    return [
        use, name, str(section["slices"] * section["hosts"] * section["devices_per_host"]), axes, " + ".join(models),
        str(found.rows), f"{chip.bytes / GIB:.2f}" if chip else "-", f"{found.bytes / GIB:.2f}",
        f"{found.bytes / chip.bytes:.2f}" if chip else "-", f"{section['hbm_bytes'] / GIB:.0f}",
        _megabytes(chip.collectives) if chip else "-", _megabytes(found.collectives),
        f"{seconds['computing'] * 1e3:.1f}", f"{moved * 1e3:.1f}",
        f"{seconds['computing'] / max(seconds['computing'], seconds['memory'], moved):.0%}",
        f"{time.monotonic() - began:.0f}" if chip else "-",
    ]  # fmt: skip


def _hosts(names: list[str]) -> list[str]:
    """The first of the presets that decode on the same host."""
    of = {}
    for name in names:
        of.setdefault((PRESETS[name]["kind"], tuple(PRESETS[name]["decode"].items())), name)
    return list(of.values())


def _megabytes(brought: Counter[str]) -> Any:
    return ", ".join(f"{brought[kind] / 1e6:.0f}" for kind in KINDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PRESETS, default=list(PRESETS), metavar="NAME")
    parser.add_argument("--use", nargs="+", choices=("fit", "decode"), default=["fit", "decode"])
    parser.add_argument("--large", action="store_true", help="70B with a 3B guide in place of 8B with 1B")
    parser.add_argument("--layers", type=int, help="of each model; by default all")
    parser.add_argument("--attention", choices=("xla", "blocks", "splash"), default="xla", help="of the fit")
    parser.add_argument("--forecast", action="store_true", help="compile nothing")
    parser.add_argument(
        "--decode", metavar="SIZES", help="of the decode mesh's axes, as 1,2,8; by default the presets'"
    )
    options = parser.parse_args()
    models = LARGE if options.large else SMALL
    if options.layers:
        for size in models:
            model_configs.SIZES[size] = model_configs.SIZES[size] | dict(layers=options.layers)
    if options.decode:
        sizes = dict(zip(("data", "attention_data", "tensor"), map(int, options.decode.split(",")), strict=True))
        PRESETS.update({name: {**PRESETS[name], "decode": sizes} for name in options.only})
    print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER))
    for use in options.use:
        for name in options.only if use == "fit" else _hosts(options.only):
            cells = row(use, name, models, options.attention, options.forecast)
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
