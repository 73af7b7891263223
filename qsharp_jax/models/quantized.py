"""Decoding in 8 or 4 bits: weights as whole numbers, and a scale for each output channel or for groups of its inputs.

W[d, n] is approximated by values[d, n] * scales[g, n], with g the group of input d; the largest |W| of a group has the
value 127, or in 4 bits -8, and the scale its sign. "int8" has one group per output channel. "int4" has groups of
`GROUPS` inputs; the embedding, the head and the kernels of experts stay in 8 bits. Norms, biases, routers and a guide's
head are not quantized.
Keys and values of a model with quantized weights are rounded to 8 bits, with a scale for each token and kv head. Scales
are powers of two, so that what is rounded is exact in bfloat16, and rounding it again changes nothing: it may be stored
in 8 bits, or not, and every program sees the same numbers.
Shapes: D inputs, N outputs, G groups of S inputs each; E head_dim.
"""

import functools
from typing import Any, TypeAlias

import chex
import flax.struct
import jax
import jax.numpy as jnp

from qsharp_jax.system.errors import UserError

GROUPS = (128, 32)  # inputs that share a scale in 4 bits: the first that divides them
_EXTREME = {8: 127, 4: -8}  # the value of a group's largest weight; 4 bits would have 15 values without -8
_OF_EXPERTS = ("gate", "up", "down")


class Quantized(flax.struct.PyTreeNode):
    """A weight as whole numbers and scales, with the same axes; the scales' are 1 or G long where inputs are."""

    values: Any  # int8 or int4, [..., D, N] or with other orders of axes
    scales: Any  # float32, [..., G, N] likewise

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def T(self) -> "Quantized":  # noqa: N802
        return jax.tree.map(jnp.transpose, self)

    def __getitem__(self, index: Any) -> "Quantized":
        """Index axes that inputs are not on."""
        return jax.tree.map(lambda leaf: leaf[index], self)


Weight: TypeAlias = jax.Array | Quantized
PARTS = ("values", "scales")  # of a `Quantized`, the last name of their paths


def is_quantized(node: Any) -> bool:
    """Return true for a `Quantized`; as `is_leaf` of `jax.tree.map`."""
    return isinstance(node, Quantized)


