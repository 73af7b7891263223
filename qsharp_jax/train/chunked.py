"""Apply a head to the hidden states at the labeled positions of a batch: sums over them, or a number at each.

A head's arrays (logits [B, T, V], or a Q-type's columns [B, T, M, D]) can be larger than the model. In that case each
row's labeled positions are moved to its front and processed a few at a time, up to the last.
Shapes: B rows, T positions, D embed.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

NUMBERS = 1 << 27  # limit of a head's numbers at a time, over all devices: 512 MiB in float32

# (params, hidden [B, T, D], others [B, T], mask [B, T]) -> (a sum over the mask, a tree of other such sums)
Head = Callable[[Any, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]


def labeled_sum(
    head: Head, params: Any, hidden: jax.Array, others: Any, mask: jax.Array, *, width: int
) -> tuple[jax.Array, Any]:
    """`head(params, hidden, others, mask)`, with at most `NUMBERS` numbers of the head's arrays at a time.

    Only the first sum has a gradient, with respect to `params` and `hidden`.

    Args:
      hidden: [B, T, D].
      others: a tree of [B, T] arrays that the head needs.
      mask: [B, T], true at labeled positions.
      width: numbers in the head's arrays per position.
    """
    chex.assert_rank([hidden, mask], [3, 2])
    chex.assert_equal_shape_prefix([hidden, mask, *jax.tree.leaves(others)], 2)
    rows, length = mask.shape
    positions = max(NUMBERS // (rows * width), 1)
    if positions >= length:
        return head(params, hidden, others, mask)
    order = jnp.argsort(~mask, axis=1, stable=True)
    return _sum_of_parts(head, positions, params, hidden, others, mask, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_parts(head: Head, positions: int, params: Any, hidden: jax.Array, *rest: Any) -> tuple[jax.Array, Any]:
    parts = _parts(positions, hidden, *rest)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        def with_part(total: Any) -> Any:
            return jax.tree.map(jnp.add, total, head(params, *part))

        return jax.lax.cond(part[-1].any(), with_part, lambda total: total, total), None

    return jax.lax.scan(add, _zeros(head, params, *_first(parts)), parts)[0]


def _forward(head: Head, positions: int, params: Any, hidden: jax.Array, *rest: Any) -> tuple:
    """Compute the gradient part by part along with the sum, so that nothing is computed twice or stored."""
    parts = _parts(positions, hidden, *rest)
    gradient_fn = jax.value_and_grad(head, argnums=(0, 1), has_aux=True)

    def add(total: Any, part: Any) -> tuple[Any, jax.Array]:
        def with_part(total: Any) -> Any:
            sums, (gradient, of_hidden) = gradient_fn(params, *part)
            return jax.tree.map(jnp.add, total, (sums, gradient)), of_hidden

        return jax.lax.cond(part[-1].any(), with_part, lambda total: (total, jnp.zeros_like(part[0])), total)

    zeros = _zeros(head, params, *_first(parts)), jax.tree.map(jnp.zeros_like, params)
    (sums, gradient), of_hidden = jax.lax.scan(add, zeros, parts)
    order, length = rest[-1], hidden.shape[1]
    of_hidden = of_hidden.swapaxes(0, 1).reshape(len(hidden), -1, hidden.shape[-1])[:, :length]
    of_hidden = jnp.take_along_axis(of_hidden, jnp.argsort(order, axis=1)[..., None], axis=1)
    return sums, (gradient, of_hidden)


def _backward(head: Head, positions: int, gradients: tuple, cotangent: tuple) -> tuple:
    gradient, of_hidden = jax.tree.map(lambda leaf: (leaf * cotangent[0]).astype(leaf.dtype), gradients)
    return gradient, of_hidden, None, None, None


_sum_of_parts.defvjp(_forward, _backward)


def at_labeled(
    head: Callable[[Any, jax.Array, Any], jax.Array],
    params: Any,
    hidden: jax.Array,
    others: Any,
    mask: jax.Array,
    *,
    width: int,
) -> jax.Array:
    """[B, T] numbers `head(params, hidden, others)` at labeled positions, 0 elsewhere; arguments as in `labeled_sum`.

    When taken in parts, the head's arrays are recomputed for the gradient instead of stored.
    """
    chex.assert_rank([hidden, mask], [3, 2])
    chex.assert_equal_shape_prefix([hidden, mask, *jax.tree.leaves(others)], 2)
    rows, length = mask.shape
    positions = max(NUMBERS // (rows * width), 1)
    if positions >= length:
        return jnp.where(mask, head(params, hidden, others), 0)
    order = jnp.argsort(~mask, axis=1, stable=True)

    @jax.checkpoint
    def of_part(part: Any) -> jax.Array:
        hidden, others, mask = part
        return jnp.where(mask, head(params, hidden, others), 0)

    def of_any(part: Any) -> jax.Array:
        return jax.lax.cond(part[-1].any(), of_part, lambda part: jnp.zeros(part[-1].shape), part)

    numbers = jax.lax.map(of_any, _parts(positions, hidden, others, mask, order))  # [P, B, positions]
    numbers = numbers.swapaxes(0, 1).reshape(rows, -1)[:, :length]
    return jnp.take_along_axis(numbers, jnp.argsort(order, axis=1), axis=1)


def _parts(positions: int, hidden: jax.Array, others: Any, mask: jax.Array, order: jax.Array) -> tuple:
    """(hidden, others, mask) with each row's positions in `order`, cut into parts [P, B, positions, ...]."""
    count = -(-mask.shape[1] // positions)

    def cut(leaf: jax.Array) -> jax.Array:
        index = order.reshape(*order.shape, *(1,) * (leaf.ndim - 2))
        leaf = jnp.take_along_axis(leaf, index, axis=1)
        widths = [(0, 0), (0, count * positions - leaf.shape[1]), *[(0, 0)] * (leaf.ndim - 2)]
        return jnp.pad(leaf, widths).reshape(len(leaf), count, positions, *leaf.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, (hidden, others, mask))


def _first(parts: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], parts)


def _zeros(head: Head, *arguments: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(head, *arguments))
