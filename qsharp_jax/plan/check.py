"""Refuse a mesh that a run cannot use, and name one that it can: with more hosts at a time, or another preset."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

import qsharp_jax.plan.forecast as forecast
from qsharp_jax.models import meshes
from qsharp_jax.plan.job import Job
from qsharp_jax.system.errors import UserError

GIB = 2**30
MARGIN = 1.15  # forecasts may be too high by this factor; a refused run would not fit even then


def check(job: Job, section: Any, presets: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> None:
    """Check that a run fits on a mesh: its devices, the models' heads, the batches' rows, the memory of a chip.

    Args:
      section: the config's `mesh`.
      presets: all sections that could replace it, by name.
      devices: of this machine; by default they are not checked.

    Raises:
      UserError: with the numbers, and the remedy: hosts that decode together, or the nearest preset that works.
    """
    if (reason := problem(job, section, devices)) is None:
        return
    # A preset of unknown memory would suit every plan; it only counts if devices tell whether it is theirs.
    known = (other for other in presets.values() if other["hbm_bytes"] or devices is not None)
    others = sorted(known, key=lambda other: _distance(section, other))
    works = next((other["name"] for other in others if problem(job, other, devices) is None), None)
    hint = f"the nearest preset that works is --config.mesh={works}" if works else "no preset works as it stands"
    for hosts, decode in _decode_otherwise(job, section):
        if problem(job, {**section, "decode": decode}, devices) is None:
            changed = {axis: size for axis, size in decode.items() if size != section["decode"][axis]}
            sizes = " ".join(f"--config.mesh.decode.{axis}={size}" for axis, size in changed.items())
            words = "decoding works" if hosts == 1 else f"{hosts} hosts that decode together have room,"
            hint = f"{words} with {sizes}; {hint}"
            break
    raise UserError(f"{reason}; {hint}")


def _decode_otherwise(job: Job, section: Any) -> Iterator[tuple[int, dict[str, int]]]:
    """Yield sizes of `decode` on hosts of a slice, fewest first, with whole kv heads of the reference and whole heads
    of the guide.
    """
    for hosts in range(1, section["hosts"] + 1):
        if section["hosts"] % hosts == 0:
            chips = hosts * section["devices_per_host"]
            tensor = math.gcd(chips, job.ref.config.kv_heads, job.guide.config.trunk.heads)
            rest = "data" if hosts == 1 else "attention_data"  # of several hosts memory is wanted
            yield hosts, {"data": 1, "attention_data": 1, "tensor": tensor} | {rest: chips // tensor}


def problem(job: Job, section: Any, devices: Sequence[jax.Device] | None = None) -> str | None:
    """Describe why a run does not fit on a mesh; None if it does."""
    try:
        if devices is not None:
            for use in meshes.MESH_AXES:
                meshes.preset_mesh(section, use, devices)
        steps = {"a step of the fit": forecast.fit(job, section), "decoding": forecast.decode(job, section)}
    except UserError as error:
        return str(error)
    for what, step in steps.items():
        if section["hbm_bytes"] and step.bytes > MARGIN * section["hbm_bytes"]:
            parts = sorted(step.memory, key=lambda line: -line.amount)[:3]
            words = ", ".join(f"{line.what} {line.amount / GIB:.2f}" for line in parts)
            return (
                f"{what} with {step.rows} rows would take {step.bytes / GIB:.2f} GiB per chip ({words}), but a chip of"
                f" {section['name']} has {section['hbm_bytes'] / GIB:.2f}"
            )
    return None


def _distance(section: Any, other: Any) -> tuple[bool, bool, float]:
    """Order presets by distance: those of the same kind by their number of devices, then other kinds."""
    count, here = (s["slices"] * s["hosts"] * s["devices_per_host"] for s in (other, section))
    different = (other[what] != section[what] for what in ("kind", "platform"))
    return *different, abs(math.log2(count / here))
