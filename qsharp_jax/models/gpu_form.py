"""The form of a decoder's weights that is faster on a GPU: products with the same input are one.

XLA joins some such products within the loop. It leaves those with large weights apart, and for a single row it computes
keys and values by writing the whole weight matrix, multiplied, to memory.
Shapes: D embed, G kv heads, R query heads per kv head, E head_dim.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qsharp_jax.models import memory, quantized
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.quantized import Weight

Module = dict[str, Any]


def here() -> bool:
    """Return true if models are decoded in this form on the default device."""
    return memory.default_device().platform == "gpu"


def fuse(params: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Replace each layer's "query", "key", "value" by "qkv" [D, G, R + 2, E] and "gate", "up" by "gate_up" [D, 2, mlp].

    Devices of a mesh keep their own heads and hidden units. Modules that are divided differently, as where a mesh has
    more devices than kv heads, stay as they are, and so do those with a LoRA and those that are fused already.

    Args:
      params: layers as a list.
    """

    def fused(layer: Module) -> Module:
        layer = _join(layer, ("query", "key", "value"), "qkv", (config.kv_heads, -1, config.head_dim))
        return _join(layer, ("gate", "up"), "gate_up", (1, config.mlp))

    return dict(params) | {"layers": [fused(layer) for layer in params["layers"]]}


def _join(layer: Module, names: Sequence[str], joined: str, shape: tuple[int, ...]) -> Module:
    """Replace modules of a layer by one: their outputs, in this shape, side by side on the last axis but one."""
    modules = [layer[name] for name in names if name in layer]
    if len(modules) < len(names):
        return layer
    first = modules[0]
    for module in modules:
        if module.keys() != first.keys() or module.keys() - {"kernel", "bias"}:
            return layer
        if not _divided_alike(module["kernel"], first["kernel"]):
            return layer
    both = {name: _side_by_side([module[name] for module in modules], shape) for name in modules[0]}
    return {name: module for name, module in layer.items() if name not in names} | {joined: both}


def _divided_alike(kernel: Weight, other: Weight) -> bool:
    """Return true for matrices that are laid out alike over devices; traced ones are not laid out yet."""
    pairs = zip(jax.tree.leaves(kernel), jax.tree.leaves(other), strict=True)
    return all(isinstance(a, jax.core.Tracer) or a.sharding.is_equivalent_to(b.sharding, 2) for a, b in pairs)


@functools.partial(jax.jit, static_argnames="shape")
def _side_by_side(leaves: Sequence[Weight], shape: tuple[int, ...]) -> Weight:
    def join(*parts: jax.Array) -> jax.Array:
        return jnp.concatenate([part.reshape(*part.shape[:-1], *shape) for part in parts], axis=-2)

    return jax.tree.map(join, *leaves)


def product(module: Module, x: jax.Array) -> jax.Array:
    """x [..., D] times a fused kernel [D, ...], with its bias: [..., ...] in x's dtype."""
    y = quantized.product(x, module["kernel"], x.dtype)
    return y + module["bias"].astype(y.dtype) if "bias" in module else y
