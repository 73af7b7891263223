"""LoRA on a guide's trunk: each block kernel W [D, N] becomes W + scale * A B, and only A and B are learned.

Hu et al., arXiv 2106.09685. A [L, D, R] and B [L, R, N] lie beside their kernels, so the scan over layers, the names
and the shardings are those of the trunk. The computation is x W + scale * (x A) B: neither the sum of the matrices nor
a gradient of W's size is ever made.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict

LEAVES = ("lora_a", "lora_b", "lora_scale")
LEARNED = ("lora_a", "lora_b")


def add(key: jax.Array, params: Params, rank: int, alpha: float) -> Params:
    """The parameters of a value model, layers stacked, with a LoRA of zero effect: B is zero, A is random.

    Args:
      rank: R.
      alpha: `scale` times the rank, so that the learning rate need not change with the rank.
    """
    flat = flatten_dict(params)
    kernels = [path for path in flat if "layers" in path and path[-1] == "kernel"]
    for number, path in enumerate(kernels):
        layers, width, features = flat[path].shape
        draw = jax.random.normal(jax.random.fold_in(key, number), (layers, width, rank), jnp.float32)
        flat[*path[:-1], "lora_a"] = draw * width**-0.5
        flat[*path[:-1], "lora_b"] = jnp.zeros((layers, rank, features), jnp.float32)
        flat[*path[:-1], "lora_scale"] = jnp.full((layers,), alpha / rank, jnp.float32)
    return unflatten_dict(flat)


def split(params: Params) -> tuple[Params, Params]:
    """The learned parameters (A, B, and the heads, which are outside the trunk), and the frozen ones."""
    flat = flatten_dict(params)
    learned = {path for path in flat if path[0] != "trunk" or path[-1] in LEARNED}
    return tuple(
        unflatten_dict({path: leaf for path, leaf in flat.items() if (path in learned) == side})
        for side in (True, False)
    )


def join(learned: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    return unflatten_dict(flatten_dict(learned) | flatten_dict(frozen))


def part(x: jax.Array, leaves: Params) -> jax.Array:
    """The LoRA's addition to x [..., D] @ W of one layer: scale * (x A) B [..., N], in x's dtype.

    Args:
      leaves: the layer's, by the names of `LEAVES`.
    """
    a, b = (leaves[name].astype(x.dtype) for name in LEARNED)
    return (x @ a) * leaves["lora_scale"].astype(x.dtype) @ b


def merged(params: Params) -> Params:
    """The parameters with scale * A B added to every kernel, and without a LoRA."""
    flat = flatten_dict(params)
    for path in [path for path in flat if path[-1] == "lora_a"]:
        a, b, scale = (flat.pop((*path[:-1], name)) for name in LEAVES)
        kernel = (*path[:-1], "kernel")
        flat[kernel] = flat[kernel] + jnp.einsum("ldr,lrn->ldn", a * scale[:, None, None], b)
    return unflatten_dict(flat)
