"""The plan in words: what a chip holds and does in a step, and how each number was found."""

import math
from collections.abc import Iterable
from typing import Any

import jax

import qsharp_jax.plan.compiled as compiled
import qsharp_jax.plan.forecast as forecast
from qsharp_jax.models import meshes
from qsharp_jax.plan.check import GIB
from qsharp_jax.plan.forecast import Forecast
from qsharp_jax.plan.job import Job


def lines(job: Job, section: Any, *, compile: bool = False) -> Iterable[str]:
    """The lines of the plan, those of the compiler when it is through.

    Raises:
      UserError: for a mesh that does not divide the models or the rows, or one that cannot be compiled for.
    """
    if compile:
        compiled.devices(section)  # first of all, whether there is a compiler
    yield from _head(job, section)
    fit = job.config.fit
    tokens = fit.batch_size * job.fit_tokens
    uses = {
        "fit": (forecast.fit, compiled.fit, fit.accumulate, f"{job.fit_tokens} tokens", tokens),
        "decode": (forecast.decode, compiled.decode, 1, f"{job.cache_size} positions", job.config.collect.batch_size),
    }
    for use, (count, compile_one, parts, row, made) in uses.items():
        sizes = section[use]
        step = math.prod(sizes[axis] for axis in meshes.MESH_AXES[use] if axis != "tensor") * parts
        found = count(job, section)
        where = " x ".join(f"{axis} {sizes[axis]}" for axis in meshes.MESH_AXES[use])
        name = "Fit, a step" if use == "fit" else "Decoding, a token of each row"
        yield f"\n{name}: {found.rows} rows of {row} on {where}"
        yield from _forecast(found, section, made, forecast.largest(count, job, section, step))
        if compile:
            yield from _compiled(found, compile_one(job, section, found.rows))


def _head(job: Job, section: Any) -> Iterable[str]:
    slices, hosts, each = section["slices"], section["hosts"], section["devices_per_host"]
    chip = f"{section['hbm_bytes'] / GIB:.0f} GiB at {section['hbm_bandwidth'] / 1e9:.0f} GB/s"
    chip += f", {section['flops'] / 1e12:.0f} TFLOP/s, {section['ici_bandwidth'] / 1e9:.0f} GB/s from the others"
    yield (
        f"Mesh {section['name']}: {slices} x {hosts} x {each} (slices, hosts, devices) of {section['kind']}"
        + (f", each {chip}" if section["hbm_bytes"] else ", of which nothing is known")
    )
    for name, model in {"Reference": job.ref, "Guide": job.guide}.items():
        trunk = getattr(model.config, "trunk", model.config)
        count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        yield (
            f"{name}: {count / 1e9:.3g}e9 weights ({trunk.layers} layers, {trunk.embed} wide, {trunk.heads} heads,"
            f" {trunk.kv_heads} of keys), computed in {trunk.dtype}"
        )


def _forecast(found: Forecast, section: Any, made: int, most: int | None) -> Iterable[str]:
    for line in filter(lambda line: line.amount, found.memory):
        yield _row(line.what, f"{line.amount / GIB:.3f} GiB", line.how)
    limit = section["hbm_bytes"]
    state = f"of {limit / GIB:.0f}" + (", WHICH IS TOO MUCH" if found.bytes > limit else "") if limit else ""
    yield _row("together", f"{found.bytes / GIB:.3f} GiB", state)
    if most is not None:
        yield _row("largest batch", f"{most} rows", "that would fit")
    for line in found.times:
        yield _row(line.what, f"{line.amount * 1e3:.3f} ms", line.how)
    if found.times:
        together, apart = found.seconds, sum(line.amount for line in found.times)
        yield _row(
            "a step", f"{together * 1e3:.3f} ms",
            f"at best, all at once: {made / together:.4g} tokens a second,"
            f" {found.flops / section['flops'] / together:.0%} of the peak; {apart * 1e3:.3f} ms one after the other",
        )  # fmt: skip


def _compiled(found: Forecast, made: compiled.Compiled) -> Iterable[str]:
    yield _row(
        "compiler: memory", f"{made.bytes / GIB:.3f} GiB",
        f"arguments {made.arguments / GIB:.3f}, temporaries {made.temporaries / GIB:.3f};"
        f" the forecast is {found.bytes / made.bytes - 1:+.0%} of it",
    )  # fmt: skip
    yield _row("compiler: products", f"{made.flops / 1e12:.3g} TFLOP", f"forecast {found.flops / 1e12:.3g}")
    kinds = sorted(set(made.collectives) | set(found.collectives))
    words = ", ".join(
        f"{kind} {made.collectives[kind] / 1e6:.0f} ({found.collectives[kind] / 1e6:.0f})" for kind in kinds
    )
    total = sum(made.collectives.values())
    yield _row("compiler: collectives", f"{total / 1e6:.0f} MB", f"{words} MB (forecast)" if words else "none")


def _row(what: str, number: str, how: str) -> str:
    return f"  {what:<22}{number:>14}  {how}".rstrip()
