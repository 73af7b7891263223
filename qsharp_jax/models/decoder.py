"""One decoder for GPT-2 and for Llama's relatives, as plain functions over its parameters.

Shapes: B batch, T length, D embed, H heads, G kv heads, E head_dim, V vocabulary, L layers. `leaves.py` lists the
parameters. `block` computes everything but attention, which its caller passes in as `attend(query, key, value)`: causal
over a whole sequence here, over a cache in decoding.
"""

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from qsharp_jax.models import attention, cpu_form, gpu_form, leaves, lora, moe, quantized, sharding
from qsharp_jax.models.attention import Attention, Make
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.leaves import Leaf
from qsharp_jax.models.quantized import Quantized

Params = dict[str, Any]
Remat = Literal["none", "dots", "full"]
# attend(query [B, T, H, E], key [B, T, G, E], value [B, T, G, E]) -> (attended [B, T, H, E], what the caller collects)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class LanguageModel(flax.struct.PyTreeNode):
    """Weights and their shape. `params["layers"]` is stacked, or a list of layers after `unstack`."""

    params: Params
    config: DecoderConfig = flax.struct.field(pytree_node=False)


# --- Parameters -----------------------------------------------------------------------------------------------------


class _Declared(nn.Module):
    """Declares a nested table of leaves as Linen parameters; Linen derives each key from the parameter's path."""

    table: Mapping[str, Any]
    config: DecoderConfig

    @nn.compact
    def __call__(self) -> None:
        sizes = leaves.axis_sizes(self.config)
        for name, entry in self.table.items():
            if isinstance(entry, Leaf):
                assert entry.init is not None
                self.param(name, entry.init, entry.shape(sizes), self.config)
            else:
                _Declared(entry, self.config, name=name)()


def init(key: jax.Array, config: DecoderConfig) -> Params:
    """Draw float32 parameters; every leaf below "layers" has the layers as its first axis."""
    embed_key, position_key, layers_key, head_key = jax.random.split(key, 4)
    keys = {"embedding": embed_key, "positions": position_key, "head": head_key}
    sizes = leaves.axis_sizes(config)

    def init_leaf(path: Any, leaf: Leaf) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.init is not None  # only leaves that the training code creates have none
        own_key = keys[name] if name in keys else jax.random.fold_in(key, zlib.crc32(name.encode()))
        return leaf.init(own_key, leaf.shape(sizes), config)

    def init_block(key: jax.Array) -> Params:
        return _Declared(leaves.tree(leaves.BLOCK, config), config).init(key)["params"]

    params = jax.tree.map_with_path(init_leaf, leaves.tree(leaves.OUTER, config))
    return params | {"layers": jax.vmap(init_block)(jax.random.split(layers_key, config.layers))}


def abstract(config: DecoderConfig, dtype: str = "float32") -> Params:
    """The tree of `init` as `jax.ShapeDtypeStruct` leaves of one dtype."""
    sizes = leaves.axis_sizes(config)

    def shapes(table: Mapping[str, Leaf], *first: int) -> Params:
        def shape(leaf: Leaf) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*first, *leaf.shape(sizes)), jnp.dtype(dtype))

        return jax.tree.map(shape, leaves.tree(table, config))

    return shapes(leaves.OUTER) | {"layers": shapes(leaves.BLOCK, config.layers)}


def first_layers(params: Params, count: int) -> Params:
    """Return the parameters, layers stacked, of the decoder that ends after its first `count` layers."""
    return params | {"layers": jax.tree.map(lambda leaf: leaf[:count], params["layers"])}


def unstack(params: Params, *, transposed: bool = False) -> Params:
    """The decoding form: "layers" becomes a list with one tree per layer, so that no step slices a weight.

    With `transposed`, the weights are also transposed by `cpu_form.transpose`.
    """
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    params = params | {"layers": [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)]}
    return cpu_form.transpose(params) if transposed else params


# --- Modules --------------------------------------------------------------------------------------------------------


