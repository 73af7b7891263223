"""The models of a run: tokenizer, shapes and weights, according to its config.

    config.ref     "pretrain": pre-trained by the sections `model` and `pretrain`; or a language model: its folder, GGUF
                   file, or id on the Hugging Face hub
    config.guide   how the first guide starts: "ref", from the reference's weights; "scratch", with the shape `model`;
                   or from a language model (with a fresh head) or an exported guide (with its own), given like `ref`

Errors in a folder are reported without reading its weights.
"""

import dataclasses
import datetime
import functools
import itertools
import typing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qsharp_jax import train
from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.decoding import for_decoding
from qsharp_jax.models import config as model_configs
from qsharp_jax.models import cpu_form, decoder, hf, lora, quantized, sharding, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.run import sources
from qsharp_jax.run.config import trains_policy
from qsharp_jax.run.folders import check_vocabulary, load_tokenizer
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.sampling import Sampling
from qsharp_jax.system import progress
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import registry
from qsharp_jax.train.checkpoint import Checkpoints

# --- Tokenizer and shapes -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # read once per run
def tokenizer(session: Session) -> Tokenizer:
    """Return the reference's tokenizer: its folder's, or the task's own; as `make_tokenizer`."""
    return make_tokenizer(session.config, session.workdir.date)


def make_tokenizer(config: ConfigDict, date: datetime.date | None = None) -> Tokenizer:
    """Return the tokenizer that a config names.

    Args:
      date: for chat templates that write it; by default today.

    Raises:
      UserError: if neither a folder nor the task has one, and as in `Tokenizer.load`.
    """
    if ref := sources.folder(config, "ref"):
        return load_tokenizer(ref, prompt_format=config.prompt_format, date=date)
    task = registry.get(config.task.name)
    if task.FINITE:
        raise UserError(
            f"config.ref is pretrain, but {config.task.name} has no texts to pre-train on; give --config.ref=DIR, the"
            " folder of a language model"
        )
    return Tokenizer(task.make_tokenizer(config.task), config.prompt_format)


def ref_config(session: Session) -> DecoderConfig:
    """Return the reference's shape; see `ref_shape`."""
    return ref_shape(session.config, tokenizer(session).vocab_size)


def ref_shape(config: ConfigDict, vocab_size: int | None) -> DecoderConfig:
    """Return the reference's shape, computed in the config's dtype, by default the folder's own.

    Args:
      vocab_size: the tokenizer's, for a model that is not from a folder.

    Raises:
      ValueError: for an impossible section `model`.
      UserError: for a folder without a supported model.
    """
    if ref := sources.folder(config, "ref"):
        return hf.read_config(ref, _dtype(config, ref), config.quantize)
    return _model_section(config, vocab_size)


def guide_config(session: Session) -> ValueConfig:
    """Return the guide's shape; see `guide_shape`."""
    return guide_shape(session.config, tokenizer(session).vocab_size, session.workdir.read_distribution())


def starts_from_guide(config: ConfigDict) -> bool:
    """Return true if the guide starts from an exported one, which keeps its distribution and its layers."""
    start = sources.folder(config, "guide")
    return start is not None and hf.is_guide(start)


