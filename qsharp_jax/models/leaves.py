"""The table of parameter leaves: each leaf's logical axes, initializer and tensor in a Hugging Face checkpoint.

The abstract tree and `init` (`decoder.py`, `value.py`), the shardings (`sharding.py`), the optimizer's decay mask and
the names in folders (`hf/names.py`) are derived from it. To add a leaf, add its entry here and the line that uses it.
"""

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from qsharp_jax.models import quantized
from qsharp_jax.models.config import DecoderConfig

Axes = tuple[str | None, ...]  # one logical axis per dimension; None is never divided
# (key, shape, config) -> float32 array
Init = Callable[[jax.Array, tuple[int, ...], DecoderConfig], jax.Array]


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a leaf, or of one layer of it, in a checkpoint.

    PyTorch's `Linear` is stored as [out, in]; GPT-2's `Conv1D` as [in, out].
    """

    # the tensor's name, with {} for the layer. With {{}} each index of the leaf's first axis has a tensor of its own,
    # named by the index
    name: str
    transposed: bool = False  # the tensor's axes are the leaf's in reverse
    # axis, part, parts: the leaf is this one of several parts of one axis of the tensor, 0 or -1. Parts are logical
    # axes in the tables, and lengths after `sized`.
    axis: int = -1
    part: int = 0
    parts: tuple[str | int, ...] = ()

    def sized(self, sizes: Mapping[str, int]) -> "Place":
        """The place with the lengths of its parts, from those of the logical axes."""
        return dataclasses.replace(self, parts=tuple(sizes[str(part)] for part in self.parts))

    @property
    def offset(self) -> int:
        """The leaf's first index on the tensor's axis."""
        return sum(map(int, self.parts[: self.part]))

    def tensors(self, shape: tuple[int, ...], layer: int | None = None) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the tensors that hold the leaf, or one layer of it, of the given shape."""
        name = self.name.format(layer)
        if "{}" not in name:
            return {name: self.stored_shape(shape)}
        return {name.format(number): self.stored_shape(shape[1:]) for number in range(shape[0])}

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, from the leaf's."""
        stored = list(shape[::-1] if self.transposed else shape)
        if self.parts:
            stored[self.axis] = sum(map(int, self.parts))
        return tuple(stored)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter."""

    axes: Axes  # logical axes, without the leading layers axis of stacked leaves
    init: Init | None = None  # draws the initial value; None for leaves that the training code creates itself
    # (config) -> True if a decoder of this config has the leaf
    used: Callable[[DecoderConfig], bool] = lambda config: True
    # gpt2, llama: its place in checkpoints of GPT-2, and of Llama and its relatives, unless `RELATIVES` has another;
    # None where the family has none
    gpt2: Place | None = None
    llama: Place | None = None

    @property
    def decays(self) -> bool:
        """True for matrices: norms, biases and the like have no weight decay."""
        return len(self.axes) > 1

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[axis] for axis in self.axes if axis is not None)


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
    """Lengths of the logical axes of a decoder's leaves."""
    return {
        "vocab": config.vocab_size,
        "positions": config.max_positions,
        "embed": config.embed,
        "width": config.embed,  # of vectors as wide as the residual stream, which are never divided
        "heads": config.heads * config.head_dim,
        "kv": config.kv_heads * config.head_dim,
        "head_dim": config.head_dim,
        "mlp": config.mlp,
        "experts": config.experts,
    }


# --- Initializers ---------------------------------------------------------------------------------------------------


def _zeros(key: jax.Array, shape: tuple[int, ...], config: DecoderConfig) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def _unit(key: jax.Array, shape: tuple[int, ...], config: DecoderConfig) -> jax.Array:
    """The scale of a norm that does not scale."""
    return jnp.full(shape, 0.0 if config.norm == "rms_plus_one" else 1.0, jnp.float32)


def _half(key: jax.Array, shape: tuple[int, ...], config: DecoderConfig) -> jax.Array:
    return jnp.full(shape, 0.5, jnp.float32)


