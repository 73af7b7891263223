"""The job to plan: shapes of the two models and sizes of a run's batches, from its config, without any weights.

Models in folders and on the Hugging Face hub only need their config.json; `--ref-size` and `--guide-size` name
published shapes instead.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from qsharp_jax import decoding, train
from qsharp_jax.data.batches import Batch
from qsharp_jax.models import config as model_configs
from qsharp_jax.models import cpu_form, decoder, lora, memory, meshes, quantized, sharding, value
from qsharp_jax.models.attention import Attention, kind_of
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.models.hf import hub
from qsharp_jax.models.kv_cache import Sizes
from qsharp_jax.models.sharding import placed
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.run import attention, models, sources
from qsharp_jax.run.config import row_width, trains_policy
from qsharp_jax.system.errors import UserError, nearest

DTYPE_OF_SIZE = "bfloat16"  # dtype of models given by a size, unless the config sets one


@dataclasses.dataclass(frozen=True)
class Job:
    """Shapes and sizes of a run."""

    config: ConfigDict
    # ref, guide: the models as decoded, but with stacked layers, of `jax.ShapeDtypeStruct`s. The guide has float32
    # weights, as fitted, and is computed in its trunk's dtype, or in decoding as `decoded_guide`. A policy stands there
    # as a Q-type guide, whose head has the shape of its own, with weights in the dtype of sampling.
    ref: LanguageModel
    guide: ValueModel
    # the parameters of a fit, in float32: the guide or policy, the heads of the auxiliary loss, and a LoRA; a policy
    # below its LoRA has pi_ref's dtype
    fitted: Params
    fit_tokens: int  # tokens per row of the fit
    prompt_tokens: int  # of the longest prompt

    @property
    def is_policy(self) -> bool:
        """True if the run trains a policy, beside which pi_ref stays in memory."""
        return trains_policy(self.config)

    @property
    def fit_rows(self) -> int:
        """Rows of a step of the fit."""
        return self.config.policy.batch_size if self.is_policy else self.config.fit.batch_size

    def cache_sizes(self, section: Any, rows: int) -> Sizes:
        """Sizes of the caches of collection, with `rows` rows on a mesh's section."""
        sampling, samples = self.config.generate, self.config.collect.samples
        parts = math.prod(section["decode"][axis] for axis in meshes.MESH_AXES["decode"] if axis != "tensor")
        tokens = self.prompt_tokens, sampling.max_new_tokens
        bucket, on_cpus = sampling.prompt_bucket, on_cpu(section)
        return decoding.loop_sizes(rows, samples, *tokens, bucket, parts=parts, on_cpu=on_cpus)

    @property
    def optimizer(self) -> ConfigDict:
        return self.config.policy.optimizer if self.is_policy else self.config.fit.optimizer

    @property
    def decoded_guide(self) -> ValueModel:
        """The guide with the weights of decoding: quantized if the config says so."""
        return jax.eval_shape(quantized.model, self.guide)

    @property
    def learner(self) -> str:
        return "policy" if self.is_policy else "guide"


def on_cpu(section: Any) -> bool:
    """Return true for a mesh of CPUs; one of "any" devices is of those that JAX has here."""
    return section["platform"] == "cpu" or (section["platform"] == "any" and cpu_form.here())


