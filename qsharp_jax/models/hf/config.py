"""Reading and writing `config.json`, and refusing models whose mathematics differ from what is computed here.

The config classes of `transformers` do the reading: they know every default and every older spelling.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import qsharp_jax.models.hf.files as files
import qsharp_jax.models.hf.gguf as hf_gguf
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.system import gguf
from qsharp_jax.system.errors import UserError

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
KEY = "qsharp"  # our entry in config.json

# --- Tables: architectures, what is computed, and the names of fields -----------------------------------------------

# architecture -> (family, which is its model_type, and whether it is a token classifier)
ARCHITECTURES = {
    "GPT2LMHeadModel": ("gpt2", False),
    "LlamaForCausalLM": ("llama", False),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
    "GPT2ForTokenClassification": ("gpt2", True),
    "LlamaForTokenClassification": ("llama", True),
    "Qwen2ForTokenClassification": ("qwen2", True),
    "Qwen3ForTokenClassification": ("qwen3", True),
}
# The fields of our config that a family determines.
_LLAMA_FIXED: dict[str, Any] = dict(positions="rope", norm="rms", activation="swiglu", bias=False)
_FIXED: dict[str, dict[str, Any]] = {
    "gpt2": dict(positions="learned", norm="layer", activation="gelu", bias=True, qk_norm=False),
    "llama": _LLAMA_FIXED | dict(qkv_bias=False, qk_norm=False),
    "qwen2": _LLAMA_FIXED | dict(qkv_bias=True, qk_norm=False),
    "qwen3": _LLAMA_FIXED | dict(qkv_bias=False, qk_norm=True),
}
# The other fields, by their names in config.json.
_LLAMA_FIELDS = dict(
    vocab_size="vocab_size", hidden_size="embed", num_hidden_layers="layers", num_attention_heads="heads",
    num_key_value_heads="kv_heads", head_dim="head_dim", intermediate_size="mlp",
    max_position_embeddings="max_positions", rms_norm_eps="norm_eps", tie_word_embeddings="tied",
)  # fmt: skip
_GPT2_FIELDS = dict(
    vocab_size="vocab_size", n_embd="embed", n_layer="layers", n_head="heads", n_inner="mlp",
    n_positions="max_positions", layer_norm_epsilon="norm_eps", tie_word_embeddings="tied",
)  # fmt: skip
_FIELDS = {"gpt2": _GPT2_FIELDS} | dict.fromkeys(("llama", "qwen2", "qwen3"), _LLAMA_FIELDS)
# The fields of Llama 3.1's rotary scaling, among the rotary parameters.
_ROPE_FIELDS = dict(
    factor="rope_factor", low_freq_factor="rope_low_freq", high_freq_factor="rope_high_freq",
    original_max_position_embeddings="rope_original_positions",
)  # fmt: skip
# The supported values of fields that the family's class in `transformers` reads and that change the mathematics. Fields
# of other families are ignored, as `transformers` ignores them.
_OFF = (False, None)
_COMPUTED: dict[str, dict[str, tuple]] = {
    "gpt2": dict(
        activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=_OFF, add_cross_attention=_OFF,
    ),
    "llama": dict(hidden_act=("silu", "swish"), attention_bias=_OFF, mlp_bias=_OFF),
    "qwen2": dict(hidden_act=("silu", "swish")),
    "qwen3": dict(hidden_act=("silu", "swish"), attention_bias=_OFF),
}  # fmt: skip
# Fields by which `transformers` gives layers different shapes, shares their caches, or reads another file.
_LAYERS_DIFFER = ("per_layer_config", "kv_sharing_modes", "transformers_weights")


@dataclasses.dataclass(frozen=True)
class FolderConfig:
    """The content of config.json."""

    family: str  # "gpt2", "llama", "qwen2" or "qwen3"
    classifier: bool  # True for a token classifier, False for a language model
    decoder: DecoderConfig  # its shape
    labels: int  # number of outputs of a token classifier
    qsharp: dict[str, Any]  # our entry, {} without one


# --- In -------------------------------------------------------------------------------------------------------------


def read(folder: str | Path, dtype: str) -> FolderConfig:
    """Read a folder's config.json, for a model stored and computed in `dtype`.

    Raises:
      UserError: if it is missing or damaged, or describes an unsupported model.
    """
    path, entries = _read_entries(Path(folder))
    ours, model_type = entries.get(KEY) or {}, entries.get("model_type")
    architecture = (entries.get("architectures") or [None])[0]
    if architecture is None:  # the config of a model that was never saved
        architecture = next((name for name, kind in ARCHITECTURES.items() if kind == (model_type, False)), model_type)
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    family, classifier = ARCHITECTURES[architecture]
    if model_type != family:
        raise UserError(f"{path} says {architecture} and model_type {model_type!r}; it should be {family!r}")
    if entries.get("quantization_config") is not None:
        raise UserError(f"{path}: the weights are quantized; give the folder of the model before quantization")
    if name := next((name for name in _LAYERS_DIFFER if entries.get(name)), None):
        raise UserError(f"{path}: {name} is set, which is not supported")
    try:
        hf = AutoConfig.for_model(**entries)
        labels = hf.num_labels or 0
    except Exception as error:  # the checks of each field raise many types
        words = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({words[:200]}); download it again") from None
    try:
        if reason := _unsupported(hf, family):
            raise UserError(f"{path}: {reason}, which is not supported")
        decoder = _decoder(hf, family, dtype)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from None
    return FolderConfig(family, classifier, decoder, labels, ours)


def stored_dtype(folder: str | Path) -> str:
    """The dtype of a folder's weights: bfloat16 where it says so, else float32, which holds every float16 exactly.

    Raises:
      UserError: if its config.json is missing or damaged.
    """
    _, entries = _read_entries(Path(folder))
    return "bfloat16" if entries.get("dtype", entries.get("torch_dtype")) == "bfloat16" else "float32"


def _read_entries(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that describes a model, and the entries of config.json that it has or amounts to."""
    if (file := gguf.find(folder)) is not None:
        try:
            return file, hf_gguf.entries(file)
        except (TypeError, ZeroDivisionError) as error:  # metadata of other types, and zeros
            raise UserError(f"{file} is damaged ({error}); download it again") from None
    path = folder / CONFIG
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a folder with a {CONFIG}")
    check_no_adapter(folder)
    if not path.exists():
        raise UserError(f"{folder} has no {CONFIG}; give a folder that transformers can load")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError("it is not a JSON object")
        if not isinstance(entries.get(KEY) or {}, dict):
            raise ValueError(f'"{KEY}" is not an object')
        if not isinstance(entries.get("architectures") or [], list):
            raise ValueError('"architectures" is not a list')
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from None
    return path, entries


