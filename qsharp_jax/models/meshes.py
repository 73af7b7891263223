"""Meshes of devices: from named sizes, or from a config's section `mesh`.

Mesh axes: `data` divides the rows; `tensor` a layer's heads, hidden units and the vocabulary; `fsdp` (fitting) the rows
and the weights' `embed` axis; `attention_data` (decoding) the caches' rows as `data` does, and the hidden units and the
vocabulary as `tensor` does, for more chips than kv heads.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from qsharp_jax.models.sharding import Rules
from qsharp_jax.system.errors import UserError, nearest

# The axes of a section's meshes; the last one's devices are nearest to each other.
MESH_AXES = {"fit": ("data", "fsdp", "tensor"), "decode": ("data", "attention_data", "tensor")}


def make_mesh(sizes: Mapping[str, int], rules: Rules, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the named axes, for `jax.set_mesh`; devices along the last axis are nearest to each other.

    Args:
      sizes: devices along each mesh axis, such as {"data": 2, "tensor": 4}.
      rules: `DECODE` or `FIT`.
      devices: by default all.

    Raises:
      UserError: for an axis that the rules do not know, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    known = {axis for axes in rules.values() for axis in axes}
    for name in sizes:
        if name not in known:
            raise UserError(f"no sharding rule uses the mesh axis {name!r}; {nearest(name, known)}")
    if math.prod(sizes.values()) != len(devices):
        words = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"a mesh of {words} needs {math.prod(sizes.values())} devices, and there are {len(devices)}")
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=devices)


def preset_mesh(section: Any, use: str, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh of a config's section `mesh` (see configs/meshes.py); None for a single device.

    A mesh for fitting covers all devices. A mesh for decoding may be smaller: it covers one group of neighboring hosts,
    and each group has its own. Only `data` crosses slices.

    Args:
      section: the section; None is one device of any kind.
      use: "fit" or "decode".
      devices: by default all.

    Raises:
      UserError: if the devices are not the section's, or its sizes do not multiply to their number.
    """
    if section is None:
        return None
    devices = list(jax.devices() if devices is None else devices)
    count = section["slices"] * section["hosts"] * section["devices_per_host"]
    # On other platforms a slice is what JAX calls a host.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if section["platform"] not in ("any", devices[0].platform):
        raise UserError(
            f"config.mesh is {section['name']}, for {section['platform']} devices, but the devices here are"
            f" {devices[0].platform}; give another --config.mesh"
        )
    if count == jax.process_count() == 1:
        return None
    if (count, section["slices"]) != (len(devices), slices):
        raise UserError(
            f"config.mesh is {section['name']}, {_counted(section['slices'], 'slice')} with {count} devices in all, and"
            f" there are {_counted(slices, 'slice')} with {len(devices)}; give another --config.mesh"
        )
    axes = MESH_AXES[use]
    sizes = [section[use][axis] for axis in axes]
    total, words = math.prod(sizes), " x ".join(f"{axis} {size}" for axis, size in zip(axes, sizes, strict=True))
    hosts, here = section["hosts"], section["devices_per_host"]
    # The hosts of a group that decodes by itself, by its number of devices; groups of one size make up a slice.
    groups = {n * here: n for n in range(1, hosts + 1) if hosts % n == 0} if use == "decode" else {}
    if total in groups and total != count:
        group_hosts = groups[total]
        group = jax.process_index() // group_hosts
        devices, slices = [device for device in devices if device.process_index // group_hosts == group], 1
    if total != len(devices) or sizes[0] % slices:
        allowed = " or ".join(map(str, sorted({*groups, count})))
        divided = f", and a data that {_counted(slices, 'slice')} divide" if slices > 1 else ""
        raise UserError(
            f"config.mesh.{use} is {words}, {total} devices; on {section['name']} give sizes that multiply to"
            f" {allowed}{divided}"
        )
    # Physical axes may be split: a tensor axis of 4 is then a part of a ring of 16.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        within, across = [sizes[0] // slices, *sizes[1:]], [slices, *(1 for _ in sizes[1:])]
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"
