"""LoRA on a decoder: each block kernel W [D, N] becomes W + scale * A B, and only A and B are learned.

Hu et al., arXiv 2106.09685. A [L, D, R] and B [L, R, N] lie beside their kernels, so the scan over layers, the names
and the shardings are those of the trunk; without L where the layers are a list. The computation is x W + scale *
(x A) B: neither the sum of the matrices nor a gradient of W's size is ever made.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict

LEAVES = ("lora_a", "lora_b", "lora_scale")
LEARNED = ("lora_a", "lora_b")
KERNELS = ("kernel", "weight")  # of a block's module; "weight" is transposed


def add(key: jax.Array, params: Params, rank: int, alpha: float) -> Params:
    """The parameters of a model with a LoRA of zero effect: B is zero, A is random.

    Args:
      params: layers stacked, or a list, with weights transposed or not.
      rank: R.
      alpha: `scale` times the rank, so that the learning rate need not change with the rank.
    """
    flat = _flatten(params)
    kernels = [path for path in flat if "layers" in path and path[-1] in KERNELS]
    for number, path in enumerate(kernels):
        *layers, width, features = flat[path].shape
        if path[-1] == "weight":
            width, features = features, width
        draw = jax.random.normal(jax.random.fold_in(key, number), (*layers, width, rank), jnp.float32)
        flat[*path[:-1], "lora_a"] = draw * width**-0.5
        flat[*path[:-1], "lora_b"] = jnp.zeros((*layers, rank, features), jnp.float32)
        flat[*path[:-1], "lora_scale"] = jnp.full(layers, alpha / rank, jnp.float32)
    return _unflatten(flat)


def split(params: Params, heads: Collection[str] | None = None) -> tuple[Params, Params]:
    """The learned parameters (A, B, and the heads), and the frozen ones.

    Args:
      heads: names outside the decoder that are learned whole; by default, for a value model, all but "trunk".
    """
    heads = params.keys() - {"trunk"} if heads is None else heads
    flat = _flatten(params)
    learned = {path for path in flat if path[0] in heads or path[-1] in LEARNED}
    sides = [
        _unflatten({path: leaf for path, leaf in flat.items() if (path in learned) == side}) for side in (True, False)
    ]
    return sides[0], sides[1]


def join(learned: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    return _unflatten(_flatten(learned) | _flatten(frozen))


def part(x: jax.Array, leaves: Params) -> jax.Array:
    """The LoRA's addition to x [..., D] @ W of one layer: scale * (x A) B [..., N], in x's dtype.

    Args:
      leaves: the layer's, by the names of `LEAVES`.
    """
    a, b = (leaves[name].astype(x.dtype) for name in LEARNED)
    return (x @ a) * leaves["lora_scale"].astype(x.dtype) @ b


def merged(params: Params) -> Params:
    """The parameters with scale * A B added to every kernel, in its dtype, and without a LoRA."""
    flat = _flatten(params)
    for path in [path for path in flat if path[-1] == "lora_a"]:
        a, b, scale = (flat.pop((*path[:-1], name)) for name in LEAVES)
        update = jnp.matmul(a * scale[..., None, None], b, precision="highest")
        (kernel,) = (place for name in KERNELS if (place := (*path[:-1], name)) in flat)
        flat[kernel] = (flat[kernel] + (update.T if kernel[-1] == "weight" else update)).astype(flat[kernel].dtype)
    return _unflatten(flat)


def _flatten(params: Params) -> dict[tuple, Any]:
    """Leaves by path; a layer in a list has its number there."""

    def without_lists(node: Any) -> Any:
        if isinstance(node, list):
            node = dict(enumerate(node))
        return {name: without_lists(child) for name, child in node.items()} if isinstance(node, dict) else node

    return flatten_dict(without_lists(params))


def _unflatten(flat: dict[tuple, Any]) -> Params:
    def with_lists(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        node = {name: with_lists(child) for name, child in node.items()}
        return [node[number] for number in sorted(node)] if 0 in node else node

    return with_lists(unflatten_dict(flat))
