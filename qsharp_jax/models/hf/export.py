"""Exporting weights: a folder with tokenizer and model card that `transformers` loads without this package.

A reference and a Q-type guide are causal language models; a Q-type's logits are the guide's outputs. A V-type guide is
a token classifier. The entry "qsharp" in config.json says what a guide's outputs parametrize, and
custom_generate/generate.py, a copy of integrations/transformers.py, steers `model.generate` with it.
"""

import functools
import importlib.resources
import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import qsharp_jax.models.hf.adapter as adapters
import qsharp_jax.models.hf.card as cards
import qsharp_jax.models.hf.config as configs
import qsharp_jax.models.hf.files as files
import qsharp_jax.models.hf.hub as hub
import qsharp_jax.models.hf.names as names
from qsharp_jax.models import sharding
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.models.hf.families import FAMILIES
from qsharp_jax.models.leaves import Place
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_FILE = 5_000_000_000  # bytes of weights in one file
PARTIAL = ".partial"  # the folder of files being written
# Files of an earlier export, removed by the next one into the same folder.
_OURS = (
    "*.safetensors", files.INDEX, adapters.CONFIG, "generation_config.json", "README.md", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*",
    "custom_generate/generate.py",
)  # fmt: skip


def export_ref(
    model: LanguageModel,
    folder: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    stop_ids: Sequence[int] = (),
    trained_on: str = "",
    metrics: Mapping[str, Any] | None = None,
    largest_file: int = LARGEST_FILE,
) -> None:
    """Export a reference for `AutoModelForCausalLM` and `PreTrainedTokenizerFast`, with the weights' dtype unchanged.

    Args:
      model: stacked or unstacked.
      folder: new, empty, or an earlier export, which is replaced.
      stop_ids: tokens that end a response; by default the tokenizer's end of text.
      trained_on: the model card's section on the training data, in Markdown.
      metrics: for the model card.
      largest_file: bytes of weights per file.

    Raises:
      UserError: if no class of `transformers` computes this model, or something else is in the folder.
    """
    family = configs.family_of(model.config)
    special = _special_tokens(tokenizer, stop_ids)
    entries = configs.entries(
        model.config, family, classifier=False, tied=model.config.tied, dtype=_dtype(model.params)
    )
    entries |= special | {configs.KEY: {}}
    places = names.decoder_places(family, model.config)
    _export(
        folder, files.split(_tensors(model.params, places), largest_file), tokenizer,
        {
            "config.json": entries,
            "generation_config.json": {name: ids for name, ids in special.items() if ids is not None},
            "README.md": cards.ref(trained_on, metrics or {}),
        },
    )  # fmt: skip


def export_guide(
    model: ValueModel,
    folder: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    trained_on: str = "",
    metrics: Mapping[str, Any] | None = None,
    largest_file: int = LARGEST_FILE,
) -> None:
    """Export a V-type guide for `AutoModelForTokenClassification`, or a Q-type guide for `AutoModelForCausalLM`.

    Arguments and errors are as in `export_ref`; a Q-type with several outputs per token is refused.
    """
    family, entries = _describe_guide(model.config, tokenizer)
    entries["dtype"] = _dtype(model.params)
    places = names.guide_places(family, model.config.trunk, model.config.type)
    steering = importlib.resources.files("qsharp_jax.integrations").joinpath("transformers.py")
    _export(
        folder, files.split(_tensors(model.params, places), largest_file), tokenizer,
        {
            "config.json": entries,
            "README.md": cards.guide(model.config, FAMILIES[family], trained_on, metrics or {}),
            "custom_generate/generate.py": steering.read_text(encoding="utf-8"),
        },
    )  # fmt: skip


