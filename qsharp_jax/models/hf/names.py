"""Which tensor of a Hugging Face checkpoint holds which leaf of ours: a table a family, and nothing else.

Our kernels are [in, out], the weights that the transposed form has in their place [out, in]. A `Linear` of PyTorch is
stored [out, in]; GPT-2's `Conv1D` is stored [in, out], with query, key and value side by side in one tensor. Families:
"gpt2", "llama", "qwen2", "qwen3".
"""

import dataclasses
import re
from collections.abc import Mapping

import jax


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf, or one layer of a leaf, is stored.

    Attributes:
      name: of the tensor, with {} for the layer.
      transposed: the tensor's axes are those of the leaf in reverse.
      part, parts: the leaf is this one of several equal parts of the tensor's last axis.
    """

    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, from the leaf's."""
        shape = shape[::-1] if self.transposed else shape
        return (*shape[:-1], shape[-1] * self.parts)


def _linear(prefix: str, *leaves: str) -> dict[str, Place]:
    return {leaf: Place(f"{prefix}.{'weight' if leaf == 'kernel' else leaf}", leaf == "kernel") for leaf in leaves}


def _under(path: str, places: Mapping[str, Place]) -> dict[str, Place]:
    return {f"{path}/{leaf}": place for leaf, place in places.items()}


# Llama, and what Qwen 2 and 3 add to it. Only leaves that a model has are looked up.
_LLAMA = {
    "embedding": Place("model.embed_tokens.weight"),
    "final_norm/scale": Place("model.norm.weight"),
    "head": Place("lm_head.weight", transposed=True),
    "layers/attention_norm/scale": Place("model.layers.{}.input_layernorm.weight"),
    "layers/query_norm/scale": Place("model.layers.{}.self_attn.q_norm.weight"),
    "layers/key_norm/scale": Place("model.layers.{}.self_attn.k_norm.weight"),
    "layers/mlp_norm/scale": Place("model.layers.{}.post_attention_layernorm.weight"),
    **_under("layers/query", _linear("model.layers.{}.self_attn.q_proj", "kernel", "bias")),
    **_under("layers/key", _linear("model.layers.{}.self_attn.k_proj", "kernel", "bias")),
    **_under("layers/value", _linear("model.layers.{}.self_attn.v_proj", "kernel", "bias")),
    **_under("layers/output", _linear("model.layers.{}.self_attn.o_proj", "kernel")),
    **_under("layers/gate", _linear("model.layers.{}.mlp.gate_proj", "kernel")),
    **_under("layers/up", _linear("model.layers.{}.mlp.up_proj", "kernel")),
    **_under("layers/down", _linear("model.layers.{}.mlp.down_proj", "kernel")),
}


def _norm(prefix: str) -> dict[str, Place]:
    return {"scale": Place(f"{prefix}.weight"), "bias": Place(f"{prefix}.bias")}


def _conv(prefix: str, part: int = 0, parts: int = 1) -> dict[str, Place]:
    names = {"kernel": "weight", "bias": "bias"}
    return {leaf: Place(f"{prefix}.{name}", part=part, parts=parts) for leaf, name in names.items()}


_GPT2 = {
    "embedding": Place("transformer.wte.weight"),
    "positions": Place("transformer.wpe.weight"),
    "head": Place("lm_head.weight", transposed=True),
    **_under("final_norm", _norm("transformer.ln_f")),
    **_under("layers/attention_norm", _norm("transformer.h.{}.ln_1")),
    **_under("layers/mlp_norm", _norm("transformer.h.{}.ln_2")),
    **_under("layers/query", _conv("transformer.h.{}.attn.c_attn", 0, 3)),
    **_under("layers/key", _conv("transformer.h.{}.attn.c_attn", 1, 3)),
    **_under("layers/value", _conv("transformer.h.{}.attn.c_attn", 2, 3)),
    **_under("layers/output", _conv("transformer.h.{}.attn.c_proj")),
    **_under("layers/up", _conv("transformer.h.{}.mlp.c_fc")),
    **_under("layers/down", _conv("transformer.h.{}.mlp.c_proj")),
}


def _with_transposed(places: Mapping[str, Place]) -> dict[str, Place]:
    """The table with the leaves of the transposed form beside those that they replace."""
    turned = {
        "head_weight" if path == "head" else path.removesuffix("kernel") + "weight": place
        for path, place in places.items()
        if path == "head" or path.endswith("/kernel")
    }
    turned = {path: dataclasses.replace(place, transposed=not place.transposed) for path, place in turned.items()}
    return {**places, **turned}


_DECODER = {"gpt2": _with_transposed(_GPT2)} | dict.fromkeys(("llama", "qwen2", "qwen3"), _with_transposed(_LLAMA))
# The base model's name, which checkpoints of the base model alone leave out.
PREFIX = {"gpt2": "transformer.", "llama": "model.", "qwen2": "model.", "qwen3": "model."}
_CLASSIFIER = {"gpt2": "classifier", "llama": "score", "qwen2": "score", "qwen3": "score"}

# Buffers that old versions of `transformers` saved among the weights; they follow from the config.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


def decoder_places(family: str) -> dict[str, Place]:
    """Of a language model's leaves, by their paths with "/" between the keys."""
    return _DECODER[family]


def guide_places(family: str, guide_type: str) -> dict[str, Place]:
    """Of a guide's leaves: a V-type's head is a token classifier's, a Q-type's a language model's."""
    head = _linear(_CLASSIFIER[family], "kernel", "bias") if guide_type == "v" else _linear("lm_head", "kernel")
    return _under("trunk", _DECODER[family]) | _under("head", head)


def is_buffer(name: str) -> bool:
    """Whether a tensor is known to hold nothing that was learned."""
    return bool(_BUFFERS.search(name))


def split_layer(path: tuple) -> tuple[str, int | None]:
    """The table's key of a leaf, from its path in a tree, and its layer where the layers are a list."""
    layer = next((key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)), None)
    return "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey)), layer
