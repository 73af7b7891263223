"""One decoder for GPT-2 and for Llama/Qwen: Linen leaves, composed by plain functions.

Shapes: B batch, T length, D embed, H heads, G kv heads, E head_dim, V vocabulary, L layers.
`Block` computes everything but attention, which its caller passes in as `attend(query, key, value)`: causal over a
whole sequence here, over a cache in `kv_cache.py`. It knows nothing about values, sampling or files.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from qsharp_jax.models import attention, lora, memory, sharding
from qsharp_jax.models.attention import Attention
from qsharp_jax.models.config import DecoderConfig

Params = dict[str, Any]
Remat = Literal["none", "dots", "full"]
# attend(query [B, T, H, E], key [B, T, G, E], value [B, T, G, E]) -> (attended [B, T, H, E], whatever is to be kept)
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


class Projection(nn.Module):
    """A product with the leaf "kernel" [in, out], or with "weight" [out, in] in its place, see `unstack`; and the bias.

    Computed in the inputs' dtype; with the LoRA's part where the layer has one (`lora.py`).
    """

    features: int
    bias: bool
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.has_variable("params", "weight"):
            y = _from_left(self.get_variable("params", "weight").astype(x.dtype), x, x.dtype)
        else:
            init = nn.initializers.variance_scaling(self.scale, "fan_in", "normal", dtype=jnp.float32)
            y = product(x, self.param("kernel", init, (x.shape[-1], self.features)), x.dtype)
            y = checkpoint_name(y, "product")
        if self.has_variable("params", "lora_a"):
            y = y + lora.part(x, {name: self.get_variable("params", name) for name in lora.LEAVES})
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(y.dtype)
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """x [..., D] @ kernel [D, N] in x's dtype, whatever the kernel's, as [..., N] of a dtype.

    The gradient's products take operands of x's dtype too, and the kernel's gradient is not rounded to it: devices and
    parts of a batch add theirs up in the kernel's own.
    """
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=dtype)


def _product_forward(x: jax.Array, kernel: jax.Array, dtype: Any) -> tuple:
    return product(x, kernel, dtype), (x, kernel)


def _product_backward(dtype: Any, kept: tuple, cotangent: jax.Array) -> tuple:
    x, kernel = kept
    cotangent = cotangent.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    x_cotangent = jax.lax.dot_general(cotangent, kernel.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
    return x_cotangent, jax.lax.dot_general(x, cotangent, ((rows, rows), ((), ())), preferred_element_type=kernel.dtype)


product.defvjp(_product_forward, _product_backward)


def _from_left(weight: jax.Array, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[..., out] from a weight [out, in], the left factor of the product, and x [..., in].

    XLA's library for CPUs multiplies a few rows by a matrix about twice as fast in this order as with the matrix on the
    right, in either orientation.
    """
    y = jax.lax.dot_general(weight, x, (((1,), (x.ndim - 1,)), ((), ())), preferred_element_type=dtype)
    return jnp.moveaxis(y, 0, -1)


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
        query = Projection(c.heads * c.head_dim, qkv_bias, name="query")(h)
        key = Projection(c.kv_heads * c.head_dim, qkv_bias, name="key")(h)
        value = Projection(c.kv_heads * c.head_dim, qkv_bias, name="value")(h)
        query = query.reshape(batch, length, c.heads, c.head_dim)
        key = key.reshape(batch, length, c.kv_heads, c.head_dim)
        value = value.reshape(batch, length, c.kv_heads, c.head_dim)
        if c.qk_norm:
            query, key = _norm(c, "query_norm")(query), _norm(c, "key_norm")(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        attended, kept = attend(query, key, value)
        attended = attended.reshape(batch, length, c.heads * c.head_dim).astype(c.compute_dtype)
        x = x + Projection(c.embed, c.bias, residual_scale, name="output")(attended)

        h = _norm(c, "mlp_norm")(x)
        up = Projection(c.mlp, c.bias, name="up")(h)
        if c.activation == "swiglu":
            h = jax.nn.silu(Projection(c.mlp, c.bias, name="gate")(h)) * up
        else:
            h = jax.nn.gelu(up, approximate=True)
        return x + Projection(c.embed, c.bias, residual_scale, name="down")(h), kept


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
    normal = nn.initializers.normal(config.embed**-0.5, jnp.float32)
    block, x = Block(config), jnp.zeros((1, 1, config.embed), jnp.float32)
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
        params["token_shift"] = jnp.full((config.embed,), 0.5, jnp.float32)
    if not config.tied:
        params["head"] = normal(head_key, (config.embed, config.vocab_size))
    return params


def abstract(config: DecoderConfig, dtype: str = "float32") -> Params:
    """The tree of `init`, all in one dtype, as `jax.ShapeDtypeStruct`s."""
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), config))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes)