def guide(config: FolderConfig, folder: str | Path) -> ValueConfig:
    """The guide that a folder's config describes; raises a UserError if it describes none, or an incomplete one."""
    path = gguf.find(folder) or Path(folder) / CONFIG
    if "type" not in config.qsharp:
        what = "a token classifier of unknown meaning" if config.classifier else "a language model"
        example = f'"{KEY}": {{"type": "v", "distribution": "bernoulli"}}'
        raise UserError(
            f"{path} describes {what}, not a guide; fit a guide that starts from it, or, if it is one, add {example}"
        )
    try:
        described = ValueConfig(
            config.decoder,
            type=config.qsharp["type"],
            distribution=config.qsharp["distribution"],
            atoms=tuple(float(atom) for atom in config.qsharp.get("atoms") or ()),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'the entry "{KEY}" in {path} is damaged ({error}); export the guide again') from None
    if config.classifier != (described.type == "v"):
        raise UserError(
            f"{path} describes a {described.type.upper()}-type guide; a V-type is a token classifier and a Q-type a"
            " language model with its own head"
        )
    if described.type == "v" and config.labels != described.outputs:
        raise UserError(f"{path} has {config.labels} labels; a {described.distribution} guide has {described.outputs}")
    if described.type == "q" and (config.decoder.tied or described.outputs > 1):
        raise UserError(f"{path} describes a Q-type guide, whose head must be untied and have one output per token")
    return described


def check_no_adapter(folder: str | Path) -> None:
    """Raise a UserError if a folder holds an adapter."""
    folder = Path(folder)
    if not (folder / ADAPTER).is_file():
        return
    if (folder / files.SINGLE).is_file() or (folder / files.INDEX).is_file():
        raise UserError(
            f"{folder} has an {ADAPTER} beside the weights, and adapters are not applied; merge it into the weights, or"
            f" remove {ADAPTER} if it is already merged"
        )
    raise UserError(
        f"{folder} holds a LoRA adapter; merge it into its base first (with peft: model.merge_and_unload(), then"
        " save_pretrained), and give that folder"
    )


def _unsupported(hf: Any, family: str) -> str | None:
    """The first part of a config that changes the mathematics and is not supported; None if there is none."""
    if getattr(hf, "is_causal", True) not in (True, None):
        return "is_causal is false"
    if reason := _window(hf):
        return reason
    for name, computed in _COMPUTED[family].items():
        if (value := getattr(hf, name, computed[0])) not in computed:
            return f"{name} is {json.dumps(value)} and not {json.dumps(computed[0])}"
    if family == "gpt2":
        return None
    rope = _rope(hf)
    if nested := next((kind for kind, entry in rope.items() if isinstance(entry, dict)), None):
        return f"rope_parameters has separate entries for {nested!r}"
    if rope["rope_type"] not in ("default", "llama3"):
        return f"the rotary positions are scaled by {rope['rope_type']!r} and not 'llama3'"
    return "partial_rotary_factor is not 1" if rope.get("partial_rotary_factor", 1.0) != 1.0 else None


