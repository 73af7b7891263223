"""Loading weights: a folder's tensors, read slice by slice straight to the devices that need them.

All names and shapes are compared, and the memory is checked, before anything is read. Besides the model itself, the
host holds one leaf's slices at a time.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qsharp_jax.models.hf.adapter as adapters
import qsharp_jax.models.hf.config as configs
import qsharp_jax.models.hf.gguf as hf_gguf
import qsharp_jax.models.hf.names as names
import qsharp_jax.models.hf.packed as packed
from qsharp_jax.models import cpu_form, decoder, memory, quantized, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.models.hf.files import Tensors
from qsharp_jax.models.leaves import Place
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.system import gguf
from qsharp_jax.system.errors import UserError

CHUNK = 4_000_000  # bytes read at once; small enough to be transposed within the processor's cache
THREADS = 8

AnyTensors = Tensors | hf_gguf.Tensors | packed.Tensors | adapters.Tensors


def read_config(folder: str | Path, dtype: str, quantize: str = "none") -> DecoderConfig:
    """The decoder config of a folder, to be stored and computed in "float32" or "bfloat16".

    Args:
      quantize: as of `DecoderConfig`.

    Raises:
      UserError: if its config.json is missing or damaged, or describes an unsupported model.
    """
    return configs.read(folder, dtype, quantize).decoder


def read_guide_config(folder: str | Path, dtype: str, quantize: str = "none") -> ValueConfig:
    """The config of a folder's guide; arguments and errors as in `read_config`, and a UserError without a guide."""
    return configs.guide(configs.read(folder, dtype, quantize), folder)


def is_guide(folder: str | Path) -> bool:
    """Return true if a folder holds an exported guide rather than a language model; errors as in `read_config`."""
    return "type" in configs.read(folder, "float32").qsharp


def load_ref(
    folder: str | Path, *, dtype: str, quantize: str = "none", unstacked: bool = True, shardings: Any = None
) -> LanguageModel:
    """Load a causal language model.

    Args:
      folder: with config.json and safetensors; or a GGUF file, or a folder with one; or a PEFT adapter's.
      dtype: dtype of the loaded weights and of the computation, "float32" or "bfloat16".
      quantize: "int8" or "int4" for weights that are quantized one by one as they are read, in float32.
      unstacked: layers as a list, for decoding; otherwise stacked, for training.
      shardings: a tree of `jax.sharding.Sharding` like the result, or a prefix of one; by default everything is put
        on the default device. Each process reads only its own slices.

    Raises:
      UserError: for a wrong config, wrong or damaged files, or too little memory.
    """
    source = _ref(folder, dtype, quantize)
    return LanguageModel(_load(source, unstacked, shardings), source.config.decoder)


def load_trunk(folder: str | Path, *, dtype: str, unstacked: bool = False, shardings: Any = None) -> LanguageModel:
    """Load a decoder to start a guide from: `value.init(key, ValueConfig(trunk.config, ...), trunk.params)`.

    The folder may hold a language model or a guide, whose head is left out. Arguments and errors as in `load_ref`.
    """
    source = _trunk(folder, dtype)
    return LanguageModel(_load(source, unstacked, shardings), source.config.decoder)


def load_guide(
    folder: str | Path, *, dtype: str, quantize: str = "none", unstacked: bool = True, shardings: Any = None
) -> ValueModel:
    """Load a guide: a token classifier (V-type) or a language model (Q-type) with our entry in its config.json.

    Arguments and errors are as in `load_ref`.
    """
    source = _guide(folder, dtype, quantize)
    return ValueModel(_load(source, unstacked, shardings), configs.guide(source.config, folder))


def base_of(folder: str | Path) -> Path | None:
    """The folder or GGUF file of the model that a folder's adapter changes; None where there is no adapter.

    Raises:
      UserError: for an adapter that is not applied, or whose base is not there.
    """
    adapter = adapters.find(folder)
    return adapter and adapter.base


def check_weights(folder: str | Path, what: str) -> None:
    """Run the checks of `load_ref`, `load_trunk` or `load_guide`, except for memory, reading only the files' headers.

    Args:
      what: "ref", "trunk" or "guide".
    """
    with _open({"ref": _ref, "trunk": _trunk, "guide": _guide}[what](folder, "float32")):
        pass


# --- Checks ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Source:
    """A folder and what to read from it."""

    folder: Path
    config: configs.FolderConfig
    shapes: Params  # the tree of parameters, layers stacked
    table: Mapping[str, Place]  # the place of each leaf
    extra_heads: bool = False  # whether the folder may hold heads that the tree lacks