def _norm(params: Params, name: str, config: DecoderConfig, x: jax.Array) -> Any:
    stored = params[name]
    if config.norm == "layer":
        # The fast variance E[x^2] - E[x]^2 loses digits needed to match other implementations.
        module: nn.Module = nn.LayerNorm(epsilon=config.norm_eps, dtype=config.compute_dtype, use_fast_variance=False)
    else:
        module = nn.RMSNorm(epsilon=config.norm_eps, dtype=config.compute_dtype)
    if config.norm == "rms_plus_one":
        stored = {"scale": 1 + stored["scale"].astype(jnp.float32)}
    with jax.named_scope(name):
        return module.apply({"params": stored}, x)


def _project(params: Params, name: str, x: jax.Array) -> jax.Array:
    """x [..., in] times a module's kernel [in, out], with its LoRA and bias if any: [..., out] in x's dtype."""
    module = params[name]
    with jax.named_scope(name):
        if "weight" in module:
            y = cpu_form.product(quantized.dense(module["weight"], x.dtype), x, x.dtype)
        else:
            y = checkpoint_name(quantized.product(x, module["kernel"], x.dtype), "product")
        if "lora_a" in module:
            y = y + lora.part(x, module)
        if "bias" in module:
            y = y + module["bias"].astype(y.dtype)
    return y


@jax.named_scope("block")
def block(
    params: Params, config: DecoderConfig, x: jax.Array, rotation: jax.Array | None, attend: Attend
) -> tuple[jax.Array, Any]:
    """One layer: pre-norm attention and feed-forward, each added to the residual stream x [B, T, D].

    `rotation` is the layer's from `rotations`. Returns [B, T, D], and what `attend` collects.
    """
    batch, length = x.shape[:2]
    h = _norm(params, "attention_norm", config, x)
    query, key, value = _attention_inputs(params, config, h)
    if config.qk_norm:
        query, key = _norm(params, "query_norm", config, query), _norm(params, "key_norm", config, key)
    if rotation is not None:
        query, key = rotate(query, rotation), rotate(key, rotation)
    if config.query_scalar:  # attention itself divides by the root of the head's width
        query = query * (config.head_dim / config.query_scalar) ** 0.5
    if config.quantize != "none":
        key, value = quantized.rounded(jnp.stack([key, value]))  # together, which is half as many kernels on a GPU
    attended, collected = attend(query, key, value)
    attended = attended.reshape(batch, length, config.heads * config.head_dim).astype(config.compute_dtype)
    h = _project(params, "output", attended)
    x = x + (_norm(params, "attention_post_norm", config, h) if config.post_norms else h)

    h = _norm(params, "mlp_norm", config, x)
    h = moe.feed_forward(params["experts"], config, h) if config.experts else _feed_forward(params, config, h)
    return x + (_norm(params, "mlp_post_norm", config, h) if config.post_norms else h), collected


def _feed_forward(params: Params, config: DecoderConfig, h: jax.Array) -> jax.Array:
    gate, up = _mlp_inputs(params, h)
    return _project(params, "down", _activation(config.activation, gate, up))


