"""Shardings of weights, caches and rows over a mesh, from rules that map logical to mesh axes.

`leaves.py` gives the logical axes of every parameter, `CACHE` those of a cache; `DECODE` and `FIT` are the rules.
`meshes.py` makes the meshes. Rows are the entries of an array's first axis where each belongs to one sequence.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qsharp_jax.models import leaves
from qsharp_jax.models.leaves import Axes
from qsharp_jax.system.errors import UserError

Rules = dict[str, tuple[str, ...]]

CACHE: Axes = ("batch", "kv", None, None)  # [B, G, S, E]

_UNDIVIDED: Rules = {"layers": (), "experts": (), "positions": (), "width": (), "head_dim": ()}
# `stream` is the batch of the residual stream, `rows` the batch where one device has a row's entire vocabulary.
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
    **_UNDIVIDED,
}
FIT: Rules = {
    "batch": ("data", "fsdp"),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "outputs": ("tensor",),
    "embed": ("fsdp",),
    **_UNDIVIDED,
}
# Axes that stay undivided on every device where the mesh does not divide them evenly. A kv head cut in two would have
# its whole cache copied in every step.
WHOLE_IF_UNEVEN = ("kv", "vocab", "outputs")
_SCALES = jax.tree_util.GetAttrKey("scales")  # of a `Quantized`
# Names in messages of the axes that must be divided evenly.
_NAMES = {"heads": "query heads", "batch": "rows of the batch", "mlp": "hidden units of the mlp"}


def rules_of(mesh: Any) -> Rules:
    """`FIT` for a mesh with an axis `fsdp`, even if of one device; `DECODE` for others."""
    return FIT if "fsdp" in mesh.shape else DECODE


def spec(axes: Axes, rules: Rules, mesh: Any) -> PartitionSpec:
    """The mesh axes that divide each dimension; rules for axes that the mesh lacks are skipped.

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

    Heads are never cut; kv heads and a vocabulary that the mesh does not divide evenly are undivided.

    Raises:
      UserError: for query heads or hidden units that the mesh does not divide.
    """
    trunk = getattr(model.config, "trunk", model.config)
    of_each_token = trunk is not model.config and model.config.type == "q"
    units = _units(trunk) | {"outputs": trunk.vocab_size if of_each_token else 1}
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs_of_weights(model, mesh, rules, units))


def move(model: Any, mesh: Mesh | None, rules: Rules) -> Any:
    """Lay the model out as `of_model` says; abstract leaves get the shardings. None as the mesh changes nothing."""
    if mesh is None:
        return model
    shardings = of_model(model, mesh, rules)
    abstract = isinstance(jax.tree.leaves(model)[0], jax.ShapeDtypeStruct)
    return placed(model, shardings) if abstract else place(model, shardings)


def placed(tree: Any, shardings: Any) -> Any:
    """Abstract arrays with shardings."""
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, shardings)


def of_rows(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings for arrays with one entry per row, a tree like them: a decode loop's `State` and `Controls`, a batch.

    Buffers of a KV cache, under `keys` and `values`, are divided by row and kv head; other arrays by row; scalars are
    not divided. A number of rows that the mesh does not divide is a UserError.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs_of_rows(tree, mesh, rules))


def place_rows(tree: Any) -> Any:
    """Lay arrays with one entry per row out as `of_rows` says for the current mesh, if there is one."""
    mesh = jax.sharding.get_mesh()
    return tree if mesh.empty else place(tree, of_rows(tree, mesh, rules_of(mesh)))


def local_rows(rows: int) -> np.ndarray:
    """[rows] bool: the rows of which `place_rows` puts a part on this process's devices."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return np.ones(rows, bool)
    local = np.zeros(rows, bool)
    for index in of_rows(local, mesh, rules_of(mesh)).addressable_devices_indices_map(local.shape).values():
        local[index] = True
    return local


