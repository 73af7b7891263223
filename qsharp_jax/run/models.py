"""Where a run's models come from, by its config: `ref` and `guide`, each made on the spot or read from a folder.

    config.ref     "pretrain": made from the sections `model` and `pretrain`; or the folder of a language model
    config.guide   how the first guide starts: "ref", from the reference's weights; "scratch", of the shape `model`; or
                   a folder, of a language model (below a fresh head) or of an exported guide (with its own)

What is wrong with a folder is found without reading its weights. It knows nothing about workdirs or algorithms.
"""

import dataclasses
import datetime
import os
from pathlib import Path
from types import ModuleType

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.generate import for_decoding
from qsharp_jax.models import config as model_configs
from qsharp_jax.models import decoder, hf, sharding, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.run.folders import check_vocabulary, stored_dtype
from qsharp_jax.system.errors import UserError

ON_THE_SPOT = {"ref": ("pretrain",), "guide": ("ref", "scratch")}


def folder(config: ConfigDict, name: str) -> Path | None:
    """The folder of "ref" or "guide"; None where the model is made on the spot."""
    return None if config[name] in ON_THE_SPOT[name] else Path(config[name]).expanduser()


def make_absolute(config: ConfigDict) -> None:
    """Folders' paths made absolute, in place, as a workdir is to keep them."""
    for name, words in ON_THE_SPOT.items():
        if config[name] not in words:
            config[name] = os.path.abspath(os.path.expanduser(config[name]))
    if config.task.get("data", "") not in ("", "hub"):
        config.task.data = os.path.abspath(os.path.expanduser(config.task.data))


# --- Tokenizer and shapes -------------------------------------------------------------------------------------------


def make_text(config: ConfigDict, task: ModuleType, date: datetime.date | None = None) -> Tokenizer:
    """The reference's tokenizer: its folder's, or the task's own.

    Args:
      date: the run's, for chat templates that write it; by default today.

    Raises:
      UserError: for a task that has none, and as `Tokenizer.load`.
    """
    if ref := folder(config, "ref"):
        return Tokenizer.load(ref, prompt_format=config.prompt_format, date=date)
    if task.FINITE:
        raise UserError(
            f"config.ref is pretrain, and for {config.task.name} no model is made on the spot; give --config.ref=DIR,"
            " the folder of a language model"
        )
    return Tokenizer(task.make_tokenizer(config.task), config.prompt_format)


def ref_config(config: ConfigDict, text: Tokenizer) -> DecoderConfig:
    """The reference's shape, to be computed in the config's dtype, which is the folder's own by default.

    Raises:
      ValueError: for a section `model` that cannot be.
      UserError: for a folder of no model that is computed here.
    """
    if ref := folder(config, "ref"):
        return hf.read_config(ref, _dtype(config, ref))
    return _model_section(config, text.vocab_size)


def guide_config(config: ConfigDict, text: Tokenizer) -> ValueConfig:
    """The guide's shape, likewise.

    Raises:
      UserError: also for the folder of a guide that is not of the kind that the section `value` says.
    """
    start = folder(config, "guide")
    if start:
        trunk = hf.read_config(start, _dtype(config, start))
    elif config.guide == "ref":
        trunk = ref_config(config, text)
    else:
        trunk = _model_section(config, text.vocab_size)
    section = config.value
    made = ValueConfig(trunk, type=section.type, distribution=section.distribution, atoms=tuple(section.atoms))
    if start and hf.is_guide(start):
        held = hf.read_guide_config(start, trunk.dtype)
        for name in ("type", "distribution", "atoms"):
            if (asked := getattr(made, name)) != (there := getattr(held, name)):
                raise UserError(
                    f"config.value.{name} is {asked!r}, and the guide in {start} has {there!r}; change the setting, or"
                    " start from another guide"
                )
    return made


def _dtype(config: ConfigDict, model: Path) -> str:
    return config.dtype or stored_dtype(model)