@functools.partial(jax.checkpoint, static_argnums=0)
def _activation(name: str, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """The hidden units after the activation; a gradient keeps its arguments and nothing between."""
    if gate is None:
        return jax.nn.gelu(up, approximate=True)
    if name == "swiglu":
        return jax.nn.silu(gate) * up
    return jax.nn.gelu(gate, approximate=True) * up


def _attention_inputs(params: Params, config: DecoderConfig, h: jax.Array) -> tuple[jax.Array, ...]:
    """Query [B, T, H, E], key and value [B, T, G, E] of the normed h [B, T, D]."""
    if "qkv" in params:
        shared = config.heads // config.kv_heads
        parts: Iterable = jnp.split(gpu_form.product(params["qkv"], h), [shared, shared + 1], axis=3)
    else:
        parts = (_project(params, name, h) for name in ("query", "key", "value"))
    heads = zip(parts, (config.heads, config.kv_heads, config.kv_heads), strict=True)
    return tuple(part.reshape(*h.shape[:2], count, config.head_dim) for part, count in heads)


def _mlp_inputs(params: Params, h: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """The gate, None without one, and the hidden units, [B, T, mlp] each, of the normed h [B, T, D]."""
    if "gate_up" in params:
        both = gpu_form.product(params["gate_up"], h)
        return both[..., 0, :], both[..., 1, :]
    up = _project(params, "up", h)
    return _project(params, "gate", h) if "gate" in params else None, up


def rotations(positions: jax.Array, config: DecoderConfig) -> dict[str, jax.Array | None]:
    """Cosines and sines of rotary positions, float32 [2, B, T, 1, R/2] with R rotated dimensions, by `LayerKind.rope`.

    Layers without rotary positions have None.
    """
    return {rope: _rotation(positions, config, rope) for rope in dict.fromkeys(kind.rope for kind in config.kinds)}


def _rotation(positions: jax.Array, config: DecoderConfig, rope: str) -> jax.Array | None:
    if rope == "none":
        return None
    angles = positions[..., None, None].astype(jnp.float32) * _frequencies(config, rope)
    # The barrier keeps XLA from fusing the sines into each layer, which would compute them again for every head.
    return jax.lax.optimization_barrier(jnp.stack([jnp.cos(angles), jnp.sin(angles)]))


def _frequencies(config: DecoderConfig, rope: str) -> np.ndarray:
    """Radians per position for each pair of a head's rotated numbers, float32 [R/2], with the scaling.

    Computed on the host in float64: at position 100,000 a rounding error in the last digit is a large angle.
    """
    dims = config.rope_dims or config.head_dim
    theta = config.window_rope_theta if rope == "window" else config.rope_theta
    frequencies = theta ** (-np.arange(0, dims, 2) / dims)
    if rope == "window":
        return frequencies.astype(np.float32)
    if config.rope_scaling == "linear":
        return (frequencies / config.rope_factor).astype(np.float32)
    turns = config.rope_original_positions * frequencies / (2 * np.pi)  # in the context before the scaling
    unscaled = np.clip((turns - config.rope_low_freq) / (config.rope_high_freq - config.rope_low_freq), 0, 1)
    return (frequencies * (unscaled + (1 - unscaled) / config.rope_factor)).astype(np.float32)


def rotate(x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Rotary position embedding in the half-split convention of Llama checkpoints (Su et al., arXiv 2104.09864).

    Only the first R numbers of each head are rotated, where the rotation is of fewer than all.
    """
    cos, sin = rotation
    if (dims := 2 * cos.shape[-1]) < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :dims], rotation), x[..., dims:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# --- Composition ----------------------------------------------------------------------------------------------------


def embed(
    params: Params, config: DecoderConfig, tokens: jax.Array, previous: jax.Array, positions: jax.Array
) -> jax.Array:
    """The residual stream's input [B, T, D].

    Args:
      tokens: [B, T] ids.
      previous: [B, T] ids of the previous tokens, -1 where there is none (used by `token_shift` only).
      positions: [B, T] counted from each sequence's first token.
    """
    x = _looked_up(params, tokens)
    if config.scaled_embedding:
        x = x * jnp.asarray(config.embed**0.5, config.compute_dtype)  # rounded to that dtype, as in `transformers`
    if config.token_shift:
        shifted = _looked_up(params, jnp.maximum(previous, 0)) * params["token_shift"]
        x = x + jnp.where(previous[..., None] >= 0, shifted, 0)
    if config.positions == "learned":
        x = x + params["positions"][positions]
    return x.astype(config.compute_dtype)


def _looked_up(params: Params, tokens: jax.Array) -> jax.Array:
    """Rows [..., D] of the embedding, in its dtype; float32 if it is quantized."""
    rows = params["embedding"][tokens]
    return quantized.dense(rows, jnp.float32) if isinstance(rows, Quantized) else rows


def final_norm(params: Params, config: DecoderConfig, x: jax.Array) -> jax.Array:
    return _norm(params, "final_norm", config, x)


def logits(params: Params, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """Float32 next-token logits [..., V] from hidden states [..., D]."""
    if cpu_form.is_transposed(params):
        head = params["embedding"] if config.tied else params["head_weight"]
        # With a single dimension of rows, XLA would swap the product's operands back.
        head = quantized.dense(head, config.compute_dtype)
        return cpu_form.product(head, hidden[..., None, :], jnp.float32)[..., 0, :]
    head = params["embedding"].T if config.tied else params["head"]
    return quantized.product(hidden, head, jnp.float32)


def previous_tokens(tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """[B, T]: the previous token within the same segment, -1 at a segment's first."""
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.pad(jnp.where(same, tokens[:, :-1], -1), ((0, 0), (1, 0)), constant_values=-1)


def _rematerialized(run_block: Callable, remat: Remat) -> Callable:
    if remat == "none":
        return run_block
    policies = {
        # Products with weights are saved; what lies between them, mainly attention's scores, is recomputed.
        "dots": jax.checkpoint_policies.save_only_these_names("product"),
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    return jax.checkpoint(run_block, policy=policies[remat])


def _step(
    run_block: Callable, layers: Params, config: DecoderConfig, turns: dict[str, jax.Array | None], length: int
) -> tuple[Callable, Any]:
    """The step of a scan over stacked layers, and what is scanned: where layers differ, also window and rotation."""
    kinds = config.kinds
    if len(set(kinds)) == 1:
        window, rope = kinds[0]
        return lambda x, layer: run_block(x, layer, window, turns[rope]), layers
    some = next((table for table in turns.values() if table is not None), None)
    tables = None
    if some is not None:
        still = jnp.stack([jnp.ones_like(some[0]), jnp.zeros_like(some[0])])  # a rotation by no angle
        tables = jnp.stack([still if table is None else table for table in turns.values()])
    # A window of all layers stays an integer: attention by kernels has none, or only as a mask.
    differ = len({kind.window for kind in kinds}) > 1
    windows = jnp.array([kind.window or length for kind in kinds]) if differ else None
    ropes = jnp.array([list(turns).index(kind.rope) for kind in kinds])

    def step(x: jax.Array, scanned: tuple[Params, jax.Array | None, jax.Array]) -> tuple[jax.Array, Any]:
        layer, window, rope = scanned
        return run_block(x, layer, window if differ else kinds[0].window, None if tables is None else tables[rope])

    return step, (layers, windows, ropes)


def forward(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    *,
    keep_kv: bool = False,
    remat: Remat = "dots",
    attend_by: Attention | Make = "xla",
    packed: bool = True,
) -> tuple[jax.Array, Any]:
    """Normed hidden states of whole sequences under causal attention.

    Stacked layers are scanned; a list of layers is unrolled.

    Args:
      tokens: [B, T] ids.
      segments: [B, T], 0 at padding; tokens attend within their own segment only.
      positions: [B, T], counted from each segment's first token.
      keep_kv: also return every layer's keys and values.
      remat: what layers recompute for the gradient. "none": nothing; "dots": all but the products with weights;
        "full": everything, from each block's input.
      attend_by, packed: see `attention.make`.

    Returns:
      hidden [B, T, D], and with `keep_kv` a (keys, values) pair of [B, T, G, E] per layer (stacked, or a list).
    """
    chex.assert_rank([tokens, segments, positions], 2)
    chex.assert_equal_shape([tokens, segments, positions])
    turns = rotations(positions, config)
    within_segments = attention.make(attend_by, segments, packed=packed)

    def run_block(x: jax.Array, layer: Params, window: Any, turn: jax.Array | None) -> tuple[jax.Array, Any]:
        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
            return within_segments(query, key, value, window), (key, value) if keep_kv else None

        layer = sharding.gather_weights(layer, config)
        x, kv = block(layer, config, x, turn, attend)
        return sharding.constrain_sequences(x), kv

    x = embed(params, config, tokens, previous_tokens(tokens, segments), positions)
    x = sharding.constrain_sequences(sharding.constrain_looked_up(x))
    if isinstance(params["layers"], list):
        kv = []
        for layer, kind in zip(params["layers"], config.kinds, strict=True):
            step: Callable = functools.partial(run_block, window=kind.window, turn=turns[kind.rope])
            # Only with a LoRA are layers in a list trained.
            x, pair = (_rematerialized(step, remat) if "lora_a" in layer.get("query", {}) else step)(x, layer)
            kv.append(pair)
    else:
        step, scanned = _step(run_block, params["layers"], config, turns, tokens.shape[1])
        # Unrolled where everything is saved: a loop would copy what each step saves into arrays of all layers and back.
        x, kv = jax.lax.scan(_rematerialized(step, remat), x, scanned, unroll=remat == "none")
    return final_norm(params, config, x), kv
