"""Between `config.json` and our configs: what is read, what is refused because it changes the mathematics, and back.

It reads through the config classes of `transformers`, which know every default and every older spelling.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import qsharp_jax.models.hf.files as files
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.system.errors import UserError

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
KEY = "qsharp"  # our entry in config.json

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


@dataclasses.dataclass(frozen=True)
class FolderConfig:
    """What config.json says.

    Attributes:
      family: "gpt2", "llama", "qwen2" or "qwen3".
      classifier: a token classifier rather than a language model.
      decoder: its shape.
      labels: outputs of the token classifier.
      qsharp: our own entry, {} where there is none.
    """

    family: str
    classifier: bool
    decoder: DecoderConfig
    labels: int
    qsharp: dict[str, Any]


# --- In -------------------------------------------------------------------------------------------------------------


def read(folder: str | Path, dtype: str) -> FolderConfig:
    """A folder's config.json, the model to be held and computed in `dtype`.

    Raises:
      UserError: if there is none, or it is damaged, or of a model that is not computed here.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a folder with a {CONFIG}")
    check_no_adapter(folder)
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{folder} has no {CONFIG}; give a folder that transformers could load")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        architecture = (entries.get("architectures") or [None])[0]
        model_type = entries.get("model_type")
        ours = entries.get(KEY) or {}
        if not isinstance(ours, dict):
            raise ValueError(f'"{KEY}" is no object')
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from None
    if architecture is None:  # the config of a model that was never saved as one
        architecture = next((name for name, made in ARCHITECTURES.items() if made == (model_type, False)), model_type)
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    family, classifier = ARCHITECTURES[architecture]
    if model_type != family:
        raise UserError(f"{path} says {architecture} and model_type {model_type!r}; it should be {family!r}")
    if entries.get("quantization_config") is not None:
        raise UserError(f"{path}: the weights are quantised; give the folder of the model before that")
    if name := next((name for name in _LAYERS_DIFFER if entries.get(name)), None):
        raise UserError(f"{path}: {name} is set, which is not supported")
    try:
        hf = AutoConfig.for_model(**entries)
        labels = hf.num_labels
    except Exception as error:  # of many types, from the checks of each field
        words = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({words[:200]}); download it again") from None
    try:
        if reason := _unsupported(hf, family):
            raise UserError(f"{path}: {reason}, which is not supported")
        decoder = _gpt2(hf, dtype) if family == "gpt2" else _llama(hf, family, dtype)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from None
    return FolderConfig(family, classifier, decoder, labels, ours)


def guide(config: FolderConfig, folder: str | Path) -> ValueConfig:
    """The guide that a folder's config describes.

    Raises:
      UserError: if it describes none, or not fully.
    """
    path = Path(folder) / CONFIG
    if "type" not in config.qsharp:
        what = "a token classifier of unknown meaning" if config.classifier else "a language model"
        example = f'"{KEY}": {{"type": "v", "distribution": "bernoulli"}}'
        raise UserError(
            f"{path} describes {what}, not a guide; fit a guide that starts from it, or, if it is one, add {example}"
        )
    try:
        made = ValueConfig(
            config.decoder,
            type=config.qsharp["type"],
            distribution=config.qsharp["distribution"],
            atoms=tuple(float(atom) for atom in config.qsharp.get("atoms") or ()),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'the entry "{KEY}" in {path} is damaged ({error}); export the guide again') from None
    if config.classifier != (made.type == "v"):
        raise UserError(
            f"{path} describes a {made.type.upper()}-type guide; a V-type is a token classifier and a Q-type a language"
            " model with a head of its own"
        )
    if made.type == "v" and config.labels != made.outputs:
        raise UserError(f"{path} has {config.labels} labels; a {made.distribution} guide has {made.outputs}")
    if made.type == "q" and (config.decoder.tied or made.outputs > 1):
        raise UserError(f"{path} describes a Q-type guide, whose head must be untied and have one output a token")
    return made


