"""One decoder for GPT-2 and for Llama/Qwen: Linen leaves, composed by plain functions.

Shapes: B batch, T length, D embed, H heads, G kv heads, E head_dim, V vocabulary, L layers.
`Block` computes everything but attention, which its caller passes in as `attend(query, key, value)`: causal over a
whole sequence here, over a cache in `kv_cache.py`. It knows nothing about values, sampling or files.
"""

from collections.abc import Callable
from typing import Any, Literal

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import sharding
from qsharp_jax.models.config import DecoderConfig

Params = dict[str, Any]
Remat = Literal["none", "dots", "full"]
# attend(query [B, T, H, E], key [B, T, G, E], value [B, T, G, E]) -> (attention [B, T, H, E], whatever is to be kept)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@flax.struct.dataclass
class LanguageModel:
    """Weights with the shape they belong to. `params["layers"]` is stacked, or a list after `unstack`."""

    params: Params
    config: DecoderConfig = flax.struct.field(pytree_node=False)


# --- Leaves ---------------------------------------------------------------------------------------------------------


def _norm(config: DecoderConfig, name: str | None = None) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(epsilon=config.norm_eps, dtype=config.compute_dtype, name=name)
    # The fast variance E[x^2] - E[x]^2 loses digits that parity with other programs needs.
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=config.compute_dtype, use_fast_variance=False, name=name)