def guide_shape(
    config: ConfigDict,
    vocab_size: int | None,
    chosen: tuple[str, tuple[float, ...]] | None = None,
    trunk: DecoderConfig | None = None,
) -> ValueConfig:
    """Return the guide's shape, with arguments and a dtype as in `ref_shape`.

    A UserError is also raised for a guide's folder that contradicts the section `value`.

    Args:
      chosen: distribution and atoms, where the config says "auto". Until they are chosen, "auto" is Bernoulli, or as
        the guide in the folder.
      trunk: shape of the model that the guide starts from, by default of the config's.
    """
    start = sources.folder(config, "guide") if trunk is None else None
    if start:
        trunk = hf.read_config(start, _dtype(config, start), config.quantize)
    elif trunk is None:
        trunk = ref_shape(config, vocab_size) if config.guide == "ref" else _model_section(config, vocab_size)
    section, is_guide = config.value, start is not None and hf.is_guide(start)
    if section.layers:
        if section.layers > trunk.layers or is_guide:
            what = "a guide, which keeps its own" if is_guide else f"one of {trunk.layers} layers"
            raise UserError(f"config.value.layers is {section.layers}, but the guide starts from {what}; give 0")
        trunk = trunk.first_layers(section.layers)
    stored = hf.read_guide_config(start, trunk.dtype) if is_guide else None
    if section.distribution != "auto":
        chosen = section.distribution, tuple(section.atoms)
    elif stored is not None:
        chosen = stored.distribution, stored.atoms
    distribution, atoms = chosen or ("bernoulli", ())
    shape = ValueConfig(trunk, type=section.type, distribution=distribution, atoms=atoms)
    if stored is not None:
        for name in ("type", "distribution", "atoms"):
            if (setting := getattr(shape, name)) != (present := getattr(stored, name)):
                raise UserError(
                    f"config.value.{name} is {setting!r}, but the guide in {start} has {present!r}; change the setting,"
                    " or start from another guide"
                )
    return shape


def fit_config(session: Session) -> ValueConfig:
    """Return the guide's shape, computed in `fit.dtype`."""
    return guide_config(session).computed_in(session.config.fit.dtype)


def trunk_configs(session: Session) -> dict[str, DecoderConfig]:
    """Return the shapes of the "reference" and of the trunk of the "guide"."""
    return {"reference": ref_config(session), "guide": guide_config(session).trunk}


def weights(session: Session) -> dict[str, Params]:
    """Return the models' weights in the form for decoding, as `jax.ShapeDtypeStruct`s."""
    config, shape = session.config, ref_config(session)
    stored = shape.dtype if sources.folder(config, "ref") else "float32"  # the dtype of training
    if trains_policy(config):
        learned: Any = LanguageModel(decoder.abstract(shape), shape)
    else:
        learned = ValueModel(value.abstract(guide_config(session)), guide_config(session))
    models = {"reference": LanguageModel(decoder.abstract(shape, stored), shape), "guide": learned}
    return {name: session.for_decoding(jax.eval_shape(quantized.model, models[name])).params for name in models}


def sampling(session: Session) -> Sampling:
    """Return the config's section `generate`, with the tokenizer's stop ids and vocabulary."""
    text = tokenizer(session)
    settings = dict(session.config.generate)
    settings["top_k_candidates"] = min(settings["top_k_candidates"], text.vocab_size)
    return Sampling(**settings, stop_ids=text.stop_ids, vocab_size=text.vocab_size)


def _dtype(config: ConfigDict, model: Path) -> str:
    return config.dtype or hf.stored_dtype(model)


def _model_section(config: ConfigDict, vocab_size: int) -> DecoderConfig:
    changes = dict(config.model)
    for name, owner in {"vocab_size": "the tokenizer's", "quantize": "config.quantize"}.items():
        if name in changes:
            raise ValueError(f"model.{name} is {owner}; remove it from the config")
    for field in dataclasses.fields(DecoderConfig):
        kind = typing.get_origin(field.type) or field.type
        value_ = changes.get(field.name, kind())
        if kind is tuple and isinstance(value_, list):  # of a config read from JSON
            changes[field.name] = value_ = tuple(value_)
        if type(value_) is not kind and not (kind is float and type(value_) is int):
            raise ValueError(f"model.{field.name} is {value_!r}; it must be of type {kind.__name__}")
    return model_configs.make(changes.pop("size"), **changes, vocab_size=vocab_size, quantize=config.quantize)


def check_folders(config: ConfigDict) -> None:
    """Check that the model folders exist, and the bases of adapters; a UserError names the setting or the folder."""
    for name, words in sources.NOT_FOLDERS.items():
        path = sources.folder(config, name)
        if path and not path.exists():
            raise UserError(
                f"config.{name} is {config[name]!r}, which is not a folder; give {', '.join(words)}, or a model's"
                " folder, GGUF file, or id on the Hugging Face hub (OWNER/NAME)"
            )
        if path:
            hf.base_of(path)


