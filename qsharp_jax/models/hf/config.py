"""Reading and writing `config.json`, and refusing models whose mathematics differ from what is computed here.

The config classes of `transformers` do the reading: they know every default and every older spelling.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import qsharp_jax.models.hf.adapter as adapters
import qsharp_jax.models.hf.gguf as hf_gguf
import qsharp_jax.models.hf.packed as packed
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.hf.families import FAMILIES
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.system import gguf
from qsharp_jax.system.errors import UserError

CONFIG = "config.json"
KEY = "qsharp"  # our entry in config.json

# architecture -> (family, which is its model_type, and whether it is a token classifier)
ARCHITECTURES = {family.model: (name, False) for name, family in FAMILIES.items()}
ARCHITECTURES |= {family.classifier: (name, True) for name, family in FAMILIES.items()}
# The fields of a scaling of rotary positions, among the rotary parameters, by its name.
_ROPE_FIELDS = {
    "llama3": dict(
        factor="rope_factor", low_freq_factor="rope_low_freq", high_freq_factor="rope_high_freq",
        original_max_position_embeddings="rope_original_positions",
    ),
    "linear": dict(factor="rope_factor"),
}  # fmt: skip
# Fields by which `transformers` gives layers different shapes, shares their caches, or reads another file.
_LAYERS_DIFFER = ("per_layer_config", "kv_sharing_modes", "transformers_weights")


@dataclasses.dataclass(frozen=True)
class FolderConfig:
    """The content of config.json."""

    family: str  # a name in `FAMILIES`
    classifier: bool  # True for a token classifier, False for a language model
    decoder: DecoderConfig  # its shape
    labels: int  # number of outputs of a token classifier
    qsharp: dict[str, Any]  # our entry, {} without one
    quantization: dict[str, Any] | None  # how the folder's weights are quantized, see packed.py


# --- In -------------------------------------------------------------------------------------------------------------


def read(folder: str | Path, dtype: str, quantize: str = "none") -> FolderConfig:
    """Read a folder's config.json, for a model stored and computed in `dtype`, with weights as `quantize` says.

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
    quantization = entries.pop("quantization_config", None)
    weights = path
    if (adapter := adapters.find(folder)) is not None:  # an adapter's config.json says nothing of its base's weights
        weights, of_base = _read_entries(adapter.base)
        quantization = of_base.get("quantization_config")
    if quantization is not None:
        packed.check(quantization, weights)
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
        decoder = dataclasses.replace(_decoder(hf, family, dtype), quantize=quantize)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from None
    return FolderConfig(family, classifier, decoder, labels, ours, quantization)


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
    adapter = adapters.find(folder)
    if adapter is not None and not path.exists():
        return _read_entries(adapter.base)
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


def _unsupported(hf: Any, family: str) -> str | None:
    """The first part of a config that changes the mathematics and is not supported; None if there is none."""
    if getattr(hf, "is_causal", True) not in (True, None):
        return "is_causal is false"
    if reason := _bad_window(hf, family):
        return reason
    for name, computed in FAMILIES[family].computed.items():
        if (value := getattr(hf, name, computed[0])) not in computed:
            return f"{name} is {json.dumps(value)} and not {json.dumps(computed[0])}"
    if family == "gpt2":
        return None
    fixed, rope = FAMILIES[family].fixed, _rope(hf)
    nested = next((kind for kind, entry in rope.items() if isinstance(entry, dict)), None)
    if nested and "window_rope_theta" in fixed:
        return f"rope_parameters has separate entries for {nested!r}"
    if nested:
        if (kind := rope["sliding_attention"]["rope_type"]) != "default":
            return f"the rotary positions of layers with a window are scaled by {kind!r}"
        rope = rope["full_attention"]
    if (kind := rope["rope_type"]) not in ("default", *_ROPE_FIELDS):
        return f"the rotary positions are scaled by {kind!r} and not {' or '.join(map(repr, _ROPE_FIELDS))}"
    if "rope_dims" in fixed and rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "partial_rotary_factor is not 1"
    return None


def _bad_window(hf: Any, family: str) -> str | None:
    """The first part of a config that limits attention in a way that is not computed here; None if there is none."""
    kinds, chunk = getattr(hf, "layer_types", None), getattr(hf, "attention_chunk_size", None)
    if others := sorted(set(kinds or ()) - {"full_attention", "sliding_attention"}):
        return f"layer_types has {others[0]!r}"
    if kinds is None and chunk is not None and chunk < hf.max_position_embeddings:
        return f"attention_chunk_size is {chunk}"
    window, layers = _window(hf, family)
    if layers and (FAMILIES[family].windows == "none" or (window or 0) < 2):
        return f"sliding_window is {window}" if kinds is None else f"attention slides over a window of {window} tokens"
    return None


def _window(hf: Any, family: str) -> tuple[int | None, tuple[int, ...]]:
    """The window of attention in tokens, and the layers that have it; 0 and none where no position is outside it."""
    window, kinds = getattr(hf, "sliding_window", None), getattr(hf, "layer_types", None)
    if kinds is None or FAMILIES[family].windows == "all":
        kinds = ["full_attention" if window is None else "sliding_attention"] * hf.num_hidden_layers
    layers = tuple(i for i, kind in enumerate(kinds[: hf.num_hidden_layers]) if kind == "sliding_attention")
    # Where such layers have rotary positions of their own, they differ from others even so.
    wide = window is not None and window >= hf.max_position_embeddings and "window_rope_theta" in FAMILIES[family].fixed
    return (0, ()) if wide or not layers else (window, layers)