def _ref(folder: str | Path, dtype: str, quantize: str = "none") -> _Source:
    config = configs.read(folder, dtype, quantize)
    if config.classifier or "type" in config.qsharp:
        raise UserError(f"{folder} holds a guide or another token classifier; give the folder of a language model")
    places = names.decoder_places(config.family, config.decoder)
    return _Source(Path(folder), config, decoder.abstract(config.decoder), places)


def _trunk(folder: str | Path, dtype: str) -> _Source:
    config = configs.read(folder, dtype)
    shapes = decoder.abstract(config.decoder)
    shapes.pop("head", None)
    places = names.decoder_places(config.family, config.decoder)
    return _Source(Path(folder), config, shapes, places, extra_heads=True)


def _guide(folder: str | Path, dtype: str, quantize: str = "none") -> _Source:
    config = configs.read(folder, dtype, quantize)
    guide = configs.guide(config, folder)
    places = names.guide_places(config.family, config.decoder, guide.type)
    # An adapter's base may be a language model.
    return _Source(Path(folder), config, value.abstract(guide), places, extra_heads=base_of(folder) is not None)


@contextlib.contextmanager
def _open(source: _Source) -> Iterator[tuple[AnyTensors, Mapping[str, Place]]]:
    """Open the folder's tensors, compare all names and shapes, and yield the place of each leaf among them."""
    adapter = adapters.find(source.folder)
    folder = source.folder if adapter is None else adapter.base
    file = gguf.find(folder)
    prefix = names.prefix(source.config.family)
    quantization = source.config.quantization
    with Tensors(folder) if file is None else hf_gguf.Tensors(file) as opened:
        base = opened if quantization is None else packed.Tensors(opened, quantization, folder)
        tensors = base if adapter is None else adapters.Tensors(adapter, base, prefix)
        # Checkpoints of the base model alone leave out its name.
        strip = "" if any(name.startswith(prefix) for name in tensors.shapes) else prefix
        table = {
            path: dataclasses.replace(place, name=place.name.removeprefix(strip))
            for path, place in source.table.items()
        }
        _check(source, tensors, _expected(source.shapes, table), table.get("embedding"))
        yield tensors, table


def _load(source: _Source, unstacked: bool, shardings: Any) -> Params:
    dtype = source.config.decoder.compute_dtype
    with _open(source) as (tensors, table):
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), source.shapes)
        if unstacked:
            unstack = value.unstack if "trunk" in target else decoder.unstack
            target = jax.eval_shape(functools.partial(unstack, transposed=cpu_form.here()), target)
        target = jax.eval_shape(functools.partial(quantized.tree, how=source.config.decoder.quantize), target)
        if shardings is not None:
            target = jax.tree.map(
                lambda sharding, tree: jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
                ),
                shardings,
                target,
                is_leaf=lambda node: isinstance(node, jax.sharding.Sharding),
            )
        copies = cpu_form.dequantized_copies(target, source.config.decoder) if cpu_form.here() else []
        memory.check_memory({"the weights": target} | ({f"the {memory.DEQUANTIZED} weights": copies} if copies else {}))
        with ThreadPoolExecutor(THREADS) as pool:

            def read(path: tuple, leaf: Any) -> Any:
                if not quantized.is_quantized(leaf):
                    return _read_leaf(tensors, table, path, leaf, pool)
                whole = jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.values.sharding)
                return quantized.quantize_like(leaf, _read_leaf(tensors, table, path, whole, pool))

            return jax.tree.map_with_path(read, target, is_leaf=quantized.is_quantized)


