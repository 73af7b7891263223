"""The families of models that are computed here: one entry each, with what its class of `transformers` calls things.

To add a family whose layers are like those of another, add its entry here, and to `leaves.RELATIVES` the places of the
leaves that its checkpoints call differently.
"""

import dataclasses
from typing import Any, Literal

_LLAMA_FIXED: dict[str, Any] = dict(
    positions="rope", norm="rms", activation="swiglu", bias=False, qkv_bias=False, qk_norm=False, post_norms=False,
    scaled_embedding=False, fused=False, query_scalar=0.0, window_rope_theta=0.0, no_rope_layers=(), rope_dims=0,
    experts=0,
)  # fmt: skip
_LLAMA_FIELDS = dict(
    vocab_size="vocab_size", hidden_size="embed", num_hidden_layers="layers", num_attention_heads="heads",
    num_key_value_heads="kv_heads", head_dim="head_dim", intermediate_size="mlp",
    max_position_embeddings="max_positions", rms_norm_eps="norm_eps", tie_word_embeddings="tied",
)  # fmt: skip
_GEMMA3_CLASSIFIER = """\
from transformers import Gemma3PreTrainedModel, Gemma3TextConfig
from transformers.modeling_layers import GenericForTokenClassification

class Gemma3TextForTokenClassification(GenericForTokenClassification, Gemma3PreTrainedModel):
    config_class = Gemma3TextConfig
"""
_OFF = (False, None)
_SILU = dict(hidden_act=("silu", "swish"))
_NO_BIAS = dict(attention_bias=_OFF)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family, by its `model_type`."""

    model: str  # the architecture of a language model
    classifier: str  # the architecture of a token classifier
    definition: str = ""  # Python code of the token classifier's class, where `transformers` has none
    # the fields of our config that are the same for all its models; a config without them is of another family
    fixed: dict[str, Any] = dataclasses.field(default_factory=lambda: _LLAMA_FIXED)
    # names in config.json -> the other fields of our config
    fields: dict[str, str] = dataclasses.field(default_factory=lambda: _LLAMA_FIELDS)
    # names in config.json -> supported values, of what the family's class reads and what changes the mathematics.
    # Fields of other families are ignored, as `transformers` ignores them
    computed: dict[str, tuple] = dataclasses.field(default_factory=lambda: _SILU)
    # further entries of config.json, the same for all its models
    written: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(hidden_act="silu"))
    # the layers with the window of `sliding_window`: no family's, all, or those that `layer_types` names
    windows: Literal["none", "all", "layer_types"] = "none"


def _without(*names: str) -> dict[str, Any]:
    """Llama's fixed fields without some."""
    return {name: value for name, value in _LLAMA_FIXED.items() if name not in names}


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2ForTokenClassification",
        fixed=_LLAMA_FIXED | dict(positions="learned", norm="layer", activation="gelu", bias=True),
        fields=dict(
            vocab_size="vocab_size", n_embd="embed", n_layer="layers", n_head="heads", n_inner="mlp",
            n_positions="max_positions", layer_norm_epsilon="norm_eps", tie_word_embeddings="tied",
        ),
        computed=dict(
            activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=_OFF, add_cross_attention=_OFF,
        ),
        written=dict(activation_function="gelu_new"),
    ),
    "llama": Family(
        "LlamaForCausalLM", "LlamaForTokenClassification", computed=_SILU | _NO_BIAS | dict(mlp_bias=_OFF),
        written=dict(attention_bias=False, mlp_bias=False, hidden_act="silu"),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", "Qwen2ForTokenClassification", fixed=_LLAMA_FIXED | dict(qkv_bias=True),
        written=dict(use_sliding_window=False, hidden_act="silu"), windows="layer_types",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", "Qwen3ForTokenClassification", fixed=_LLAMA_FIXED | dict(qk_norm=True),
        computed=_SILU | _NO_BIAS,
        written=dict(attention_bias=False, use_sliding_window=False, hidden_act="silu"), windows="layer_types",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "Qwen3MoeForTokenClassification", fixed=_without("experts") | dict(qk_norm=True),
        fields={name: field for name, field in _LLAMA_FIELDS.items() if field != "mlp"} | dict(
            moe_intermediate_size="mlp", num_experts="experts", num_experts_per_tok="experts_per_token",
            norm_topk_prob="normalized_router",
        ),
        computed=_SILU | _NO_BIAS | dict(decoder_sparse_step=(1,), mlp_only_layers=([], None)),
        written=dict(
            attention_bias=False, use_sliding_window=False, decoder_sparse_step=1, mlp_only_layers=[], hidden_act="silu"
        ),
    ),
    "mistral": Family("MistralForCausalLM", "MistralForTokenClassification", windows="all"),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", "Gemma3TextForTokenClassification", definition=_GEMMA3_CLASSIFIER,
        fixed=_without("window_rope_theta", "query_scalar") | dict(
            norm="rms_plus_one", activation="geglu", qk_norm=True, post_norms=True, scaled_embedding=True
        ),
        computed=_NO_BIAS | dict(
            hidden_activation=("gelu_pytorch_tanh",), attn_logit_softcapping=(None,), final_logit_softcapping=(None,),
            use_bidirectional_attention=_OFF,
        ),
        written=dict(attention_bias=False, hidden_activation="gelu_pytorch_tanh"), windows="layer_types",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM", "SmolLM3ForTokenClassification", fixed=_without("no_rope_layers"),
        computed=_SILU | _NO_BIAS | dict(mlp_bias=_OFF),
        written=dict(attention_bias=False, mlp_bias=False, hidden_act="silu"), windows="layer_types",
    ),
    "phi3": Family(
        "Phi3ForCausalLM", "Phi3ForTokenClassification", fixed=_without("rope_dims") | dict(fused=True), windows="all"
    ),
}  # fmt: skip