def _projection(config: DecoderConfig, features: int, name: str, *, bias: bool, scale: float = 1.0) -> nn.Dense:
    init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
    return nn.Dense(features, use_bias=bias, dtype=config.compute_dtype, kernel_init=init, name=name)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, rotation: jax.Array | None, attend: Attend) -> tuple[jax.Array, Any]:
        c = self.config
        batch, length = x.shape[:2]
        residual_scale = 1 / (2 * c.layers)  # keeps the residual stream's variance independent of depth at the start

        h = _norm(c, "attention_norm")(x)
        qkv_bias = c.bias or c.qkv_bias
        query = _projection(c, c.heads * c.head_dim, "query", bias=qkv_bias)(h)
        key = _projection(c, c.kv_heads * c.head_dim, "key", bias=qkv_bias)(h)
        value = _projection(c, c.kv_heads * c.head_dim, "value", bias=qkv_bias)(h)
        query = query.reshape(batch, length, c.heads, c.head_dim)
        key = key.reshape(batch, length, c.kv_heads, c.head_dim)
        value = value.reshape(batch, length, c.kv_heads, c.head_dim)
        if c.qk_norm:
            query, key = _norm(c, "query_norm")(query), _norm(c, "key_norm")(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        attention, kept = attend(query, key, value)
        attention = attention.reshape(batch, length, c.heads * c.head_dim)
        x = x + _projection(c, c.embed, "output", bias=c.bias, scale=residual_scale)(attention)

        h = _norm(c, "mlp_norm")(x)
        up = _projection(c, c.mlp, "up", bias=c.bias)(h)
        if c.activation == "swiglu":
            h = jax.nn.silu(_projection(c, c.mlp, "gate", bias=c.bias)(h)) * up
        else:
            h = jax.nn.gelu(up, approximate=True)
        return x + _projection(c, c.embed, "down", bias=c.bias, scale=residual_scale)(h), kept


def rotation(positions: jax.Array, config: DecoderConfig) -> jax.Array | None:
    """Cosines and sines of rotary positions, float32 [2, B, T, 1, E/2]; None when positions are learned."""
    if config.positions != "rope":
        return None
    angles = positions[..., None, None].astype(jnp.float32) * _frequencies(config)
    # Kept from being fused into its users: each layer would compute the sines again, for every head.
    return jax.lax.optimization_barrier(jnp.stack([jnp.cos(angles), jnp.sin(angles)]))


def _frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians a position of each pair of a head's numbers, float32 [E/2], with Llama 3.1's scaling for long contexts.

    Computed on the host: at position 100,000 a power's last digit, which devices round as they like, is a large angle.
    """
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    turns = config.rope_original_positions * frequencies / (2 * np.pi)  # in the context of the first training
    kept = np.clip((turns - config.rope_low_freq) / (config.rope_high_freq - config.rope_low_freq), 0, 1)
    return np.float32(frequencies * (kept + (1 - kept) / config.rope_factor))


def rotate(x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Rotary position embedding in the half-split convention of Llama checkpoints (Su et al., arXiv 2104.09864)."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# --- Parameters -----------------------------------------------------------------------------------------------------


def init(key: jax.Array, config: DecoderConfig) -> Params:
    """Fresh float32 parameters; every leaf below "layers" has the layers as its first axis."""
    embed_key, position_key, layers_key, head_key = jax.random.split(key, 4)
    normal = nn.initializers.normal(config.embed**-0.5)
    block, x = Block(config), jnp.zeros((1, 1, config.embed))
    turn = rotation(jnp.zeros((1, 1), jnp.int32), config)

    def init_block(key: jax.Array) -> Params:
        return block.init(key, x, turn, lambda query, key, value: (query, None))["params"]

    params = {
        "embedding": normal(embed_key, (config.vocab_size, config.embed)),
        "layers": jax.vmap(init_block)(jax.random.split(layers_key, config.layers)),
        "final_norm": _norm(config).init(head_key, x)["params"],
    }
    if config.positions == "learned":
        params["positions"] = normal(position_key, (config.max_positions, config.embed))
    if config.token_shift:
        params["token_shift"] = jnp.full((config.embed,), 0.5)
    if not config.tied:
        params["head"] = normal(head_key, (config.embed, config.vocab_size))
    return params


def abstract(config: DecoderConfig, dtype: str = "float32") -> Params:
    """The tree of `init`, all in one dtype, as `jax.ShapeDtypeStruct`s."""
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), config))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes)


def unstack(params: Params) -> Params:
    """The decoding form: "layers" becomes a list with one tree a layer, so that no step slices a weight."""
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return params | {"layers": [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)]}


# --- Composition ----------------------------------------------------------------------------------------------------


def embed(
    params: Params, config: DecoderConfig, tokens: jax.Array, previous: jax.Array, positions: jax.Array
) -> jax.Array:
    """The residual stream's input [B, T, D].

    Args:
      tokens: [B, T] ids.
      previous: [B, T] ids of the token before each, -1 where there is none (used by `token_shift` only).
      positions: [B, T] counted from each sequence's first token.
    """
    x = params["embedding"][tokens]
    if config.token_shift:
        shifted = params["embedding"][jnp.maximum(previous, 0)] * params["token_shift"]
        x = x + jnp.where(previous[..., None] >= 0, shifted, 0)
    if config.positions == "learned":
        x = x + params["positions"][positions]
    return x.astype(config.compute_dtype)


def normalise(params: Params, config: DecoderConfig, x: jax.Array) -> jax.Array:
    """The final norm over hidden states [..., D]."""
    return _norm(config).apply({"params": params["final_norm"]}, x)


def logits(params: Params, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """Float32 next-token logits [..., V] from hidden states [..., D]."""
    head = params["embedding"].T if config.tied else params["head"]
    return jnp.matmul(hidden, head.astype(config.compute_dtype), preferred_element_type=jnp.float32)


def previous_tokens(tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """[B, T]: the token before each within its own segment, -1 at a segment's first."""
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.pad(jnp.where(same, tokens[:, :-1], -1), ((0, 0), (1, 0)), constant_values=-1)


def _rematerialised(run_block: Callable, remat: Remat) -> Callable:
    if remat == "none":
        return run_block
    policies = {
        # The products with weights are kept; what lies between them, attention's scores above all, is done again.
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    return jax.checkpoint(run_block, policy=policies[remat])


def forward(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    *,
    keep_kv: bool = False,
    remat: Remat = "dots",
) -> tuple[jax.Array, Any]:
    """Normed hidden states of whole sequences under causal attention.

    Stacked layers are scanned, with rematerialisation of each block as `remat` says; a list of layers is unrolled.

    Args:
      tokens: [B, T] ids.
      segments: [B, T], 0 at padding; tokens attend within their own segment only.
      positions: [B, T], counted from each segment's first token.
      keep_kv: also return every layer's keys and values.
      remat: what is done again for the gradient, of stacked layers. "none": nothing, all is kept; "dots": all but the
        products with weights; "full": all, from each block's input.

    Returns:
      hidden [B, T, D], and with `keep_kv` a (keys, values) pair of [B, T, G, E] a layer (stacked, or a list).
    """
    chex.assert_rank([tokens, segments, positions], 2)
    chex.assert_equal_shape([tokens, segments, positions])
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    mask = causal & (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    block, turn = Block(config), rotation(positions, config)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
        attention = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
        return attention, (key, value) if keep_kv else None

    def run_block(x: jax.Array, layer: Params) -> tuple[jax.Array, Any]:
        layer = sharding.gather_weights(layer, config)
        x, kept = block.apply({"params": layer}, x, turn, attend)
        return sharding.constrain_sequences(x), kept

    # The table stays divided by its width: each device looks up all rows' tokens in its part, and an all-to-all makes
    # whole rows of them. Gathered, the table and its float32 gradient would be whole on every device.
    x = sharding.constrain_sequences(embed(params, config, tokens, previous_tokens(tokens, segments), positions))
    if isinstance(params["layers"], list):
        kept = []
        for layer in params["layers"]:
            x, pair = run_block(x, layer)
            kept.append(pair)
    else:
        x, kept = jax.lax.scan(_rematerialised(run_block, remat), x, params["layers"])
    return normalise(params, config, x), kept