def make(
    config: ConfigDict, *, ref_size: str | None = None, guide_size: str | None = None, prompt_tokens: int | None = None
) -> Job:
    """Return the job of a config, with other models if sizes of `models.config.SIZES` are given.

    Args:
      prompt_tokens: length of the longest prompt; by default the smallest bucket.

    Raises:
      UserError: for an unknown size, an invalid model, or a context that is too short for the run.
    """
    config = _with_folders(config)
    try:
        ref, guide = _shapes(config, ref_size, guide_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    new = config.generate.max_new_tokens
    prompt = config.generate.prompt_bucket if prompt_tokens is None else prompt_tokens
    for name, shape in {"reference": ref, "guide": guide.trunk}.items():
        if prompt + new > shape.max_positions:
            raise UserError(
                f"prompts of {prompt} tokens with {new} new ones exceed the {name}'s {shape.max_positions} positions;"
                " give a smaller --prompt-tokens or config.generate.max_new_tokens"
            )
    is_new = ref_size is None and sources.folder(config, "ref") is None
    stored = "float32" if is_new else ref.dtype
    name, width = row_width(config)
    guide_params, is_policy = value.abstract(guide), trains_policy(config)
    job = Job(
        config=config,
        ref=jax.eval_shape(quantized.model, LanguageModel(decoder.abstract(ref, stored), ref)),
        guide=ValueModel(_in_dtype(guide_params, ref.dtype) if is_policy else guide_params, guide),
        fitted=_in_dtype(guide_params, stored) if is_policy and config.fit.lora_rank else guide_params,
        fit_tokens=width if name == "pack_length" else -(-(prompt + new) // width) * width,
        prompt_tokens=prompt,
    )
    if offsets := config.fit.future_offsets:
        heads = jax.eval_shape(lambda key: train.init_future(key, offsets, guide.trunk), jax.random.key(0))
        job = dataclasses.replace(job, fitted=job.fitted | {"future": heads})
    if rank := config.fit.lora_rank:
        add = functools.partial(lora.add, rank=rank, alpha=config.fit.lora_alpha)
        job = dataclasses.replace(job, fitted=jax.eval_shape(add, jax.random.key(0), job.fitted))
    return job


def learned(job: Job, params: Params) -> tuple[Params, Params]:
    """Split fitted parameters into those that the optimizer changes and those that a LoRA freezes."""
    return lora.split(params, () if job.is_policy else None) if job.config.fit.lora_rank else (params, {})


def fitted_state(job: Job, section: Any) -> tuple[Params, Params, Any]:
    """Return the fit's parameters on a mesh's section, those of them that are learned, and the optimizer's state."""
    mesh, guide = abstract_mesh(section, "fit"), job.guide.config
    params = placed(job.fitted, sharding.of_model(ValueModel(job.fitted, guide), mesh, sharding.FIT).params)
    changed, _ = learned(job, params)
    optimizer = train.make_optimizer(job.optimizer)
    moments = placed(jax.eval_shape(optimizer.init, changed), train.state_shardings(changed, optimizer).opt_state)
    return params, changed, moments


def _in_dtype(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), params)


def attention_of(job: Job, section: Any) -> Attention:
    """Return the attention of the fit on the devices of a mesh's section, GPUs as new as cuDNN's attention needs."""
    kind = "cuda" if section["platform"] == "gpu" else section["platform"]
    if kind == "any":
        kind = kind_of(memory.default_device())
    return attention.of_config(job.config, job.guide.config.computed_in(job.config.fit.dtype).trunk, kind)


def _with_folders(config: ConfigDict) -> ConfigDict:
    """Return the config with ids on the Hugging Face hub as folders in its cache, which need no weights."""
    config = config.copy_and_resolve_references()
    for name in sources.NOT_FOLDERS:
        if hub.is_id(config[name]):
            config[name] = str(hub.find(config[name], weights=False))
    return config


def _shapes(config: ConfigDict, ref_size: str | None, guide_size: str | None) -> tuple[DecoderConfig, ValueConfig]:
    kind = dict(dtype=config.dtype or DTYPE_OF_SIZE, quantize=config.quantize)
    if ref_size:
        ref = _sized("--ref-size", ref_size, **kind)
    else:
        models.check_folders(config)
        vocab_size = None if sources.folder(config, "ref") else models.make_tokenizer(config).vocab_size
        ref = models.ref_shape(config, vocab_size)
    if trains_policy(config):
        return ref, ValueConfig(ref, type="q")
    trunk = ref if ref_size and config.guide == "ref" else None
    if guide_size:
        trunk = _sized("--guide-size", guide_size, **kind)
    return ref, models.guide_shape(config, ref.vocab_size, trunk=trunk)


def _sized(option: str, size: str, *, dtype: str, quantize: str) -> DecoderConfig:
    if size not in model_configs.SIZES:
        raise UserError(f"{option} {size} is not known; {nearest(size, model_configs.SIZES)}")
    return model_configs.make(size, dtype=dtype, quantize=quantize)


# --- On a mesh ------------------------------------------------------------------------------------------------------


def abstract_mesh(section: Any, use: str) -> AbstractMesh:
    """Return the mesh of a section, without devices."""
    axes = meshes.MESH_AXES[use]
    return AbstractMesh(tuple(section[use][axis] for axis in axes), axes, (AxisType.Auto,) * len(axes))


def divided(count: int, tensor: int) -> int:
    """Return a chip's share of heads or hidden units: all of them where the mesh does not divide them."""
    return count if count % tensor else count // tensor


def shared(trunk: DecoderConfig, tensor: int) -> int:
    """Return the number of a chip's query heads per kv head."""
    heads = divided(trunk.heads, tensor)
    return heads // math.gcd(divided(trunk.kv_heads, tensor), heads)


def chip_bytes(tree: Any, section: Any) -> int:
    """Count the bytes of abstract arrays with shardings on each chip of a mesh's section."""
    platform = "cpu" if on_cpu(section) else section["platform"]
    sizes = (
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * memory.item_bytes(leaf.dtype, platform)
        for leaf in jax.tree.leaves(tree)
    )
    return math.ceil(sum(sizes))


def abstract_batch(rows: int, length: int) -> Batch:
    """Return the shapes of a batch of the fit, [rows, length] each."""
    numbers, flags, rewards = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in ("int32", "bool", "float32"))
    return Batch(
        tokens=numbers, segments=numbers, positions=numbers, response_mask=flags, label_mask=flags,
        reward_to_go=rewards,
    )  # fmt: skip
