"""A block's mixture of experts: a router sends each token to a few of many feed-forward networks.

As in Qwen 3 MoE (arXiv 2505.09388): y = sum_k w_k E_k(x) over the K experts with the largest w = softmax(x R), where
E(x) = (silu(x G) * (x U)) V. Shapes: B batch, T length, M = B T tokens, D embed, N experts, F hidden units of each.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from qsharp_jax.models import leaves, quantized, sharding
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.quantized import Weight

Params = dict[str, Any]
KERNELS = ("gate", "up", "down")


def feed_forward(params: Params, config: DecoderConfig, x: jax.Array) -> jax.Array:
    """The mixture's output [B, T, D] for x [B, T, D].

    Few tokens, as a decode step of a few rows has, read the weights of their own experts only. Otherwise every expert
    is computed for all tokens: its weights are read once, and none of them is copied or padded. While that is what
    takes the time it costs nothing; for long sequences it is N / K times the operations.

    Args:
      params: "router" [D, N], "gate" and "up" [N, D, F], "down" [N, F, D].
    """
    chex.assert_rank(x, 3)
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen = route(params, config, tokens)
    mix = _few_tokens if are_few(config, len(tokens)) else _all_experts
    kernels = [leaves.BLOCK[f"experts/{name}"].axes for name in KERNELS]
    mix = sharding.over_hidden_units(mix, *kernels, *((None, None),) * 3)
    with jax.named_scope("experts"):
        mixed = mix(*(params[name] for name in KERNELS), tokens, weights, chosen)
    return mixed.reshape(x.shape).astype(x.dtype)


def are_few(config: DecoderConfig, tokens: int) -> bool:
    """Return true if so many tokens have fewer experts than there are."""
    return tokens * config.experts_per_token < config.experts


def route(params: Params, config: DecoderConfig, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weights, float32 [M, K], and the numbers, [M, K], of the experts of tokens x [M, D]."""
    logits = jnp.matmul(x, params["router"].astype(x.dtype))
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), config.experts_per_token)
    if config.normalized_router:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights.astype(x.dtype).astype(jnp.float32), chosen  # rounded as in `transformers`


def _few_tokens(
    gate: Weight, up: Weight, down: Weight, x: jax.Array, weights: jax.Array, chosen: jax.Array
) -> jax.Array:
    """Compute the experts of each token, one after another; float32 [M, D].

    Gathering their kernels at once would write them to memory first: 20 times slower on a CPU.
    """

    @jax.checkpoint  # else the gradient would keep the kernels of all pairs
    def of_pair(_: None, pair: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        token, expert, weight = pair
        return None, _expert(gate[expert], up[expert], down[expert], x[token][None])[0] * weight

    tokens = jnp.repeat(jnp.arange(len(x)), chosen.shape[1])
    _, outputs = jax.lax.scan(of_pair, None, (tokens, chosen.reshape(-1), weights.reshape(-1)))
    return outputs.reshape(*chosen.shape, -1).sum(1)


def _all_experts(
    gate: Weight, up: Weight, down: Weight, x: jax.Array, weights: jax.Array, chosen: jax.Array
) -> jax.Array:
    """Compute one expert after another for all tokens, with the weight 0 where it was not chosen; float32 [M, D]."""
    rows = jnp.arange(len(x))[:, None]
    shares = jnp.zeros((len(x), gate.shape[0]), jnp.float32).at[rows, chosen].set(weights)

    @jax.checkpoint  # else the gradient would keep the hidden units of all experts
    def add(total: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        own_gate, own_up, own_down, share = expert
        return total + _expert(own_gate, own_up, own_down, x) * share[:, None], None

    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), (gate, up, down, shares.T))[0]


def _expert(gate: Weight, up: Weight, down: Weight, x: jax.Array) -> jax.Array:
    """E(x) [M, D] of one expert, in x's dtype."""
    gate, up, down = (quantized.dense(kernel, x.dtype) for kernel in (gate, up, down))
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def products(config: DecoderConfig, experts: int) -> int:
    """The number of weights of all layers' mixtures that a token is multiplied with in so many experts."""
    return config.layers * config.embed * (config.experts + 3 * experts * config.mlp)