# Keys of any family by which `transformers` gives layers other shapes, shares their caches, or reads another file.
_LAYERS_DIFFER = ("per_layer_config", "kv_sharing_modes", "transformers_weights")
# Switches that the family's class reads: the others ignore them, and so are they ignored here.
_SWITCHES = {
    "gpt2": ("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    "llama": ("attention_bias", "mlp_bias"),
    "qwen2": (),
    "qwen3": ("attention_bias",),
}


def check_no_adapter(folder: str | Path) -> None:
    """Check that a folder is not that of an adapter, whose weights are a change of another model's.

    Raises:
      UserError: saying what to do with it.
    """
    folder = Path(folder)
    if not (folder / ADAPTER).is_file():
        return
    if (folder / files.SINGLE).is_file() or (folder / files.INDEX).is_file():
        raise UserError(
            f"{folder} has an {ADAPTER} beside the weights, and an adapter is not applied; merge it into the weights,"
            f" or remove {ADAPTER} if it is merged already"
        )
    raise UserError(
        f"{folder} holds a LoRA adapter; merge it into its base first (with peft: model.merge_and_unload(), then"
        " save_pretrained), and give that folder"
    )


def _unsupported(hf: Any, family: str) -> str | None:
    """What about a config changes the mathematics and is not computed here."""
    if getattr(hf, "is_causal", True) not in (True, None):
        return "is_causal is false"
    if reason := _window(hf):
        return reason
    if family == "gpt2":
        if hf.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):  # one function, two names
            return f"activation_function is {hf.activation_function!r} and not 'gelu_new'"
        if not hf.scale_attn_weights:
            return "scale_attn_weights is false"
    else:
        if hf.hidden_act not in ("silu", "swish"):
            return f"hidden_act is {hf.hidden_act!r} and not 'silu'"
        rope = _rope(hf)
        if nested := next((kind for kind, entry in rope.items() if isinstance(entry, dict)), None):
            return f"rope_parameters has entries of its own for {nested!r}"
        if rope["rope_type"] not in ("default", "llama3"):
            return f"the rotary positions are scaled by {rope['rope_type']!r} and not 'llama3'"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return "partial_rotary_factor is not 1"
    return next((f"{name} is true" for name in _SWITCHES[family] if getattr(hf, name, False)), None)


def _window(hf: Any) -> str | None:
    """How a config limits attention to the last tokens; None where it does not within the model's positions."""
    kinds = getattr(hf, "layer_types", None)
    window = getattr(hf, "sliding_window", None)
    if kinds is None:  # the caches of `transformers` then follow these two keys
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
    hf.standardize_rope_params()  # as the models do: only now does a key beside the parameters count before theirs
    return hf.rope_parameters


def _gpt2(hf: Any, dtype: str) -> DecoderConfig:
    if hf.n_embd % hf.n_head:
        raise ValueError(f"n_embd is {hf.n_embd}, which n_head, {hf.n_head}, does not divide")
    return DecoderConfig(
        vocab_size=hf.vocab_size, embed=hf.n_embd, layers=hf.n_layer, heads=hf.n_head, kv_heads=hf.n_head,
        head_dim=hf.n_embd // hf.n_head, mlp=hf.n_inner or 4 * hf.n_embd, max_positions=hf.n_positions,
        positions="learned", norm="layer", activation="gelu", bias=True, tied=hf.tie_word_embeddings,
        norm_eps=float(hf.layer_norm_epsilon), dtype=dtype,
    )  # fmt: skip