def place(tree: Any, shardings: Any) -> Any:
    """Lay out arrays that are on this process's devices (with the same values in every process) or on all devices.

    Arrays that move from or to the devices of several processes pass through each host's memory, one at a time.
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
    """The largest number of rows up to `rows` (at least one per part) that the current mesh divides."""
    mesh = jax.sharding.get_mesh()
    parts = 1 if mesh.empty else _parts("batch", rules_of(mesh), mesh)
    return max(rows // parts, 1) * parts


def to_host(tree: Any) -> Any:
    """Fetch whole arrays; every process that holds a part must call this."""

    def gathered(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(gathered, tree))


def anywhere(condition: bool) -> bool:
    """Return true if the condition holds in any process of the current mesh; all of them must call this."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty or not mesh.is_multi_process:
        return condition
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return bool(to_host(jax.make_array_from_callback((mesh.size,), each, lambda _: np.asarray([condition]))).any())


def abstract_rows(tree: Any) -> Any:
    """`jax.ShapeDtypeStruct`s of arrays with one entry per row, with the shardings that `place_rows` gives them."""
    mesh = jax.sharding.get_mesh()
    return tree if mesh.empty else placed(tree, of_rows(tree, mesh, DECODE))


def abstract(shape: Sequence[int], dtype: Any, axes: Axes, mesh: Any) -> jax.ShapeDtypeStruct:
    """An abstract array laid out as `DECODE` says for these logical axes; on an empty mesh, without a sharding."""
    if mesh.empty:
        return jax.ShapeDtypeStruct(shape, dtype)
    sharding = NamedSharding(mesh, _fitting_spec(shape, axes, mesh, DECODE, {}))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


# --- Inside jit; without a mesh these do nothing --------------------------------------------------------------------


def _constrained(tree: Any, specs: Callable[[Any], Any], *, only_in_fitting: bool = False) -> Any:
    """Constrain arrays to the layout that `specs` returns for the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or (only_in_fitting and rules_of(mesh) is not FIT):
        return tree
    return jax.lax.with_sharding_constraint(tree, specs(mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lay out an array as `DECODE` says for these logical axes."""
    return _constrained(x, lambda mesh: spec(axes, DECODE, mesh))


def constrain_sequences(x: jax.Array) -> jax.Array:
    """In fitting, divide an array with one row per sequence by rows alone, gathering other divisions."""
    axes = ("batch", *(None,) * (x.ndim - 1))
    return _constrained(x, lambda mesh: spec(axes, FIT, mesh), only_in_fitting=True)


def constrain_looked_up(x: jax.Array) -> jax.Array:
    """In fitting, lay out rows of an embedding [B, T, D] like the table: their width over `fsdp`.

    Each device then looks up all tokens in its own part of the table, and an all-to-all assembles whole rows. Gathering
    the table instead would put the whole table and its gradient on every device.
    """
    rules = FIT | {"batch": ("data",)}
    return _constrained(x, lambda mesh: spec(("batch", None, "embed"), rules, mesh), only_in_fitting=True)


def gather_weights(tree: Any, trunk: Any) -> Any:
    """In fitting, gather a part of a decoder's parameters over `fsdp`; they stay divided over `tensor`.

    Call it where a layer is used, so that one layer's weights are whole at a time, and their gradient is scattered
    again. `trunk` is the decoder's config.
    """
    rules = FIT | {"embed": ()}
    return _constrained(tree, lambda mesh: _specs_of_weights(tree, mesh, rules, _units(trunk)), only_in_fitting=True)


def constrain_rows(tree: Any) -> Any:
    """Lay arrays with one entry per row out as `of_rows` does."""
    return _constrained(tree, lambda mesh: _specs_of_rows(tree, mesh, DECODE))


def whole_rows(x: jax.Array) -> jax.Array:
    """Lay out [B, V] in whole rows: over all devices if they divide B, else like the caches' rows."""
    return _constrained(x, lambda mesh: _whole_rows(x.shape[0], mesh))


def by_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compute a function of arrays with B rows on each device for its own rows.

    The compiler would also divide the operations by row, but make all devices agree before each iteration of a loop.
    """

    def mapped(*arrays: jax.Array) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return function(*arrays)
        rows = _whole_rows(arrays[0].shape[0], mesh)
        return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)(*arrays)

    return mapped


def on_each_device(function: Callable[..., Any], *axes: Axes) -> Callable[..., Any]:
    """Compute a function on every device for its own part of the arrays, laid out as `DECODE` says.

    Args:
      function: returns a tree like its first argument.
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