def _normal(key: jax.Array, shape: tuple[int, ...], config: DecoderConfig) -> jax.Array:
    return nn.initializers.normal(config.embed**-0.5)(key, shape, jnp.float32)


def _kernel(key: jax.Array, shape: tuple[int, ...], config: DecoderConfig) -> jax.Array:
    return _scaled(1.0, key, shape)


def _residual_kernel(key: jax.Array, shape: tuple[int, ...], config: DecoderConfig) -> jax.Array:
    """Keep the residual stream's initial variance independent of depth."""
    return _scaled(1 / (2 * config.layers), key, shape)


def _scaled(scale: float, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    experts = tuple(range(len(shape) - 2))  # each has a kernel of its own
    return nn.initializers.variance_scaling(scale, "fan_in", "normal", batch_axis=experts)(key, shape, jnp.float32)


# --- The table ------------------------------------------------------------------------------------------------------


def _gpt2(name: str, part: int = 0, parts: tuple[str, ...] = ()) -> Place:
    return Place(f"transformer.h.{{}}.{name}", part=part, parts=parts)


def _llama(name: str) -> Place:
    return Place(f"model.layers.{{}}.{name}")


def _linear(name: str, part: int = 0, parts: tuple[str, ...] = ()) -> Place:
    return Place(f"model.layers.{{}}.{name}.weight", transposed=True, axis=0, part=part, parts=parts)


def _expert(name: str) -> Place:
    return Place(f"model.layers.{{}}.mlp.experts.{{{{}}}}.{name}.weight", transposed=True, axis=0)


_QKV = ("heads", "kv", "kv")
_LM_HEAD = Place("lm_head.weight", transposed=True)

# fmt: off
# The leaves of one block. A module's kernel comes first: its random key depends on its place among the leaves.
BLOCK: dict[str, Leaf] = {
    "attention_norm/scale": Leaf(("width",), _unit, gpt2=_gpt2("ln_1.weight"), llama=_llama("input_layernorm.weight")),
    "attention_norm/bias": Leaf(("width",), _zeros, used=lambda c: c.norm == "layer", gpt2=_gpt2("ln_1.bias")),
    "query/kernel": Leaf(("embed", "heads"), _kernel,
        gpt2=_gpt2("attn.c_attn.weight", 0, _QKV), llama=_linear("self_attn.q_proj")),
    "query/bias": Leaf(("heads",), _zeros, used=lambda c: c.bias or c.qkv_bias,
        gpt2=_gpt2("attn.c_attn.bias", 0, _QKV), llama=_llama("self_attn.q_proj.bias")),
    "key/kernel": Leaf(("embed", "kv"), _kernel,
        gpt2=_gpt2("attn.c_attn.weight", 1, _QKV), llama=_linear("self_attn.k_proj")),
    "key/bias": Leaf(("kv",), _zeros, used=lambda c: c.bias or c.qkv_bias,
        gpt2=_gpt2("attn.c_attn.bias", 1, _QKV), llama=_llama("self_attn.k_proj.bias")),
    "value/kernel": Leaf(("embed", "kv"), _kernel,
        gpt2=_gpt2("attn.c_attn.weight", 2, _QKV), llama=_linear("self_attn.v_proj")),
    "value/bias": Leaf(("kv",), _zeros, used=lambda c: c.bias or c.qkv_bias,
        gpt2=_gpt2("attn.c_attn.bias", 2, _QKV), llama=_llama("self_attn.v_proj.bias")),
    "query_norm/scale": Leaf(("head_dim",), _unit, used=lambda c: c.qk_norm, llama=_llama("self_attn.q_norm.weight")),
    "query_norm/bias": Leaf(("head_dim",), _zeros, used=lambda c: c.qk_norm and c.norm == "layer"),
    "key_norm/scale": Leaf(("head_dim",), _unit, used=lambda c: c.qk_norm, llama=_llama("self_attn.k_norm.weight")),
    "key_norm/bias": Leaf(("head_dim",), _zeros, used=lambda c: c.qk_norm and c.norm == "layer"),
    "output/kernel": Leaf(("heads", "embed"), _residual_kernel,
        gpt2=_gpt2("attn.c_proj.weight"), llama=_linear("self_attn.o_proj")),
    "output/bias": Leaf(("width",), _zeros, used=lambda c: c.bias, gpt2=_gpt2("attn.c_proj.bias")),
    "attention_post_norm/scale": Leaf(("width",), _unit, used=lambda c: c.post_norms),
    "mlp_norm/scale": Leaf(("width",), _unit,
        gpt2=_gpt2("ln_2.weight"), llama=_llama("post_attention_layernorm.weight")),
    "mlp_norm/bias": Leaf(("width",), _zeros, used=lambda c: c.norm == "layer", gpt2=_gpt2("ln_2.bias")),
    "gate/kernel": Leaf(("embed", "mlp"), _kernel, used=lambda c: c.gated and not c.experts,
        llama=_linear("mlp.gate_proj")),
    "gate/bias": Leaf(("mlp",), _zeros, used=lambda c: c.gated and c.bias),
    "up/kernel": Leaf(("embed", "mlp"), _kernel, used=lambda c: not c.experts,
        gpt2=_gpt2("mlp.c_fc.weight"), llama=_linear("mlp.up_proj")),
    "up/bias": Leaf(("mlp",), _zeros, used=lambda c: c.bias, gpt2=_gpt2("mlp.c_fc.bias")),
    "down/kernel": Leaf(("mlp", "embed"), _residual_kernel, used=lambda c: not c.experts,
        gpt2=_gpt2("mlp.c_proj.weight"), llama=_linear("mlp.down_proj")),
    "down/bias": Leaf(("width",), _zeros, used=lambda c: c.bias, gpt2=_gpt2("mlp.c_proj.bias")),
    "mlp_post_norm/scale": Leaf(("width",), _unit, used=lambda c: c.post_norms),
    "experts/router": Leaf(("embed", "experts"), _kernel, used=lambda c: c.experts > 0, llama=_linear("mlp.gate")),
    "experts/gate": Leaf(("experts", "embed", "mlp"), _kernel, used=lambda c: c.experts > 0,
        llama=_expert("gate_proj")),
    "experts/up": Leaf(("experts", "embed", "mlp"), _kernel, used=lambda c: c.experts > 0, llama=_expert("up_proj")),
    "experts/down": Leaf(("experts", "mlp", "embed"), _residual_kernel, used=lambda c: c.experts > 0,
        llama=_expert("down_proj")),
}
# The leaves of a decoder outside its blocks.
OUTER: dict[str, Leaf] = {
    "embedding": Leaf(("vocab", "embed"), _normal,
        gpt2=Place("transformer.wte.weight"), llama=Place("model.embed_tokens.weight")),
    "positions": Leaf(("positions", "embed"), _normal, used=lambda c: c.positions == "learned",
        gpt2=Place("transformer.wpe.weight")),
    "token_shift": Leaf(("width",), _half, used=lambda c: c.token_shift),
    "final_norm/scale": Leaf(("width",), _unit,
        gpt2=Place("transformer.ln_f.weight"), llama=Place("model.norm.weight")),
    "final_norm/bias": Leaf(("width",), _zeros, used=lambda c: c.norm == "layer", gpt2=Place("transformer.ln_f.bias")),
    "head": Leaf(("embed", "vocab"), _normal, used=lambda c: not c.tied, gpt2=_LM_HEAD, llama=_LM_HEAD),
}
# A guide's head: a token classifier's for a V-type, a language model's for a Q-type.
V_HEAD: dict[str, Leaf] = {
    "head/kernel": Leaf(("embed", "outputs"), _zeros,
        gpt2=Place("classifier.weight", transposed=True), llama=Place("score.weight", transposed=True)),
    "head/bias": Leaf(("outputs",), _zeros, gpt2=Place("classifier.bias"), llama=Place("score.bias")),
}
Q_HEAD: dict[str, Leaf] = {
    "head/kernel": Leaf(("embed", "outputs"), _zeros, gpt2=_LM_HEAD, llama=_LM_HEAD),
}
# Places of leaves in families whose checkpoints are otherwise Llama's, by family.
RELATIVES: dict[str, dict[str, Place]] = {
    "gemma3_text": {
        "attention_post_norm/scale": _llama("post_attention_layernorm.weight"),
        "mlp_norm/scale": _llama("pre_feedforward_layernorm.weight"),
        "mlp_post_norm/scale": _llama("post_feedforward_layernorm.weight"),
    },
    "phi3": {
        "query/kernel": _linear("self_attn.qkv_proj", 0, _QKV),
        "key/kernel": _linear("self_attn.qkv_proj", 1, _QKV),
        "value/kernel": _linear("self_attn.qkv_proj", 2, _QKV),
        "gate/kernel": _linear("mlp.gate_up_proj", 0, ("mlp", "mlp")),
        "up/kernel": _linear("mlp.gate_up_proj", 1, ("mlp", "mlp")),
    },
}
# Leaves that exist only during training: heads of the future-token loss, a policy's value head.
TRAINED_BESIDE: dict[str, Leaf] = {
    "future": Leaf((None, "embed", "vocab")),
    "value_head/kernel": Leaf(("embed", None)),
    "value_head/bias": Leaf((None,)),
}
# fmt: on


def flipped(place: Place) -> Place:
    """The place of a leaf whose axes are in reverse."""
    return dataclasses.replace(place, transposed=not place.transposed)


def _transposed(leaf: Leaf) -> Leaf:
    """The entry of a matrix that is stored [out, in] instead of [in, out]."""
    gpt2, llama = (place and flipped(place) for place in (leaf.gpt2, leaf.llama))
    return dataclasses.replace(leaf, axes=leaf.axes[::-1], gpt2=gpt2, llama=llama)


_KERNELS = {path.removesuffix("kernel"): leaf for path, leaf in BLOCK.items() if path.endswith("/kernel")}
# The leaves of decoding on a CPU (`cpu_form.py`), which replace those that they are derived from.
TRANSPOSED_BLOCK = {f"{module}weight": _transposed(kernel) for module, kernel in _KERNELS.items()}
TRANSPOSED_OUTER = {"head_weight": _transposed(OUTER["head"])}
# The leaves of decoding on a GPU (`gpu_form.py`).
FUSED_BLOCK = {
    "qkv/kernel": Leaf(("embed", "kv", None, None)),
    "qkv/bias": Leaf(("kv", None, None)),
    "gate_up/kernel": Leaf(("embed", None, "mlp")),
    "gate_up/bias": Leaf((None, "mlp")),
}
# LoRA leaves beside a block's kernel: A has the kernel's input axis, B its output axis.
_LORA_A = {f"{module}lora_a": Leaf((kernel.axes[0], None)) for module, kernel in _KERNELS.items()}
_LORA_B = {f"{module}lora_b": Leaf((None, kernel.axes[1])) for module, kernel in _KERNELS.items()}
_LORA = _LORA_A | _LORA_B | {f"{module}lora_scale": Leaf(()) for module in _KERNELS}
_ALL = ChainMap(BLOCK, OUTER, V_HEAD, TRAINED_BESIDE, TRANSPOSED_BLOCK, TRANSPOSED_OUTER, FUSED_BLOCK, _LORA)


# --- Reading the table ----------------------------------------------------------------------------------------------


def tree(table: Mapping[str, Leaf], config: DecoderConfig) -> dict[str, Any]:
    """The entries that a decoder of this config has, nested like its parameters."""
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in table.items() if leaf.used(config)})


def find(path: tuple) -> Leaf:
    """The entry of a leaf, from a path whose last names are those of the table; raises a ValueError without one.

    The two parts of a quantized leaf have its entry.
    """
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if names[-1] in quantized.PARTS:
        names = names[:-1]
    for key in ("/".join(names[-2:]), names[-1]):
        if key in _ALL:
            return _ALL[key]
    raise ValueError(f"parameter {'.'.join(names)} has no entry in the table; add one to models/leaves.py")
