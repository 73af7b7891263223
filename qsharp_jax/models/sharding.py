"""Where arrays lie on a mesh of devices: logical axes of every leaf, rules from logical to mesh axes, shardings.

A leaf's name gives its logical axes (`PARAMETERS`, `CACHE`); one table a use (`DECODE`, `FIT`) gives the mesh axes that
divide each of them. Mesh axes: `data` divides the rows, `tensor` a layer's heads, hidden units and the vocabulary,
`fsdp` (in fitting) the rows and the weights' `embed`, `attention_data` (in decoding) the rows of the caches as `data`
does and the hidden units and the vocabulary as `tensor` does: for more chips than there are kv heads. Models are known
here by their leaves' names and a few numbers of their configs alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qsharp_jax.system.errors import UserError, nearest

Axes = tuple[str | None, ...]  # one logical axis a dimension; None is never divided
Rules = Mapping[str, tuple[str, ...]]

# By a leaf's own name, or with the name above it. Leaves below "layers" have the layers before these unless unstacked.
PARAMETERS: Mapping[str, Axes] = {
    "embedding": ("vocab", "embed"),
    "positions": (None, "embed"),
    "token_shift": (None,),
    "query.kernel": ("embed", "heads"),
    "key.kernel": ("embed", "kv"),
    "value.kernel": ("embed", "kv"),
    "query.bias": ("heads",),
    "key.bias": ("kv",),
    "value.bias": ("kv",),
    "output.kernel": ("heads", "embed"),
    "output.bias": (None,),
    "up.kernel": ("embed", "mlp"),
    "gate.kernel": ("embed", "mlp"),
    "up.bias": ("mlp",),
    "gate.bias": ("mlp",),
    "down.kernel": ("mlp", "embed"),
    "down.bias": (None,),
    "head": ("embed", "vocab"),  # of a language model
    "future": (None, "embed", "vocab"),  # heads of the auxiliary loss
    "head_weight": ("vocab", "embed"),  # this and the following are those of the transposed form
    "query.weight": ("heads", "embed"),
    "key.weight": ("kv", "embed"),
    "value.weight": ("kv", "embed"),
    "output.weight": ("embed", "heads"),
    "up.weight": ("mlp", "embed"),
    "gate.weight": ("mlp", "embed"),
    "down.weight": ("embed", "mlp"),
    "head.kernel": ("embed", "outputs"),  # of a guide
    "head.bias": ("outputs",),
    "value_head.kernel": ("embed", None),  # of a policy while it is trained
    "value_head.bias": (None,),
    "scale": (None,),  # of every norm
    "attention_norm.bias": (None,),
    "mlp_norm.bias": (None,),
    "final_norm.bias": (None,),
}
# A LoRA's parts beside a block's kernel: the one reads as the kernel does, the other writes as it does.
PARAMETERS = PARAMETERS | {
    f"{name.removesuffix('kernel')}{part}": axes
    for name, kernel in PARAMETERS.items()
    if name.endswith(".kernel") and name not in ("head.kernel", "value_head.kernel")
    for part, axes in {"lora_a": (kernel[0], None), "lora_b": (None, kernel[1]), "lora_scale": ()}.items()
}
CACHE: Axes = ("batch", "kv", None, None)  # [B, G, S, E]

# Beside the arrays' axes there are those of what is computed: `stream` is the batch of the residual stream, `rows` that
# of what one device does with a row's whole vocabulary.
DECODE: Rules = {
    "batch": ("data", "attention_data"),
    "stream": ("data",),
    "rows": ("data", "attention_data", "tensor"),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "mlp": ("tensor", "attention_data"),
    "vocab": ("tensor", "attention_data"),
    "outputs": ("tensor", "attention_data"),
    "embed": (),
    "layers": (),
}
FIT: Rules = {
    "batch": ("data", "fsdp"),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "outputs": ("tensor",),
    "embed": ("fsdp",),
    "layers": (),
}
# The axes of a preset's meshes; the last has the devices that are nearest to each other.
MESH_AXES = {"fit": ("data", "fsdp", "tensor"), "decode": ("data", "attention_data", "tensor")}
# Left whole on every device where the mesh does not divide them. A kv head cut in two would have its whole cache
# copied in every step.
WHOLE_IF_UNEVEN = ("kv", "vocab", "outputs")


def make_mesh(sizes: Mapping[str, int], rules: Rules, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the named axes, for `jax.set_mesh`. The last axis has the devices that are nearest to each other.

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
            raise UserError(f"the mesh has an axis {name!r}, which no rule uses; {nearest(name, known)}")
    if math.prod(sizes.values()) != len(devices):
        words = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"a mesh of {words} needs {math.prod(sizes.values())} devices, and there are {len(devices)}")
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=devices)


def rules_of(mesh: Any) -> Rules:
    """`FIT` for a mesh with the axis `fsdp`, be it of one device; `DECODE` for others, which have none."""
    return FIT if "fsdp" in mesh.shape else DECODE


def preset_mesh(section: Any, use: str, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh of a config's section `mesh`, as configs/meshes.py has them; None where that is one device.

    A mesh for fitting is over all devices. One for decoding is over those of as many hosts as its sizes multiply to,
    this one and others next to it, where each such group of hosts has one of its own. Only `data` goes from one slice
    to another.

    Args:
      section: the section; None is one device of any kind.
      use: "fit" or "decode".
      devices: all that there are, by default `jax.devices()`.

    Raises:
      UserError: for devices that are not those of the preset, or sizes that do not multiply to them.
    """
    if section is None:
        return None
    devices = list(jax.devices() if devices is None else devices)
    count = section["slices"] * section["hosts"] * section["devices_per_host"]
    # On other platforms a slice is what JAX calls a host.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if section["platform"] not in ("any", devices[0].platform):
        raise UserError(
            f"config.mesh is {section['name']}, of {section['platform']} devices, and those that are there are"
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
    # By the devices of a group of hosts that decodes by itself, its hosts: groups of one size make up a slice.
    groups = {n * here: n for n in range(1, hosts + 1) if hosts % n == 0} if use == "decode" else {}
    if total in groups and total != count:
        together = groups[total]
        group = jax.process_index() // together
        devices, slices = [device for device in devices if device.process_index // together == group], 1
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


def spec(axes: Axes, rules: Rules, mesh: Any) -> PartitionSpec:
    """The mesh axes of each dimension; those that the mesh does not have divide nothing.

    Raises:
      ValueError: for a logical axis that is not in the rules, or a mesh axis that would divide two dimensions.
    """
    if unknown := [axis for axis in axes if axis is not None and axis not in rules]:
        raise ValueError(f"unknown logical axes {', '.join(unknown)}; known are {', '.join(rules)}")
    parts = [() if axis is None else tuple(a for a in rules[axis] if a in mesh.shape) for axis in axes]
    used = [axis for part in parts for axis in part]
    if twice := sorted({axis for axis in used if used.count(axis) > 1}):
        raise ValueError(f"mesh axis {', '.join(twice)} would divide two dimensions of an array with axes {axes}")
    return PartitionSpec(*(part or None for part in parts))


def of_model(model: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings for a `LanguageModel` or `ValueModel`, a tree like it; its leaves may be abstract, stacked or not.

    The `params` of the result are what `hf.load_ref(..., shardings=)` takes and what a restore aims at. The model is
    cut at whole heads; kv heads that the mesh does not divide are on every device, as is an uneven vocabulary.

    Raises:
      UserError: for query heads or hidden units that the mesh does not divide.
    """
    trunk = getattr(model.config, "trunk", model.config)
    of_each_token = trunk is not model.config and model.config.type == "q"
    units = _units(trunk) | {"outputs": trunk.vocab_size if of_each_token else 1}
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs_of_weights(model, mesh, rules, units))


def move(model: Any, mesh: Mesh | None, rules: Rules) -> Any:
    """A model to where `of_model` says, from wherever it lies; abstract leaves get the shardings. No mesh: as it is."""
    if mesh is None:
        return model
    shardings = of_model(model, mesh, rules)
    abstract = isinstance(jax.tree.leaves(model)[0], jax.ShapeDtypeStruct)
    return placed(model, shardings) if abstract else place(model, shardings)


def placed(tree: Any, shardings: Any) -> Any:
    """Abstract arrays with shardings."""
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, shardings)


def of_rows(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings for what has an entry a row, a tree like it: a decode loop's `State`, its `Controls`, a batch.

    Buffers of a KV cache, under `keys` and `values`, are cut by row and kv head; other arrays by row; scalars not.

    Raises:
      UserError: for a number of rows that the mesh does not divide.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs_of_rows(tree, mesh, rules))


def place_rows(tree: Any) -> Any:
    """Puts what has an entry a row where `of_rows` says for the mesh that is set; without one it stays as it is.

    Raises:
      UserError: as `of_rows`.
    """
    mesh = jax.sharding.get_mesh()
    return tree if mesh.empty else place(tree, of_rows(tree, mesh, rules_of(mesh)))


def place(tree: Any, shardings: Any) -> Any:
    """Arrays, of this process (the same in every one, if there are several) or of all, with other shardings.

    Nothing goes over a disk. What is to be moved from or to the devices of several processes passes through the memory
    of each host, one array at a time.
    """

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if getattr(leaf, "sharding", None) == sharding:
            return leaf
        if sharding.is_fully_addressable and getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        whole = to_host(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings)


def round_rows(rows: int) -> int:
    """The nearest number of rows that the mesh that is set divides: less, if that leaves any."""
    mesh = jax.sharding.get_mesh()
    parts = 1 if mesh.empty else _parts("batch", rules_of(mesh), mesh)
    return max(rows // parts, 1) * parts


def to_host(tree: Any) -> Any:
    """The whole of arrays, whichever processes their devices belong to; then each of these has to ask for it."""

    def gathered(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(gathered, tree))


def anywhere(condition: bool) -> bool:
    """Return true if it holds in any process with devices in the mesh that is set; all of them have to call this."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty or not mesh.is_multi_process:
        return condition
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return bool(to_host(jax.make_array_from_callback((mesh.size,), each, lambda _: np.asarray([condition]))).any())


def abstract_rows(tree: Any) -> Any:
    """`jax.ShapeDtypeStruct`s of what has an entry a row, with the shardings that `place_rows` would give it.

    Raises:
      UserError: as `of_rows`.
    """
    mesh = jax.sharding.get_mesh()
    return tree if mesh.empty else placed(tree, of_rows(tree, mesh, DECODE))


# --- Inside jit; without a mesh these do nothing --------------------------------------------------------------------


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays an array out as `DECODE` says for these logical axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(axes, DECODE, mesh))


def constrain_sequences(x: jax.Array) -> jax.Array:
    """In fitting, lays an array with a row for each sequence out by rows: what is divided otherwise is gathered."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or rules_of(mesh) is DECODE:
        return x
    return jax.lax.with_sharding_constraint(x, spec(("batch", *(None,) * (x.ndim - 1)), FIT, mesh))


def constrain_looked_up(x: jax.Array) -> jax.Array:
    """In fitting, lays what was looked up in an embedding, [B, T, D], out as the table: its width over `fsdp`.

    Each device then looks all the rows' tokens up in its own part, and an all-to-all makes whole rows of them. Were the
    table gathered instead, it and its gradient would be whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or rules_of(mesh) is DECODE:
        return x
    rules = FIT | {"batch": ("data",)}
    return jax.lax.with_sharding_constraint(x, spec(("batch", None, "embed"), rules, mesh))


def gather_weights(tree: Any, trunk: Any) -> Any:
    """In fitting, a part of a decoder's parameters as it is used: whole over `fsdp`, still divided over `tensor`.

    Asked for where a layer is used, one layer's weights are whole at a time, and their gradient is scattered again.

    Args:
      trunk: the decoder's config.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or rules_of(mesh) is DECODE:
        return tree
    return jax.lax.with_sharding_constraint(tree, _specs_of_weights(tree, mesh, FIT | {"embed": ()}, _units(trunk)))


def constrain_rows(tree: Any) -> Any:
    """Lays out what has an entry a row as `of_rows` does."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, _specs_of_rows(tree, mesh, DECODE))


def whole_rows(x: jax.Array) -> jax.Array:
    """Lays [B, V] out in whole rows: over all devices if they divide B, else as the caches' rows are."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, _whole_rows(x.shape[0], mesh))


def by_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays with B rows each, every row for itself, so that devices need not wait for each other.

    The compiler divides other operations by row by itself, but has all devices agree before each turn of a loop.
    """

    def mapped(*arrays: jax.Array) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return function(*arrays)
        rows = _whole_rows(arrays[0].shape[0], mesh)
        return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)(*arrays)

    return mapped


def on_each_device(function: Callable[..., Any], *axes: Axes) -> Callable[..., Any]:
    """A function that every device computes for its own part of the arrays, laid out as `DECODE` says.

    Args:
      function: gives a tree like its first argument.
      axes: logical axes of each argument's leaves.
    """

    def mapped(*arguments: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return function(*arguments)
        specs = tuple(
            jax.tree.map(lambda leaf, names=names: _fitting_spec(leaf.shape, names, mesh, DECODE, {}), argument)
            for argument, names in zip(arguments, axes, strict=True)
        )
        return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arguments)

    return mapped


def _whole_rows(rows: int, mesh: Any) -> PartitionSpec:
    return spec(("batch" if rows % _parts("rows", DECODE, mesh) else "rows",), DECODE, mesh)


def _parts(axis: str | None, rules: Rules, mesh: Any) -> int:
    """Into how many the mesh divides a logical axis."""
    return math.prod(mesh.shape[a] for a in rules.get(axis, ()) if a in mesh.shape)


def _units(trunk: Any) -> dict[str, int]:
    """How many pieces the logical axes of a decoder's weights consist of that cannot be cut anywhere."""
    return {"heads": trunk.heads, "kv": trunk.kv_heads}


def _specs_of_weights(tree: Any, mesh: Any, rules: Rules, units: Mapping[str, int]) -> Any:
    def place(path: Any, leaf: Any) -> PartitionSpec:
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        axes = next((PARAMETERS[n] for n in (".".join(names[-2:]), names[-1]) if n in PARAMETERS), None)
        if axes is None:
            raise ValueError(f"no logical axes are known for parameter {'.'.join(names)}")
        if "layers" in names and leaf.ndim == len(axes) + 1:
            axes = ("layers", *axes)
        return _fitting_spec(leaf.shape, axes, mesh, rules, units)

    return jax.tree.map_with_path(place, tree)


def _specs_of_rows(tree: Any, mesh: Any, rules: Rules) -> Any:
    def place(path: Any, leaf: Any) -> PartitionSpec:
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        rows = ("batch", *(None,) * (leaf.ndim - 1)) if leaf.ndim else ()
        return _fitting_spec(leaf.shape, CACHE if {"keys", "values"} & set(names) else rows, mesh, rules, {})

    return jax.tree.map_with_path(place, tree)


def _fitting_spec(shape: Sequence[int], axes: Axes, mesh: Any, rules: Rules, units: Mapping[str, int]) -> PartitionSpec:
    """`spec` for an array of this shape. `units`: how many pieces a logical axis consists of, by default its length."""
    if len(axes) != len(shape):
        raise ValueError(f"an array of shape {tuple(shape)} has axes {axes}")
    whole = []
    for axis, size in zip(axes, shape, strict=True):
        pieces = units.get(axis, size)
        uneven = pieces % _parts(axis, rules, mesh)
        whole.append(None if uneven and axis in WHOLE_IF_UNEVEN else axis)
        if uneven and axis not in WHOLE_IF_UNEVEN:
            over = " x ".join(f"{a} {mesh.shape[a]}" for a in rules[axis] if a in mesh.shape)
            fits = ", ".join(str(n) for n in range(1, mesh.size + 1) if pieces % n == 0)
            what = {"heads": "query heads", "batch": "rows of the batch", "mlp": "hidden units of the mlp"}
            raise UserError(
                f"{pieces} {what.get(axis, axis)} cannot be divided by the mesh's {over};"
                f" sizes that divide them are {fits}"
            )
    return spec(tuple(whole), rules, mesh)