def check(session: Session) -> None:
    """Check that the folders hold what the config says, with one vocabulary, without reading weights.

    Raises:
      UserError: naming the folder; ValueError: for impossible sections.
    """
    ref, guide = sources.folder(session.config, "ref"), sources.folder(session.config, "guide")
    whose = f"the tokenizer in {ref}" if ref else "the task's tokenizer"
    check_vocabulary(tokenizer(session), trunk_configs(session), [guide] if guide else [], whose)
    for shape in trunk_configs(session).values():
        jax.eval_shape(quantized.model, LanguageModel(decoder.abstract(shape), shape))
    if ref:
        hf.check_weights(ref, "ref")
    if guide:
        hf.check_weights(guide, "guide" if hf.is_guide(guide) else "trunk")


# --- Weights --------------------------------------------------------------------------------------------------------


def load_ref(session: Session) -> LanguageModel:
    """Load the reference, from its folder or as pre-trained, in the form for decoding.

    The base of a policy's LoRA has its modules apart, as they are trained.

    Raises:
      UserError: if its pre-training is not finished, or what is read is damaged.
    """
    shape, mesh = ref_config(session), session.decode_mesh
    if ref := sources.folder(session.config, "ref"):
        progress.tell(f"loading the reference {session.config.ref}")
        unstack = functools.partial(decoder.unstack, transposed=cpu_form.here())
        read = LanguageModel(jax.eval_shape(unstack, decoder.abstract(shape, shape.dtype)), shape)
        shardings = _shardings(jax.eval_shape(quantized.model, read), mesh, sharding.DECODE)
        loaded = hf.load_ref(ref, dtype=shape.dtype, quantize=shape.quantize, shardings=shardings)
        is_base = trains_policy(session.config) and session.config.fit.lora_rank > 0
        return loaded if is_base else for_decoding(loaded)
    return session.for_decoding(quantized.model(pretrained(session)))


def pretrained(session: Session) -> LanguageModel:
    """Load the reference that was pre-trained in the workdir, in float32 on the mesh for fitting.

    Raises:
      UserError: if its pre-training is not finished, or the checkpoint is damaged.
    """
    checkpoints, shape = _finished(session.workdir.ref, "reference model", "run"), ref_config(session)
    shapes = session.for_fitting(LanguageModel(decoder.abstract(shape), shape))
    return shapes.replace(params=checkpoints.restore_params(shapes.params))


def load_guide(
    session: Session, number: int | None = None, ref: LanguageModel | None = None
) -> ValueModel | LanguageModel:
    """Load the guide fitted in a round, or the policy trained in it; by default in the last fitted round.

    A policy with a LoRA has the arrays of `ref`, which is loaded if it is not in memory.

    Raises:
      UserError: if there is none, or the checkpoint is damaged.
    """
    workdir = session.workdir
    number = fitted_rounds(workdir) or 1 if number is None else number
    progress.tell(f"loading what round {number} learned")
    if trains_policy(session.config):
        checkpoints = _finished(workdir.guide_folder(number), f"policy of round {number}", "run")
        shape = ref_config(session)
        if session.config.fit.lora_rank:
            params = _add_lora(session, load_ref(session) if ref is None else ref)
            learned, base = lora.split(params, ())
            learned = checkpoints.restore_params(session.for_fitting(LanguageModel(learned, shape)).params)
            return session.for_decoding(LanguageModel(lora.join(learned, base), shape))
        policy = session.for_fitting(LanguageModel(decoder.abstract(shape), shape))
        return session.for_decoding(policy.replace(params=checkpoints.restore_params(policy.params)))
    checkpoints = _finished(workdir.guide_folder(number), f"guide of round {number}", "fit")
    model = session.for_fitting(ValueModel(_fitted_shapes(session), guide_config(session)))
    params = checkpoints.restore_params(model.params)
    return session.for_decoding(model.replace(params={name: params[name] for name in params if name != "future"}))