def _rope(hf: Any) -> dict[str, Any]:
    hf.standardize_rope_params()  # as the models do: afterwards a field beside the parameters overrides theirs
    return hf.rope_parameters


def _decoder(hf: Any, family: str, dtype: str) -> DecoderConfig:
    fields: dict[str, Any] = {ours: getattr(hf, theirs, None) for theirs, ours in FAMILIES[family].fields.items()}
    fields["norm_eps"] = float(fields["norm_eps"])
    if family == "gpt2":
        if hf.n_embd % hf.n_head:
            raise ValueError(f"n_embd is {hf.n_embd}; it must be a multiple of n_head, {hf.n_head}")
        fields |= dict(kv_heads=hf.n_head, head_dim=hf.n_embd // hf.n_head, mlp=hf.n_inner or 4 * hf.n_embd)
    else:
        fields["head_dim"] = fields["head_dim"] or hf.hidden_size // hf.num_attention_heads
        fields["window"], fields["window_layers"] = _window(hf, family)
        fields |= _layers(hf, family, fields["head_dim"])
    return DecoderConfig(**FAMILIES[family].fixed, **fields, dtype=dtype)


def _layers(hf: Any, family: str, head_dim: int) -> dict[str, Any]:
    """The fields of our config on rotary positions, and those that a family does not fix."""
    fields: dict[str, Any] = {}
    open_fields, rope = {"window_rope_theta", "rope_dims", "no_rope_layers", "query_scalar"}, _rope(hf)
    open_fields -= set(FAMILIES[family].fixed)
    if "window_rope_theta" in open_fields:
        fields["window_rope_theta"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    fields["rope_theta"] = float(rope["rope_theta"])
    if (kind := rope["rope_type"]) != "default":
        fields |= {ours: float(rope[theirs]) for theirs, ours in _ROPE_FIELDS[kind].items()} | dict(rope_scaling=kind)
    if "rope_original_positions" in fields:
        fields["rope_original_positions"] = int(fields["rope_original_positions"])
    if "rope_dims" in open_fields:
        dims = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        fields["rope_dims"] = 0 if dims == head_dim else dims
    if "no_rope_layers" in open_fields:
        fields["no_rope_layers"] = tuple(i for i in range(hf.num_hidden_layers) if not hf.no_rope_layers[i])
    if "query_scalar" in open_fields:
        scalar = float(hf.query_pre_attn_scalar)
        fields["query_scalar"] = 0.0 if scalar == head_dim else scalar
    return fields


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
        "llama": divided,  # required by its config class, as by Gemma's
        "gemma3_text": divided,
        "qwen3_moe": config.experts > 0,
    }
    for name, family in FAMILIES.items():
        windows = {"none": config.window == 0, "all": len(config.window_layers) in (0, config.layers)}
        alike = all(getattr(config, field) == value for field, value in family.fixed.items())
        if alike and possible.get(name, True) and windows.get(family.windows, True):
            return name
    raise UserError(
        f"this model cannot be exported: no class of transformers computes it; it must match one of"
        f" {', '.join(FAMILIES)} in its positions, norms, biases, windows and experts"
    )


def entries(config: DecoderConfig, family: str, *, classifier: bool, tied: bool, dtype: str) -> dict[str, Any]:
    """config.json of a model in `transformers`, with every field that matters written out.

    Args:
      classifier: True for a token classifier, False for a language model.
      tied: whether the language model's head is its embedding.
      dtype: dtype of the weights.
    """
    described = FAMILIES[family]
    architecture = described.classifier if classifier else described.model
    common: dict[str, Any] = dict(architectures=[architecture], model_type=family, dtype=dtype, use_cache=True)
    common |= {theirs: getattr(config, ours) for theirs, ours in described.fields.items()}
    common["tie_word_embeddings"] = tied
    common |= described.written
    if family == "gpt2":
        return common
    scaling: dict[str, Any] = dict(rope_type="default")
    if config.rope_factor != 1:
        scaled = _ROPE_FIELDS[config.rope_scaling]
        scaling = dict(rope_type=config.rope_scaling) | {theirs: getattr(config, scaled[theirs]) for theirs in scaled}
    rope = scaling | dict(rope_theta=config.rope_theta)
    # rope_theta and rope_scaling are for transformers 4.
    common |= dict(rope_parameters=rope, rope_theta=config.rope_theta)
    common["rope_scaling"] = scaling if config.rope_factor != 1 else None
    return common | _entries_of_layers(config, family, rope)


def _entries_of_layers(config: DecoderConfig, family: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Entries of config.json on windows, and on what the family does not fix."""
    described = FAMILIES[family]
    more: dict[str, Any] = {}
    if described.windows == "all":
        more["sliding_window"] = config.window or None
    elif config.window:
        kinds = ["sliding_attention" if kind.window else "full_attention" for kind in config.kinds]
        more |= dict(sliding_window=config.window, use_sliding_window=True, layer_types=kinds)
    if "window_rope_theta" not in described.fixed:
        local = dict(rope_type="default", rope_theta=config.window_rope_theta)
        more["rope_parameters"] = dict(full_attention=rope, sliding_attention=local)
        more["rope_local_base_freq"] = config.window_rope_theta
    if "rope_dims" not in described.fixed:
        share = (config.rope_dims or config.head_dim) / config.head_dim
        more |= dict(rope_parameters=rope | dict(partial_rotary_factor=share), partial_rotary_factor=share)
    if "no_rope_layers" not in described.fixed:
        more["no_rope_layers"] = [int(kind.rope != "none") for kind in config.kinds]
    if "query_scalar" not in described.fixed:
        more["query_pre_attn_scalar"] = int(config.query_scalar or config.head_dim)
    return more