def _window(hf: Any) -> str | None:
    """A config's limit of attention to a window of tokens; None if it has none shorter than the model's positions."""
    kinds = getattr(hf, "layer_types", None)
    window = getattr(hf, "sliding_window", None)
    if kinds is None:  # then the caches of `transformers` follow these two fields
        windows = {"sliding_window": window, "attention_chunk_size": getattr(hf, "attention_chunk_size", None)}
        for name, size in windows.items():
            if size is not None and size < hf.max_position_embeddings:
                return f"{name} is {size}"
        return None
    others = {kind for kind in kinds if kind != "full_attention"}
    if others - {"sliding_attention"}:
        return f"layer_types has {sorted(others - {'sliding_attention'})[0]!r}"
    if others and (window or 0) < hf.max_position_embeddings:
        return f"attention slides over a window of {window} tokens"
    return None


def _rope(hf: Any) -> dict[str, Any]:
    hf.standardize_rope_params()  # as the models do: afterwards a field beside the parameters overrides theirs
    return hf.rope_parameters


def _decoder(hf: Any, family: str, dtype: str) -> DecoderConfig:
    fields: dict[str, Any] = {ours: getattr(hf, theirs, None) for theirs, ours in _FIELDS[family].items()}
    fields["norm_eps"] = float(fields["norm_eps"])
    if family == "gpt2":
        if hf.n_embd % hf.n_head:
            raise ValueError(f"n_embd is {hf.n_embd}; it must be a multiple of n_head, {hf.n_head}")
        fields |= dict(kv_heads=hf.n_head, head_dim=hf.n_embd // hf.n_head, mlp=hf.n_inner or 4 * hf.n_embd)
    else:
        rope = _rope(hf)
        fields["head_dim"] = fields["head_dim"] or hf.hidden_size // hf.num_attention_heads
        fields["rope_theta"] = float(rope["rope_theta"])
        if rope["rope_type"] == "llama3":
            fields |= {ours: float(rope[theirs]) for theirs, ours in _ROPE_FIELDS.items()}
            fields["rope_original_positions"] = int(fields["rope_original_positions"])
    return DecoderConfig(**_FIXED[family], **fields, dtype=dtype)


# --- Out ------------------------------------------------------------------------------------------------------------


def family_of(config: DecoderConfig) -> str:
    """The family whose `transformers` class computes a model of this config; raises a UserError if there is none."""
    if config.token_shift:
        raise UserError(
            "a model with token_shift cannot be exported: no class of transformers computes it; train one with"
            " config.model.token_shift=False"
        )
    divided = config.embed % config.heads == 0
    possible = {
        "gpt2": divided and (config.kv_heads, config.head_dim) == (config.heads, config.embed // config.heads),
        "llama": divided,  # required by its config class
    }
    for family, fixed in _FIXED.items():
        if possible.get(family, True) and all(getattr(config, name) == value for name, value in fixed.items()):
            return family
    raise UserError(
        "this model cannot be exported: no class of transformers computes it; it must match GPT-2 (learned positions"
        " and biases), Llama, Qwen 2 (with qkv_bias) or Qwen 3 (with qk_norm)"
    )


def entries(config: DecoderConfig, family: str, *, classifier: bool, tied: bool, dtype: str) -> dict[str, Any]:
    """config.json of a model in `transformers`, with every field that matters written out.

    Args:
      classifier: True for a token classifier, False for a language model.
      tied: whether the language model's head is its embedding.
      dtype: dtype of the weights.
    """
    architecture = next(name for name, kind in ARCHITECTURES.items() if kind == (family, classifier))
    common = dict(architectures=[architecture], model_type=family, dtype=dtype, use_cache=True)
    common |= {theirs: getattr(config, ours) for theirs, ours in _FIELDS[family].items()}
    common["tie_word_embeddings"] = tied
    if family == "gpt2":
        return common | dict(activation_function="gelu_new")
    rope: dict[str, Any] = dict(rope_type="default")
    if config.rope_factor != 1:
        rope = dict(rope_type="llama3") | {theirs: getattr(config, ours) for theirs, ours in _ROPE_FIELDS.items()}
    more = {"llama": dict(attention_bias=False, mlp_bias=False), "qwen2": dict(use_sliding_window=False)}
    more["qwen3"] = dict(attention_bias=False, use_sliding_window=False)
    return common | more[family] | dict(
        hidden_act="silu", rope_parameters=rope | dict(rope_theta=config.rope_theta),
        # For transformers 4.
        rope_theta=config.rope_theta, rope_scaling=rope if config.rope_factor != 1 else None,
    )  # fmt: skip
