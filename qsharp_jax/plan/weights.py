"""Counts of a model's weights and of their bytes, from abstract parameters."""

import math
from typing import Any

import jax

from qsharp_jax.models import moe
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import Params
from qsharp_jax.plan.job import chip_bytes


def weights_per_token(params: Params, trunk: DecoderConfig, tokens: int) -> int:
    """Count the weights that each of so many tokens is multiplied with, over all chips."""
    experts = trunk.experts_per_token if moe.are_few(trunk, tokens) else trunk.experts
    return moe.products(trunk, experts) + sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(params)
        if {"layers", "future"} & set(names := _names(path))
        and (names[-1] in ("kernel", "future") or names[-2:] == ["kernel", "values"])
    )


def layers_bytes(params: Params, *, here: Any = None, axis: str | None = None) -> int:
    """Count the bytes of the layers, over all chips or on one of a mesh's section, `here`.

    Args:
      axis: of the mesh; only leaves that it divides are counted.
    """
    leaves = [leaf for path, leaf in jax.tree.leaves_with_path(params) if "layers" in _names(path)]
    if axis:
        leaves = [leaf for leaf in leaves if axis in jax.tree.leaves(tuple(leaf.sharding.spec))]
    return chip_bytes(leaves, here) if here is not None else sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def turned(params: Params) -> list[Any]:
    """Return the weights that the decode loop reads in another order than they are stored in."""
    leaves = jax.tree.leaves_with_path(params)
    return [leaf for path, leaf in leaves if "query" in _names(path) or _names(path)[0] == "head"]


def _names(path: Any) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator=".").split(".")