def unstack(params: Params, *, transposed: bool = False) -> Params:
    """The decoding form: "layers" becomes a list with one tree a layer, so that no step slices a weight.

    Args:
      transposed: also put "weight" [out, in] in the place of each layer's "kernel" [in, out], and "head_weight" [V, D]
        in that of "head" [D, V]. It is the faster form on CPUs, see `_from_left`.
    """
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    params = params | {"layers": [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)]}
    if not transposed:
        return params
    made = {name: leaf for name, leaf in params.items() if name != "head"}
    if "head" in params:
        made["head_weight"] = params["head"].T
    made["layers"] = [{name: _transposed(leaves) for name, leaves in layer.items()} for layer in params["layers"]]
    return made


def transposed_here() -> bool:
    """Whether models are decoded in the transposed form on the default device."""
    return memory.default_device().platform == "cpu"


def positions_last(params: Params, rows: int) -> bool:
    """Whether the caches of so many rows keep the keys' positions last, see `kv_cache.attend`.

    Where the weights are in the form for CPUs; with one row, whose dimension XLA leaves out, it is far slower.
    """
    return is_transposed(params) and rows > 1


def is_transposed(params: Params) -> bool:
    """Whether the weights are [out, in], see `unstack`."""
    return isinstance(params.get("layers"), list) and "weight" in params["layers"][0]["output"]


def _transposed(leaves: Params) -> Params:
    """A module's leaves with "weight" in the place of "kernel", if it has one."""
    return {
        "weight" if name == "kernel" else name: leaf.T if name == "kernel" else leaf for name, leaf in leaves.items()
    }


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
    if is_transposed(params):
        head = params["embedding"] if config.tied else params["head_weight"]
        # With its rows as a matrix's only dimension XLA would turn the product round again.
        y = _from_left(head.astype(config.compute_dtype), hidden[..., None, :], jnp.float32)
        return y[..., 0, :]
    head = params["embedding"].T if config.tied else params["head"]
    return product(hidden, head, jnp.float32)


def previous_tokens(tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """[B, T]: the token before each within its own segment, -1 at a segment's first."""
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.pad(jnp.where(same, tokens[:, :-1], -1), ((0, 0), (1, 0)), constant_values=-1)


def _rematerialised(run_block: Callable, remat: Remat) -> Callable:
    if remat == "none":
        return run_block
    policies = {
        # The products with weights are kept; what lies between them, attention's scores above all, is done again.
        "dots": jax.checkpoint_policies.save_only_these_names("product"),
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
    attend_by: Attention = "xla",
    packed: bool = True,
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
      attend_by, packed: how attention is computed, and whether rows have several segments, see `attention.make`.

    Returns:
      hidden [B, T, D], and with `keep_kv` a (keys, values) pair of [B, T, G, E] a layer (stacked, or a list).
    """
    chex.assert_rank([tokens, segments, positions], 2)
    chex.assert_equal_shape([tokens, segments, positions])
    block, turn = Block(config), rotation(positions, config)
    within_segments = attention.make(attend_by, segments, packed=packed)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
        return within_segments(query, key, value), (key, value) if keep_kv else None

    def run_block(x: jax.Array, layer: Params) -> tuple[jax.Array, Any]:
        layer = sharding.gather_weights(layer, config)
        x, kept = block.apply({"params": layer}, x, turn, attend)
        return sharding.constrain_sequences(x), kept

    x = embed(params, config, tokens, previous_tokens(tokens, segments), positions)
    x = sharding.constrain_sequences(sharding.constrain_looked_up(x))
    if isinstance(params["layers"], list):
        kept = []
        for layer in params["layers"]:
            x, pair = run_block(x, layer)
            kept.append(pair)
    else:
        # Unrolled where all is kept: a loop's step would copy what it keeps into arrays of all layers, and out of them.
        x, kept = jax.lax.scan(_rematerialised(run_block, remat), x, params["layers"], unroll=remat == "none")
    return normalise(params, config, x), kept