def _llama(hf: Any, family: str, dtype: str) -> DecoderConfig:
    rope = _rope(hf)
    scaling = {}
    if rope["rope_type"] == "llama3":
        scaling = dict(
            rope_factor=float(rope["factor"]),
            rope_low_freq=float(rope["low_freq_factor"]),
            rope_high_freq=float(rope["high_freq_factor"]),
            rope_original_positions=int(rope["original_max_position_embeddings"]),
        )
    heads = hf.num_attention_heads
    return DecoderConfig(
        vocab_size=hf.vocab_size, embed=hf.hidden_size, layers=hf.num_hidden_layers, heads=heads,
        kv_heads=hf.num_key_value_heads, head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        mlp=hf.intermediate_size, max_positions=hf.max_position_embeddings, qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3", tied=hf.tie_word_embeddings, rope_theta=float(rope["rope_theta"]), **scaling,
        norm_eps=float(hf.rms_norm_eps), dtype=dtype,
    )  # fmt: skip


# --- Out ------------------------------------------------------------------------------------------------------------


def family_of(config: DecoderConfig) -> str:
    """The family whose `transformers` class computes what this config describes.

    Raises:
      UserError: if there is none.
    """
    if config.token_shift:
        raise UserError(
            "a model with token_shift cannot be exported, as no class of transformers computes it; train one with"
            " config.model.token_shift=False"
        )
    gpt2 = dict(
        positions="learned", norm="layer", activation="gelu", bias=True, qk_norm=False, kv_heads=config.heads,
        head_dim=config.embed / config.heads,
    )  # fmt: skip
    llama = dict(positions="rope", norm="rms", activation="swiglu", bias=False)
    families = {
        "gpt2": gpt2,
        "llama": llama | dict(qkv_bias=False, qk_norm=False),
        "qwen2": llama | dict(qkv_bias=True, qk_norm=False),
        "qwen3": llama | dict(qkv_bias=False, qk_norm=True),
    }
    for family, fields in families.items():
        if all(getattr(config, name) == value for name, value in fields.items()):
            if family == "llama" and config.embed % config.heads:
                continue  # its config class insists
            return family
    raise UserError(
        "this model cannot be exported, as no class of transformers computes it: it is none of GPT-2 (learned positions"
        " and biases), Llama, Qwen 2 (with qkv_bias) and Qwen 3 (with qk_norm)"
    )


def entries(config: DecoderConfig, family: str, *, classifier: bool, tied: bool, dtype: str) -> dict[str, Any]:
    """config.json of a model in `transformers`, every field that matters written out.

    Args:
      classifier: a token classifier rather than a language model.
      tied: whether the language model's head is its embedding.
      dtype: of the weights.
    """
    architecture = next(name for name, made in ARCHITECTURES.items() if made == (family, classifier))
    common = dict(
        architectures=[architecture], model_type=family, dtype=dtype, vocab_size=config.vocab_size,
        tie_word_embeddings=tied, use_cache=True,
    )  # fmt: skip
    if family == "gpt2":
        return common | dict(
            n_embd=config.embed, n_layer=config.layers, n_head=config.heads, n_inner=config.mlp,
            n_positions=config.max_positions, activation_function="gelu_new", layer_norm_epsilon=config.norm_eps,
        )  # fmt: skip
    rope: dict[str, Any] = dict(rope_type="default")
    if config.rope_factor != 1:
        rope = dict(
            rope_type="llama3",
            factor=config.rope_factor,
            low_freq_factor=config.rope_low_freq,
            high_freq_factor=config.rope_high_freq,
            original_max_position_embeddings=config.rope_original_positions,
        )
    made = common | dict(
        hidden_size=config.embed, num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, head_dim=config.head_dim, intermediate_size=config.mlp,
        max_position_embeddings=config.max_positions, hidden_act="silu", rms_norm_eps=config.norm_eps,
        rope_parameters=rope | dict(rope_theta=config.rope_theta),
        # As transformers 4 reads them.
        rope_theta=config.rope_theta, rope_scaling=rope if config.rope_factor != 1 else None,
    )  # fmt: skip
    if family != "qwen2":
        made["attention_bias"] = False
    if family == "llama":
        made["mlp_bias"] = False
    else:
        made["use_sliding_window"] = False
    return made