def _model_section(config: ConfigDict, vocab_size: int) -> DecoderConfig:
    changes = dict(config.model)
    if "vocab_size" in changes:
        raise ValueError("model.vocab_size is the tokenizer's; remove it from the config")
    for field in dataclasses.fields(DecoderConfig):
        value_ = changes.get(field.name, field.type())
        if type(value_) is not field.type and not (field.type is float and type(value_) is int):
            raise ValueError(f"model.{field.name} is {value_!r}; it must be of type {field.type.__name__}")
    return model_configs.make(changes.pop("size"), **changes, vocab_size=vocab_size)


def check_folders(config: ConfigDict) -> None:
    """Check that the folders exist, and are not those of adapters.

    Raises:
      UserError: naming the setting or the folder.
    """
    for name, words in ON_THE_SPOT.items():
        path = folder(config, name)
        if path and not path.is_dir():
            raise UserError(
                f"config.{name} is {config[name]!r}, and there is no such folder; give {', '.join(words)}, or the"
                " folder of a model"
            )
        if path:
            hf.check_no_adapter(path)


def check(config: ConfigDict, text: Tokenizer) -> None:
    """That the folders hold what the config takes them for, with one vocabulary, but for the weights' values.

    Raises:
      UserError: saying which does not, and why; ValueError: for sections that cannot be.
    """
    ref, guide = folder(config, "ref"), folder(config, "guide")
    shapes = {"reference": ref_config(config, text), "guide": guide_config(config, text).trunk}
    whose = f"the tokenizer in {ref}" if ref else "the task's tokenizer"
    check_vocabulary(text, shapes, [guide] if guide else [], whose)
    if ref:
        hf.check_weights(ref, "ref")
    if guide:
        hf.check_weights(guide, "guide" if hf.is_guide(guide) else "trunk")


# --- Weights --------------------------------------------------------------------------------------------------------


def load_ref(config: ConfigDict, mesh: Mesh | None = None) -> LanguageModel:
    """The reference out of its folder, in the form for decoding, on a mesh for it if there is one."""
    ref = folder(config, "ref")
    dtype = _dtype(config, ref)
    shape = hf.read_config(ref, dtype)
    read = jax.eval_shape(for_decoding, LanguageModel(decoder.abstract(shape, dtype), shape))
    shardings = _shardings(read, mesh, sharding.DECODE)
    return hf.load_ref(ref, dtype=dtype, shardings=shardings)


def first_guide(
    config: ConfigDict, shape: ValueConfig, ref: LanguageModel | None, key: jax.Array, mesh: Mesh | None = None
) -> Params:
    """Float32 parameters, layers stacked, that the first guide starts from.

    Args:
      shape: that `guide_config` gave.
      ref: the reference; it is not looked at where the guide's trunk comes out of a folder, the reference's among them.
      key: for what is drawn at random.
      mesh: for fitting, onto which a folder's weights are read.
    """
    start = folder(config, "guide")
    shardings = _shardings(ValueModel(value.abstract(shape), shape), mesh, sharding.FIT)
    if start and hf.is_guide(start):
        return hf.load_guide(start, dtype="float32", unstacked=False, shardings=shardings).params
    start = folder(config, "ref") if config.guide == "ref" else start
    if start:
        trunk = hf.load_trunk(start, dtype="float32", shardings=shardings and shardings["trunk"]).params
    else:
        trunk = ref.params if config.guide == "ref" else None
    return value.init(key, shape, trunk)


def first_policy(config: ConfigDict, ref: LanguageModel, mesh: Mesh | None = None) -> Params:
    """Float32 parameters, layers stacked, of the copy of the reference that a policy starts as.

    Args:
      ref: the reference; it is not looked at where it comes out of a folder.
      mesh: for fitting, onto which the weights are put.
    """
    if start := folder(config, "ref"):
        shape = ref_config(config, None)
        shardings = _shardings(LanguageModel(decoder.abstract(shape), shape), mesh, sharding.FIT)
        return hf.load_ref(start, dtype="float32", unstacked=False, shardings=shardings).params
    return sharding.move(ref, mesh, sharding.FIT).params


def _shardings(model: LanguageModel | ValueModel, mesh: Mesh | None, rules: sharding.Rules) -> Params | None:
    return None if mesh is None else sharding.of_model(model, mesh, rules).params
