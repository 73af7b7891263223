"""What is planned: the shapes of the two models and the sizes of a run's batches, from its config, without a weight.

Models in folders need their config.json alone; `--ref-size` and `--guide-size` name published shapes instead.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from qsharp_jax import generate, train
from qsharp_jax.models import config as model_configs
from qsharp_jax.models import decoder, lora, meshes, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.run import models
from qsharp_jax.system.errors import UserError, nearest
from qsharp_jax.tasks import registry

WITH_A_SIZE = "bfloat16"  # of models that are given by a size alone, where the config does not say


@dataclasses.dataclass(frozen=True)
class Job:
    """Attributes:
    config: of the run.
    ref, guide: the models as a run decodes with them, but with stacked layers, of `jax.ShapeDtypeStruct`s. The guide
      has the float32 weights that were fitted, and is computed in its trunk's dtype.
    fitted: what a fit has, float32: the guide, the heads of the auxiliary loss, and a LoRA.
    fit_tokens: of a row in the fit.
    cache_size: positions of the caches in decoding.
    """

    config: ConfigDict
    ref: LanguageModel
    guide: ValueModel
    fitted: Params
    fit_tokens: int
    cache_size: int


def make(
    config: ConfigDict, *, ref_size: str | None = None, guide_size: str | None = None, prompt_tokens: int | None = None
) -> Job:
    """The job of a config, with other models if their sizes are named.

    Args:
      ref_size, guide_size: of `models.config.SIZES`.
      prompt_tokens: of the longest prompt; by default as many as the least bucket has.

    Raises:
      UserError: for a size that is not known, a model that cannot be, or a context that is too short for the run.
    """
    try:
        ref, guide = _shapes(config, ref_size, guide_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    new = config.generate.max_new_tokens
    prompt = config.generate.prompt_bucket if prompt_tokens is None else prompt_tokens
    for name, shape in {"reference": ref, "guide": guide.trunk}.items():
        if prompt + new > shape.max_positions:
            raise UserError(
                f"prompts of {prompt} tokens with {new} new ones are more than the {name}'s {shape.max_positions}"
                " positions; give a smaller --prompt-tokens or config.generate.max_new_tokens"
            )
    bucket, fitted = config.fit.length_bucket, value.abstract(guide)
    made_here = ref_size is None and models.folder(config, "ref") is None
    job = Job(
        config=config,
        ref=LanguageModel(decoder.abstract(ref, "float32" if made_here else ref.dtype), ref),
        guide=ValueModel(fitted, guide),
        fitted=fitted,
        fit_tokens=config.fit.pack_length or -(-(prompt + new) // bucket) * bucket,
        cache_size=generate.cache_size(prompt, new, config.generate.prompt_bucket),
    )
    if offsets := config.fit.future_offsets:
        heads = jax.eval_shape(lambda key: train.init_future(key, offsets, guide.trunk), jax.random.key(0))
        job = dataclasses.replace(job, fitted=fitted | {"future": heads})
    if rank := config.fit.lora_rank:
        add = functools.partial(lora.add, rank=rank, alpha=config.fit.lora_alpha)
        job = dataclasses.replace(job, fitted=jax.eval_shape(add, jax.random.key(0), job.fitted))
    return job


def learned(job: Job, params: Params) -> tuple[Params, Params]:
    """Of the fitted parameters those that the optimiser changes, and those that a LoRA leaves frozen."""
    return lora.split(params) if job.config.fit.lora_rank else (params, {})


def _shapes(config: ConfigDict, ref_size: str | None, guide_size: str | None) -> tuple[DecoderConfig, ValueConfig]:
    in_folder = models.folder(config, "ref")
    dtype = config.dtype or WITH_A_SIZE
    if ref_size:
        ref = _sized("--ref-size", ref_size, dtype)
    else:
        models.check_folders(config)
        text = None if in_folder else models.make_text(config, registry.get(config.task.name))
        ref = models.ref_config(config, text)
    section = config.value
    kind = dict(type=section.type, distribution=section.distribution, atoms=tuple(section.atoms))
    if guide_size:
        return ref, ValueConfig(_sized("--guide-size", guide_size, dtype), **kind)
    if ref_size and config.guide == "ref":
        return ref, ValueConfig(ref, **kind)
    return ref, models.guide_config(config, SimpleNamespace(vocab_size=ref.vocab_size))


def _sized(option: str, size: str, dtype: str) -> DecoderConfig:
    if size not in model_configs.SIZES:
        raise UserError(f"{option} {size} is not known; {nearest(size, model_configs.SIZES)}")
    return model_configs.make(size, dtype=dtype)


# --- On a mesh ------------------------------------------------------------------------------------------------------


def abstract_mesh(section: Any, use: str) -> AbstractMesh:
    """The mesh of a section, without devices."""
    axes = meshes.MESH_AXES[use]
    return AbstractMesh(tuple(section[use][axis] for axis in axes), axes, (AxisType.Auto,) * len(axes))


def chip_bytes(tree: Any) -> int:
    """Of abstract arrays with shardings, what lies on each chip."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = jnp.dtype(leaf.dtype).itemsize
        for extent in leaf.sharding.shard_shape(leaf.shape):
            size *= extent
        total += size
    return total