def _expected(shapes: Params, table: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """The shapes that the tensors of a tree (layers stacked) should have in a checkpoint, by name."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        key, _ = names.split_layer(path)
        place = table[key]
        if "{}" in place.name:
            for layer in range(leaf.shape[0]):
                expected |= place.tensors(leaf.shape[1:], layer)
        else:
            expected |= place.tensors(leaf.shape)
    return expected


def _check(
    source: _Source, tensors: AnyTensors, expected: Mapping[str, tuple[int, ...]], embedding: Place | None
) -> None:
    """Compare the tensors with those that the config implies, in name, shape and dtype; raises a UserError."""
    folder = source.folder
    missing = [name for name in expected if name not in tensors.shapes]
    if missing:
        raise UserError(
            f"{folder} lacks the tensor {missing[0]}{_and_others(missing)}, which its config requires; download"
            " the weights and the config of the same model"
        )
    for name, shape in expected.items():
        if tensors.shapes[name] != shape:
            raise UserError(
                f"{folder}: the tensor {name} has the shape {tensors.shapes[name]}, but its config requires"
                f" {shape}; download the weights and the config of the same model"
            )
        if tensors.stored[name] not in tensors.readable:
            raise UserError(
                f"{folder}: the tensor {name} is stored as {tensors.stored[name]}; supported are"
                f" {', '.join(tensors.readable)}"
            )
    extra = [name for name in tensors.shapes if name not in expected and not names.is_buffer(name)]
    if isinstance(tensors, adapters.Tensors):  # a guide may have only the first layers of its base
        extra = [name for name in extra if name not in tensors.optional]
    if isinstance(tensors, packed.Tensors):
        extra = [name for name in extra if not tensors.is_zero_bias(name)]
    if source.extra_heads:
        extra = [name for name in extra if name.partition(".")[0] not in ("lm_head", "score", "classifier")]
    elif source.config.decoder.tied and embedding is not None and "lm_head.weight" in extra:
        if not _same(tensors, "lm_head.weight", embedding.name):
            raise UserError(
                f"{folder} has a lm_head.weight that differs from its embedding, but config.json says that they are"
                ' tied; set "tie_word_embeddings" to false if the model has its own head'
            )
        extra.remove("lm_head.weight")
    if extra:
        raise UserError(
            f"{folder} has the tensor {extra[0]}{_and_others(extra)}, which its config does not call for; download"
            " the weights and the config of the same model"
        )


def _and_others(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _same(tensors: AnyTensors, name: str, other: str) -> bool:
    """Return true if two tensors are bitwise equal."""
    shape = tensors.shapes[name]
    if (shape, tensors.stored[name]) != (tensors.shapes[other], tensors.stored[other]):
        return False
    rows = max(1, CHUNK // (4 * shape[-1]))
    pieces = [(slice(i, i + rows), slice(None)) for i in range(0, shape[0], rows)]
    return all(
        np.array_equal(tensors.read(name, piece).view(np.uint8), tensors.read(other, piece).view(np.uint8))
        for piece in pieces
    )


# --- Reading --------------------------------------------------------------------------------------------------------


def _read_leaf(
    tensors: AnyTensors, table: Mapping[str, Place], path: tuple, leaf: jax.ShapeDtypeStruct, pool: ThreadPoolExecutor
) -> jax.Array:
    key, layer = names.split_layer(path)
    place = table[key]
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(memory.default_device())
    if layer is not None or "{}" not in place.name:
        return _read_array(tensors, place, layer, leaf.shape, leaf.dtype, sharding, pool)
    stacked = jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
    for i in range(leaf.shape[0]):
        part = _read_array(tensors, place, i, leaf.shape[1:], leaf.dtype, _of_one_layer(sharding), pool)
        # Without this wait, the host would read ahead of the device and hold more than one layer.
        stacked = jax.block_until_ready(_set_layer(sharding)(stacked, part, i))
    return stacked


def _of_one_layer(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    return sharding


@functools.lru_cache(maxsize=64)
def _set_layer(sharding: jax.sharding.Sharding) -> Any:
    def set_layer(stacked: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, layer, index, 0)

    return jax.jit(set_layer, donate_argnums=0, out_shardings=sharding)


def _read_array(
    tensors: AnyTensors,
    place: Place,
    layer: int | None,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
    pool: ThreadPoolExecutor,
) -> jax.Array:
    name, slices = place.name.format(layer), {}

    def read(index: Any) -> np.ndarray:
        # Devices that hold the same slice share one read.
        bounds = tuple(dim.indices(size)[:2] for dim, size in zip(index, shape, strict=True))
        if bounds not in slices:
            slices[bounds] = _read_slice(tensors, place, name, bounds, dtype, pool)
        return slices[bounds]

    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, read))


def _read_slice(
    tensors: AnyTensors,
    place: Place,
    name: str,
    bounds: tuple[tuple[int, int], ...],
    dtype: np.dtype,
    pool: ThreadPoolExecutor,
) -> np.ndarray:
    """Read a slice of a leaf, with bounds [start, stop) on each axis, in small pieces."""
    if "{}" in name:
        numbers, *bounds_of_each = bounds
        parts = [name.format(number) for number in range(*numbers)]
        return np.stack([_read_slice(tensors, place, part, tuple(bounds_of_each), dtype, pool) for part in parts])
    out = np.empty([stop - start for start, stop in bounds], dtype)
    by_row, where = out, list(bounds)
    if place.transposed:
        by_row, where = out.T, where[::-1]  # a view in the order of the file
    start, stop = where[place.axis]
    where[place.axis] = start + place.offset, stop + place.offset
    (begin, end), *others = where
    width = int(np.prod([stop - start for start, stop in others], dtype=np.int64))
    rows = max(1, CHUNK // (4 * width))

    def copy(row: int) -> None:
        stop = min(row + rows, end)
        piece = tensors.read(name, (slice(row, stop), *(slice(*bound) for bound in others)))
        by_row[row - begin : stop - begin] = piece.astype(dtype)

    for _ in pool.map(copy, range(begin, end, rows)):
        pass
    return out