@functools.partial(jax.jit, static_argnames=("bits", "axis", "group"))
def quantize(weight: jax.Array, *, bits: int, axis: int = -2, group: int | None = None) -> Quantized:
    """Round a weight to whole numbers of 8 or 4 bits.

    Args:
      weight: [..., D, N].
      axis: of its inputs.
      group: number S of inputs that share a scale, which divides D; by default all.
    """
    axis %= weight.ndim
    size = weight.shape[axis]
    group = size if group is None else group
    chex.assert_is_divisible(size, group)
    parts = weight.astype(jnp.float32).reshape(*weight.shape[:axis], size // group, group, *weight.shape[axis + 1 :])
    low, high = parts.min(axis + 1, keepdims=True), parts.max(axis + 1, keepdims=True)
    scales = jnp.where(-low > high, low, high) / _EXTREME[bits]
    values = jnp.round(parts / jnp.where(scales == 0, 1, scales)).reshape(weight.shape)
    values = jnp.clip(values, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return Quantized(values.astype(f"int{bits}"), scales.squeeze(axis + 1))


def quantize_like(like: Quantized, weight: jax.Array) -> Quantized:
    """Round a weight to whole numbers as in an abstract result, and lay it out alike."""
    axis = next(axis for axis, size in enumerate(like.shape) if like.scales.shape[axis] != size)
    group = like.shape[axis] // like.scales.shape[axis]
    quantizer = _quantizer(jnp.iinfo(like.values.dtype).bits, axis, group, like.values.sharding, like.scales.sharding)
    return quantizer(weight)


@functools.lru_cache
def _quantizer(bits: int, axis: int, group: int, *shardings: Any) -> Any:
    return jax.jit(functools.partial(quantize, bits=bits, axis=axis, group=group), out_shardings=Quantized(*shardings))


def dense(weight: Weight, dtype: Any) -> jax.Array:
    """A weight as an array of a dtype, in which values are multiplied by scales."""
    if not isinstance(weight, Quantized):
        return weight.astype(dtype)
    values, scales = weight.values.astype(dtype), weight.scales.astype(dtype)
    for axis, (size, groups) in enumerate(zip(values.shape, scales.shape, strict=True)):
        if 1 < groups < size:
            parts = values.reshape(*values.shape[:axis], groups, -1, *values.shape[axis + 1 :])
            return (parts * jnp.expand_dims(scales, axis + 1)).reshape(values.shape)
    return values * scales


def product(x: jax.Array, weight: Weight, dtype: Any) -> jax.Array:
    """x [..., D] times a weight [D, ...], computed in x's dtype: [..., ...] of the given dtype.

    The scales of whole channels multiply the result, so that a device reads the weight as whole numbers. Only weights
    [D, N] that are not quantized have a gradient.
    """
    if not isinstance(weight, Quantized):
        return _product(x, weight, dtype)
    if weight.scales.shape[0] == 1:
        y = jnp.tensordot(x, weight.values.astype(x.dtype), axes=1, preferred_element_type=jnp.float32)
        return (y * weight.scales[0]).astype(dtype)
    return jnp.tensordot(x, dense(weight, x.dtype), axes=1, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """The product with a float weight.

    The gradient's products also have operands of x's dtype. The weight's gradient has the weight's dtype, in which it
    is summed over devices and parts of a batch.
    """
    return jnp.tensordot(x, weight.astype(x.dtype), axes=1, preferred_element_type=dtype)


def _product_forward(x: jax.Array, weight: jax.Array, dtype: Any) -> tuple:
    return _product(x, weight, dtype), (x, weight)


def _product_backward(dtype: Any, saved: tuple, cotangent: jax.Array) -> tuple:
    x, weight = saved
    cotangent = cotangent.astype(x.dtype)
    x_cotangent = jax.lax.dot_general(cotangent, weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
    # A product of two matrices: over two dimensions of rows at once, XLA on a CPU would transpose x first.
    rows, cotangents = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    return x_cotangent, jnp.einsum("md,mn->dn", rows, cotangents, preferred_element_type=weight.dtype)


_product.defvjp(_product_forward, _product_backward)


# --- Keys and values ------------------------------------------------------------------------------------------------


def in_8_bits(x: jax.Array) -> Quantized:
    """Keys or values [..., E] as whole numbers up to 127, and scales [..., 1], bfloat16 powers of two."""
    least = jnp.abs(x.astype(jnp.float32)).max(-1, keepdims=True) / 127
    # The next power of two: a float32 with the same exponent, or the next one if there is a mantissa.
    mantissa = jnp.uint32(0x7FFFFF)
    bits = jax.lax.bitcast_convert_type(least, jnp.uint32)
    scales = jax.lax.bitcast_convert_type((bits + mantissa) & ~mantissa, jnp.float32)
    values = jnp.round(x / jnp.where(scales == 0, 1, scales))
    return Quantized(values.astype(jnp.int8), scales.astype(jnp.bfloat16))


def rounded(x: jax.Array) -> jax.Array:
    """Keys or values [..., E] as `in_8_bits` stores them, in their dtype."""
    return dense(in_8_bits(x), x.dtype)


def scores(subscripts: str, query: jax.Array, keys: Weight) -> jax.Array:
    """The product of queries [B, G, N, E] and keys, by position [B, G, S, E] or otherwise, float32 [B, G, N, S]."""
    if not isinstance(keys, Quantized):
        return jnp.einsum(subscripts, query, keys, preferred_element_type=jnp.float32)
    y = jnp.einsum(subscripts, query, keys.values.astype(query.dtype), preferred_element_type=jnp.float32)
    return y * keys.scales.astype(jnp.float32).swapaxes(-1, -2)


def mixed(subscripts: str, weights: jax.Array, values: Weight, dtype: Any) -> jax.Array:
    """The sums of values [B, G, S, E] with weights [B, G, N, S], multiplied in a dtype, float32 [B, G, N, E]."""
    if isinstance(values, Quantized):
        weights, values = weights * values.scales.astype(jnp.float32).swapaxes(-1, -2), values.values.astype(dtype)
    return jnp.einsum(subscripts, weights.astype(dtype), values, preferred_element_type=jnp.float32)


# --- A model's weights ----------------------------------------------------------------------------------------------


def model(model: Any) -> Any:
    """A `LanguageModel` or `ValueModel`, its weights quantized as its decoder's config says."""
    how = getattr(model.config, "trunk", model.config).quantize
    return model.replace(params=tree(model.params, how))


def tree(params: Any, how: str) -> Any:
    """Parameters of a decoder or a value model, in any form, quantized; what is quantized already stays as it is.

    Args:
      how: "none", "int8" or "int4".

    Raises:
      UserError: for a width that has no groups of 4 bits.
    """
    if how == "none":
        return params
    return jax.tree.map_with_path(
        lambda path, leaf: leaf if is_quantized(leaf) else _leaf(path, leaf, how), params, is_leaf=is_quantized
    )


def _leaf(path: Any, leaf: jax.Array, how: str) -> Weight:
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    axis = _axis_of_inputs(names)
    if axis is None:
        return leaf
    if how == "int8" or "layers" not in names or "experts" in names:
        return quantize(leaf, bits=8, axis=axis)
    size = leaf.shape[axis]
    group = next((group for group in GROUPS if size % group == 0), None)
    if group is None:
        raise UserError(
            f"the model has {size} inputs of {names[-2]}, which groups of {GROUPS[-1]} do not divide, as int4 needs;"
            " use int8"
        )
    return quantize(leaf, bits=4, axis=axis, group=group)


def _axis_of_inputs(names: list[str]) -> int | None:
    """The axis of the inputs of a weight that is quantized, by its path; None for other leaves."""
    if "layers" in names:
        if names[-1] == "kernel" or (names[-2] == "experts" and names[-1] in _OF_EXPERTS):
            return -2
        return -1 if names[-1] == "weight" else None
    return {"embedding": -1, "head_weight": -1, "head": -2}.get(names[-1])


def cast(params: Any, dtype: Any) -> Any:
    """Parameters with matrices that are not quantized in another dtype."""
    return jax.tree.map(
        lambda leaf: leaf if is_quantized(leaf) or leaf.ndim < 2 else leaf.astype(dtype), params, is_leaf=is_quantized
    )