def over_hidden_units(function: Callable[..., jax.Array], *axes: Axes) -> Callable[..., jax.Array]:
    """Compute a sum over hidden units on every device for its own units, and add the devices' sums up, once.

    The compiler would add them up in every iteration of a loop.

    Args:
      function: returns an array that is whole along the mesh axes that divide "mlp".
      axes: logical axes of each argument.
    """

    def mapped(*arguments: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        divided = () if mesh.empty else tuple(a for a in rules_of(mesh)["mlp"] if mesh.shape.get(a, 1) > 1)
        if not divided:
            return function(*arguments)

        def place(leaf: jax.Array, names: Axes) -> PartitionSpec:  # quantized over the units, scales have one for all
            sizes = zip(names, leaf.shape, strict=True)
            return PartitionSpec(*(divided if axis == "mlp" and size > 1 else None for axis, size in sizes))

        specs = tuple(
            jax.tree.map(lambda leaf, names=names: place(leaf, names), argument)
            for argument, names in zip(arguments, axes, strict=True)
        )
        part = lambda *own: jax.lax.psum(function(*own), divided)  # noqa: E731
        return jax.shard_map(
            part, in_specs=specs, out_specs=PartitionSpec(), axis_names=set(divided), check_vma=False
        )(*arguments)

    return mapped


# --- Specs ----------------------------------------------------------------------------------------------------------


def _whole_rows(rows: int, mesh: Any) -> PartitionSpec:
    return spec(("batch" if rows % _parts("rows", DECODE, mesh) else "rows",), DECODE, mesh)


def _parts(axis: str | None, rules: Rules, mesh: Any) -> int:
    """The number of parts into which the mesh divides a logical axis."""
    return 1 if axis is None else math.prod(mesh.shape[a] for a in rules.get(axis, ()) if a in mesh.shape)


def _units(trunk: Any) -> dict[str, int]:
    """The number of indivisible pieces of those logical axes of a decoder's weights that consist of heads."""
    return {"heads": trunk.heads, "kv": trunk.kv_heads}


def _specs_of_weights(tree: Any, mesh: Any, rules: Rules, units: Mapping[str, int]) -> Any:
    def place(path: Any, leaf: Any) -> PartitionSpec:
        axes = leaves.find(path).axes
        if "layers" in _names(path) and leaf.ndim == len(axes) + 1:
            axes = ("layers", *axes)
        if path[-1] == _SCALES:  # those of whole channels, and groups that are not divided evenly, are on all devices
            sizes = zip(axes, leaf.shape, strict=True)
            axes = tuple(None if size % _parts(axis, rules, mesh) else axis for axis, size in sizes)
        return _fitting_spec(leaf.shape, axes, mesh, rules, units)

    return jax.tree.map_with_path(place, tree)


def _specs_of_rows(tree: Any, mesh: Any, rules: Rules) -> Any:
    def place(path: Any, leaf: Any) -> PartitionSpec:
        rows = ("batch", *(None,) * (leaf.ndim - 1)) if leaf.ndim else ()
        return _fitting_spec(leaf.shape, CACHE if {"keys", "values"} & _names(path) else rows, mesh, rules, {})

    return jax.tree.map_with_path(place, tree)


def _names(path: Any) -> set[str]:
    return set(jax.tree_util.keystr(path, simple=True, separator=".").split("."))


def _fitting_spec(shape: Sequence[int], axes: Axes, mesh: Any, rules: Rules, units: Mapping[str, int]) -> PartitionSpec:
    """`spec` for an array of this shape; raises a UserError for an axis that the mesh must divide evenly and does not.

    Args:
      units: the number of pieces that an axis consists of, by default its length.
    """
    if len(axes) != len(shape):
        raise ValueError(f"an array of shape {tuple(shape)} has axes {axes}")
    divided: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        pieces = size if axis is None else units.get(axis, size)
        if axis is None or pieces % _parts(axis, rules, mesh) == 0:
            divided.append(axis)
        elif axis in WHOLE_IF_UNEVEN:
            divided.append(None)
        else:
            over = " x ".join(f"{a} {mesh.shape[a]}" for a in rules[axis] if a in mesh.shape)
            fits = ", ".join(str(n) for n in range(1, mesh.size + 1) if pieces % n == 0)
            raise UserError(
                f"{pieces} {_NAMES.get(axis, axis)} cannot be divided by the mesh's {over}; use a size that divides"
                f" them: {fits}"
            )
    return spec(tuple(divided), rules, mesh)
