"""The plan as text: memory and work of a chip per step, and how each number was computed."""

import math
import textwrap
from collections.abc import Iterable
from typing import Any

import jax

import qsharp_jax.plan.compiled as compiled
import qsharp_jax.plan.forecast as forecast
from qsharp_jax.models import meshes, quantized
from qsharp_jax.plan.check import GIB
from qsharp_jax.plan.forecast import Forecast
from qsharp_jax.plan.job import Job
from qsharp_jax.system.errors import UserError

WIDTH = 100  # of a terminal


def lines(job: Job, section: Any, *, compile: bool = False) -> Iterable[str]:
    """Yield the lines of the plan; with `compile`, also the compiler's.

    Raises:
      UserError: for a mesh that does not divide the models or the rows, or that cannot be compiled for.
    """
    if compile and job.is_policy:
        raise UserError("only fits of a guide are compiled; plan a policy without --compile")
    if compile:
        compiled.devices(section)  # fails early where there is no compiler
    yield from _head(job, section)
    fit, rows = job.config.fit, job.config.collect.batch_size
    tokens, caches = job.fit_rows * job.fit_tokens, job.cache_sizes(section, rows)
    positions = caches.positions + caches.shared
    uses = {
        "fit": (forecast.fit, compiled.fit, fit.accumulate, f"{job.fit_tokens} tokens", tokens),
        "decode": (forecast.decode, compiled.decode, 1, f"{positions} positions", rows),
    }
    for use, (count, compile_one, parts, row, step_tokens) in uses.items():
        sizes = section[use]
        step = math.prod(sizes[axis] for axis in meshes.MESH_AXES[use] if axis != "tensor") * parts
        step_forecast = count(job, section)
        where = " x ".join(f"{axis} {sizes[axis]}" for axis in meshes.MESH_AXES[use])
        name = "Fit, a step" if use == "fit" else "Decoding, a token of each row"
        yield f"\n{name}: {step_forecast.rows} rows of {row} on {where}"
        yield from _forecast(step_forecast, section, step_tokens, forecast.largest(count, job, section, step))
        if compile:
            yield from _compiled(step_forecast, compile_one(job, section, step_forecast.rows))


def _head(job: Job, section: Any) -> Iterable[str]:
    slices, hosts, each = section["slices"], section["hosts"], section["devices_per_host"]
    chip = f"{section['hbm_bytes'] / GIB:.0f} GiB at {section['hbm_bandwidth'] / 1e9:.0f} GB/s"
    chip += f", {section['flops'] / 1e12:.0f} TFLOP/s, {section['ici_bandwidth'] / 1e9:.0f} GB/s from the others"
    yield textwrap.fill(
        f"Mesh {section['name']}: {slices} x {hosts} x {each} (slices, hosts, devices) of {section['kind']}"
        + (f", each {chip}" if section["hbm_bytes"] else ", without known memory or speed"),
        WIDTH, subsequent_indent="  ",
    )  # fmt: skip
    for name, model in {"Reference": job.ref, job.learner.capitalize(): job.guide}.items():
        trunk = getattr(model.config, "trunk", model.config)
        leaves = jax.tree.leaves(model.params, is_leaf=quantized.is_quantized)
        count = sum(math.prod(leaf.shape) for leaf in leaves)
        decoded = f", decoded with weights in {trunk.quantize}" if trunk.quantize != "none" else ""
        yield (
            f"{name}: {count / 1e9:.3g}e9 weights ({trunk.layers} layers, {trunk.embed} wide, {trunk.heads} heads,"
            f" {trunk.kv_heads} of keys), computed in {trunk.dtype}{decoded}"
        )


def _forecast(step: Forecast, section: Any, tokens: int, most: int | None) -> Iterable[str]:
    for line in filter(lambda line: line.amount, step.memory):
        yield _row(line.what, f"{line.amount / GIB:.3f} GiB", line.how)
    limit = section["hbm_bytes"]
    state = f"of {limit / GIB:.0f}" + (", WHICH IS TOO MUCH" if step.bytes > limit else "") if limit else ""
    yield _row("total", f"{step.bytes / GIB:.3f} GiB", state)
    if most is not None:
        yield _row("largest batch", f"{most} rows", "that would fit")
    for line in step.times:
        yield _row(line.what, f"{line.amount * 1e3:.3f} ms", line.how)
    if step.times:
        together, apart = step.seconds, sum(line.amount for line in step.times)
        yield _row(
            "a step", f"{together * 1e3:.3f} ms",
            f"at best, all at once: {tokens / together:.4g} tokens/s,"
            f" {step.flops / section['flops'] / together:.0%} of the peak; {apart * 1e3:.3f} ms one after the other",
        )  # fmt: skip


def _compiled(step: Forecast, program: compiled.Compiled) -> Iterable[str]:
    forecast_bytes = step.bytes - sum(line.amount for line in step.memory if line.what == "prefill")  # not compiled
    yield _row(
        "compiler: memory", f"{program.bytes / GIB:.3f} GiB",
        f"arguments {program.arguments / GIB:.3f}, temporaries {program.temporaries / GIB:.3f};"
        f" the forecast is {forecast_bytes / program.bytes - 1:+.0%} of it",
    )  # fmt: skip
    yield _row("compiler: products", f"{program.flops / 1e12:.3g} TFLOP", f"forecast {step.flops / 1e12:.3g}")
    kinds = sorted(set(program.collectives) | set(step.collectives))
    words = ", ".join(
        f"{kind} {program.collectives[kind] / 1e6:.0f} ({step.collectives[kind] / 1e6:.0f})" for kind in kinds
    )
    total = sum(program.collectives.values())
    yield _row("compiler: collectives", f"{total / 1e6:.0f} MB", f"{words} MB (forecast)" if words else "none")


def _row(what: str, number: str, how: str) -> str:
    row = f"  {what:<22}{number:>14}  "
    return textwrap.fill(how, WIDTH, initial_indent=row, subsequent_indent=" " * len(row)) if how else row.rstrip()