def load_lora(session: Session, number: int) -> Params:
    """Load what a round's fit with LoRA learned: `lora_a` and `lora_b` of every kernel, and the head.

    Raises:
      UserError: if there is none, or the checkpoint is damaged.
    """
    config = session.config.fit
    add = functools.partial(lora.add, rank=config.lora_rank, alpha=config.lora_alpha)
    learned, _ = lora.split(jax.eval_shape(add, jax.random.key(0), _fitted_shapes(session)))
    folder = session.workdir.guide_folder(number)
    _finished(folder, f"guide of round {number}", "fit")
    return Checkpoints(folder / "lora").restore_params(learned)


def _fitted_shapes(session: Session) -> Params:
    """The shapes of what a fit saves: the guide, and the heads of the auxiliary loss."""
    shape = guide_config(session)
    shapes = value.abstract(shape)
    if offsets := session.config.fit.future_offsets:
        shapes["future"] = jax.eval_shape(lambda key: train.init_future(key, offsets, shape.trunk), jax.random.key(0))
    return shapes


def first_guide(session: Session, ref: LanguageModel | None) -> Params:
    """Return the float32 parameters, layers stacked, that the first guide starts from; a folder's are on `fit_mesh`.

    `ref` is the reference; it is not used if the guide's trunk comes from a folder.
    """
    config, shape = session.config, guide_config(session)
    start = sources.folder(config, "guide")
    shardings = _shardings(ValueModel(value.abstract(shape), shape), session.fit_mesh, sharding.FIT)
    if start and hf.is_guide(start):
        return hf.load_guide(start, dtype="float32", unstacked=False, shardings=shardings).params
    start = sources.folder(config, "ref") if config.guide == "ref" else start
    if start:
        progress.tell(f"loading the guide's first weights from {start}")
        trunk = hf.load_trunk(start, dtype="float32", shardings=shardings and shardings["trunk"]).params
    elif config.guide == "ref":
        trunk = (ref if config.quantize == "none" else pretrained(session)).params
    else:
        trunk = None
    if trunk is not None:
        trunk = decoder.first_layers(trunk, shape.trunk.layers)
    return value.init(session.key("guide"), shape, trunk)


def first_policy(session: Session, ref: LanguageModel) -> Params:
    """Return the parameters that a policy starts from, on `fit_mesh`; those that are learned are not pi_ref's arrays.

    They are float32 with layers stacked; `ref` is not used if it comes from a folder. With `fit.lora_rank` they are
    pi_ref's own arrays, with layers in a list, and a LoRA beside them in float32.
    """
    if session.config.fit.lora_rank:
        return session.for_fitting(ref.replace(params=_add_lora(session, ref))).params
    if start := sources.folder(session.config, "ref"):
        progress.tell(f"loading the policy's first weights from {start}")
        shape = ref_config(session)
        shardings = _shardings(LanguageModel(decoder.abstract(shape), shape), session.fit_mesh, sharding.FIT)
        return hf.load_ref(start, dtype="float32", unstacked=False, shardings=shardings).params
    return jax.tree.map(jnp.copy, session.for_fitting(ref).params)


def _add_lora(session: Session, ref: LanguageModel) -> Params:
    """Return pi_ref's parameters, layers in a list and no modules fused, with a LoRA of zero effect."""
    params = ref.params
    if not isinstance(params["layers"], list):
        params = decoder.unstack(params, transposed=cpu_form.here())
    return lora.add(session.key("lora"), params, session.config.fit.lora_rank, session.config.fit.lora_alpha)


def fitted_rounds(workdir: Workdir) -> int:
    """Return how many rounds, from the first on, have a fitted guide or a trained policy."""
    rounds = range(1, workdir.config.rounds + 1)
    return sum(1 for _ in itertools.takewhile(lambda number: _is_finished(workdir.guide_folder(number)), rounds))


def _is_finished(folder: Path) -> bool:
    return folder.exists() and Checkpoints(folder).finished()


def _finished(folder: Path, what: str, command: str) -> Checkpoints:
    if not _is_finished(folder):
        raise UserError(f"there is no {what} in {folder}; run `qsharp {command}` on this workdir first")

    return Checkpoints(folder)


def _shardings(model: LanguageModel | ValueModel, mesh: Mesh | None, rules: sharding.Rules) -> Params | None:
    return None if mesh is None else sharding.of_model(model, mesh, rules).params