def export_adapter(
    rounds: Sequence[Params],
    config: ValueConfig,
    folder: str | Path,
    *,
    alpha: float,
    base: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    trained_on: str = "",
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Export what fits with LoRA learned as a PEFT adapter of the model that they began with.

    Arguments and errors are as in `export_guide`, besides:

    Args:
      rounds: the learned parameters of each round: `lora_a` [L, in, R] and `lora_b` [L, R, out] beside every kernel,
        and the head. The updates of all rounds are added, and the last round's head is saved whole.
      config: of the guide.
      alpha: scale of the updates times R.
      base: folder of the model before the first round, or its id on the Hugging Face hub.
    """
    family, entries = _describe_guide(config, tokenizer)
    places = names.guide_places(family, config.trunk, config.type)
    tensors, described = adapters.write(rounds, places, alpha)
    name, _, revision = base.partition("@") if hub.is_id(base) else (base, "", "")
    described |= dict(
        base_model_name_or_path=name, revision=revision or None, fan_in_fan_out=family == "gpt2",
        task_type="TOKEN_CLS" if config.type == "v" else "CAUSAL_LM",
    )  # fmt: skip
    _export(
        folder, {adapters.WEIGHTS: tensors}, tokenizer,
        {
            "config.json": entries,
            adapters.CONFIG: described,
            "README.md": cards.adapter(config, name, trained_on, metrics or {}),
        },
    )  # fmt: skip


def _describe_guide(config: ValueConfig, tokenizer: Any) -> tuple[str, dict[str, Any]]:
    """The family of a float32 guide, and the entries of its config.json; raises a UserError as `export_guide`."""
    if config.type == "q" and config.outputs > 1:
        raise UserError(
            "transformers has no form for a Q-type guide with several outputs per token; to export a guide, fit a"
            " V-type one, or a Q-type with a bernoulli or scalar distribution"
        )
    family = configs.family_of(config.trunk)
    classifier = config.type == "v"
    entries = configs.entries(
        config.trunk, family, classifier=classifier, tied=classifier and config.trunk.tied, dtype="float32"
    )
    entries |= _special_tokens(tokenizer, ()) | {configs.KEY: _meaning(config)}
    if classifier:
        labels = [f"atom_{i}" for i in range(config.outputs)] if config.outputs > 1 else [config.distribution]
        entries |= {
            "num_labels": config.outputs,
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    return family, entries


def _meaning(config: ValueConfig) -> dict[str, Any]:
    """The config.json entry that says what a guide's outputs parametrize."""
    ends = {"bernoulli": (0.0, 1.0), "scalar": (None, None)}
    v_min, v_max = ends.get(config.distribution) or (config.atoms[0], config.atoms[-1])
    described = {"type": config.type, "distribution": config.distribution, "atoms": list(config.atoms)}
    return described | {"v_min": v_min, "v_max": v_max}


def _special_tokens(tokenizer: Any, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Ids for config.json; None is written too, since the defaults of `transformers` are other models' tokens."""
    ids = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    stops = sorted(set(map(int, stop_ids)))
    if stops:
        ids["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    return ids


def _dtype(params: Params) -> str:
    """The widest dtype of any weight, so that loading everything in one dtype rounds nothing."""
    return str(max((np.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)), key=lambda dtype: dtype.itemsize))


# --- Weights --------------------------------------------------------------------------------------------------------


# A leaf and its place; a tensor of the checkpoint holds the part of the leaf at an index of its first axes.
_Part = tuple[Place, jax.Array, tuple[int, ...]]


def _tensors(params: Params, table: Mapping[str, Place]) -> list[files.Tensor]:
    """Every tensor of the checkpoint, in the order of the layers; values are fetched when written."""
    parts: dict[str, list[_Part]] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        key, layer = names.split_layer(path)
        place = table[key]
        stacked = "{}" in place.name and layer is None
        for index in np.ndindex(leaf.shape[: stacked + ("{{}}" in place.name)]):
            name = place.name.format(index[0] if stacked else layer).format(*index[-1:])
            parts.setdefault(name, []).append((place, leaf, index))

    tensors = []
    for name, leaves in parts.items():
        place, leaf, index = leaves[0]
        shape = place.stored_shape(leaf.shape[len(index) :])
        tensors.append(files.Tensor(name, np.dtype(leaf.dtype), shape, functools.partial(_stored, leaves)))
    return tensors


def _stored(leaves: Sequence[_Part]) -> np.ndarray:
    """One tensor of the checkpoint, from the leaves that it holds side by side."""
    values = []
    for place, leaf, index in sorted(leaves, key=lambda entry: entry[0].part):
        # A copy is fetched: an array on several devices would keep the host array that its parts were joined in.
        part = sharding.to_host(leaf[index] if index else jnp.copy(leaf))
        values.append(part.T if place.transposed else part)
    return values[0] if len(values) == 1 else np.concatenate(values, axis=leaves[0][0].axis)


# --- The folder -----------------------------------------------------------------------------------------------------


def _export(
    folder: str | Path,
    weights: Mapping[str, Sequence[files.Tensor]],
    tokenizer: Any,
    texts: Mapping[str, Any],
) -> None:
    """Write all files into a subfolder, then move them, config.json last, which marks a complete export."""
    folder = Path(folder)
    check_folder(folder)
    if jax.process_index() > 0:  # every process takes part in fetching, in the order of writing; only the first writes
        for tensor in itertools.chain.from_iterable(weights.values()):
            tensor.make()
        return
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    files.write(partial, weights)
    for name, content in texts.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_text(text, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)

    (folder / configs.CONFIG).unlink(missing_ok=True)
    for old in {path for pattern in _OURS for path in folder.glob(pattern) if path.is_file()}:
        old.unlink()
    written = (path for path in partial.rglob("*") if path.is_file())
    for path in sorted(written, key=lambda path: path.name == configs.CONFIG):
        target = folder / path.relative_to(partial)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(partial)


def check_folder(folder: str | Path) -> None:
    """Raise a UserError if an export may not be written into a folder; call it before long work."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new folder to export into")
    if not folder.exists() or not any(folder.iterdir()) or (folder / PARTIAL).exists():
        return
    try:
        ours = configs.KEY in json.loads((folder / configs.CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{folder} is not empty and not an earlier export; give a new folder to export into")
