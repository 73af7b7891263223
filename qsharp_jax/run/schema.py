"""The settings of a run: one dataclass per section of its config, one field per setting.

The checks, the defaults of a recipe, `qsharp run --help` and docs/config.md are derived from it. `generate` is a part
of `Sampling`; the sections of algorithms are in their files; `task` and `model` are checked by the task and by
`DecoderConfig`.
"""

import collections.abc
import dataclasses
import itertools
import math
import typing
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict, config_dict

from qsharp_jax.algorithms import registry
from qsharp_jax.sampling import ETA, LEAST_ETA, Sampling
from qsharp_jax.system import loggers
from qsharp_jax.system.settings import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_FINITE,
    TEXT,
    TRUTH,
    UNIT,
    Rule,
    is_number,
    is_whole,
    one_of,
    setting,
    whole,
)

GENERATE = (
    "temperature", "top_p", "top_k", "top_k_candidates", "candidate_slots", "others", "max_new_tokens", "stop",
    "prompt_bucket",
)  # fmt: skip


def _list(words: str, passes: typing.Callable[[list], bool]) -> Rule:
    return Rule(lambda v: isinstance(v, list) and passes(v), words)


def _different(items: list) -> bool:
    return len(items) == len({*items})


FLOATS = Rule(lambda v: v in (None, "float32", "bfloat16"), "float32, bfloat16, or none for the model's own")
ETAS = _list(
    f"a list of finite numbers, at least {LEAST_ETA:g}",
    lambda v: v != [] and all(ETA.passes(x) and x < math.inf for x in v),
)
ASCENDING = _list(
    "a list of finite numbers, each above the one before",
    lambda v: all(map(is_number, v)) and all(-math.inf < a < b < math.inf for a, b in itertools.pairwise(v)),
)
PASS_AT = _list(
    "a list of different whole numbers, at least 1",
    lambda v: all(is_number(x) and x >= 1 and x % 1 == 0 for x in v) and _different(v),
)
SEEDS = _list(
    "a list of different whole numbers, at least 0",
    lambda v: v != [] and all(is_whole(x) and x >= 0 for x in v) and _different(v),
)
METHODS = _list(
    f"a list of different ones of {', '.join(registry.ALGORITHMS)}",
    lambda v: v != [] and all(x in registry.ALGORITHMS for x in v) and _different(v),
)
NAMES_OF_LOGGERS = _list(
    f"a list of different ones of {', '.join(loggers.LOGGERS)}",
    lambda v: all(x in loggers.LOGGERS for x in v) and _different(v),
)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer and its schedule."""

    name: str = setting(
        "muon", one_of("adamw", "adafactor", "muon"), "adafactor stores moments of rows and columns only"
    )
    learning_rate: float = setting(0.02, POSITIVE_FINITE, "peak learning rate")
    adam_learning_rate: float = setting(4e-3, POSITIVE_FINITE, "of Muon's AdamW, for all but the blocks' matrices")
    weight_decay: float = setting(0.01, NOT_NEGATIVE, "decoupled weight decay")
    b2: float = setting(0.98, FRACTION, "AdamW's decay of the second moment")
    clip: float = setting(1.0, POSITIVE, "largest global norm of the gradient; inf for no clipping")
    warmup_steps: int = setting(50, whole(0), "linear warm-up", unit="steps")
    schedule: str = setting("cosine", one_of("constant", "cosine"), "after the warm-up")
    end_fraction: float = setting(0.05, UNIT, "learning rate at the end, as a fraction of the peak")


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """The reference, trained in the workdir by maximum likelihood on the task's texts (with ref = pretrain)."""

    steps: int = setting(1600, whole(0), "maximum number of steps")
    stop_loss: float = setting(0.0, NOT_NEGATIVE, "stop early at this loss", unit="nats per response token")
    batch_size: int = setting(32, whole(1), "texts per step")
    length_bucket: int = setting(24, whole(1), "batches are padded to multiples of this", unit="tokens")
    log_every: int = setting(50, whole(1), "steps between lines of metrics")
    save_every: int = setting(400, whole(1), "steps between checkpoints")
    optimizer: Optimizer = Optimizer()


@dataclasses.dataclass(frozen=True)
class Value:
    """The guide's trunk and head."""

    layers: int = setting(0, whole(0), "the first layers of the model that the guide starts from; 0: all of them")
    type: str = setting("v", one_of("v", "q"), "v: read at the appended token; q: a head over the vocabulary")
    distribution: str = setting(
        "bernoulli", one_of("auto", "bernoulli", "categorical", "scalar"),
        "distribution of the reward-to-go; auto: bernoulli if all rewards of round 1 are 0 or 1, else categorical",
    )  # fmt: skip
    atoms: tuple[float, ...] = setting((), ASCENDING, "rewards of the categorical's atoms")


@dataclasses.dataclass(frozen=True)
class Collect:
    """Rollouts of a round."""

    prompts: int = setting(600, whole(1), "problems per round: new ones in each, but of a data set or a file the same")
    samples: int = setting(4, whole(1), "rollouts per problem")
    eta: float = setting(0.1, ETA, "weight of the KL to the reference; used by the roll-in from round 2 on")
    batch_size: int = setting(250, whole(1), "rows decoded at once; a finished row takes the next prompt")
    shard_rows: int = setting(1200, whole(1), "rollouts per file")
    drop_no_variation: bool = setting(
        False, TRUTH, "fit the guide without problems whose rollouts of a round all have the same reward"
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """The fit of a guide.

    Policies take accumulate, remat, dtype, attention, lora_rank, lora_alpha, length_bucket and save_every from here.
    """

    epochs: int = setting(5, whole(1), "passes over the rollouts of all rounds")
    batch_size: int = setting(32, whole(1), "rollouts per step")
    accumulate: int = setting(1, whole(1), "sequential parts of a batch, to save memory; the update is the same")
    remat: str = setting(
        "dots", one_of("none", "dots", "full"),
        "saved for the gradient: none: everything; dots: matrix products; full: the blocks' inputs only",
    )  # fmt: skip
    dtype: str | None = setting(None, FLOATS, "dtype of the fit's computation")
    attention: str = setting(
        "auto", one_of("auto", "xla", "blocks", "cudnn", "splash"),
        "auto: the fastest; xla: everywhere; blocks: long sequences on a CPU; cudnn: CUDA, bfloat16; splash: TPUs",
    )  # fmt: skip
    lora_rank: int = setting(0, whole(0), "rank of learned updates of the blocks' kernels; 0: learn all weights")
    lora_alpha: float = setting(16.0, POSITIVE_FINITE, "the updates are multiplied by this over the rank")
    length_bucket: int = setting(24, whole(1), "batches are padded to multiples of this", unit="tokens")
    pack_length: int = setting(
        0, whole(0), "length of rows that several rollouts share; 0: one rollout per row", unit="tokens"
    )
    holdout: float = setting(0.05, FRACTION, "fraction of the prompts to evaluate the guide on instead of fitting")
    evaluate_every: int = setting(0, whole(0), "steps between evaluations of the guide; 0: only at the end")
    patience: int = setting(
        0, whole(0), "stop after this many evaluations without a lower held-out error, and keep the best guide; 0: off"
    )
    projection: str = setting("two_hot", one_of("two_hot", "nearest"), "how rewards are put on a categorical's atoms")
    clip_rewards: bool = setting(False, TRUTH, "clip rewards to the range of the guide's distribution")
    warm_start: bool = setting(True, TRUTH, "start from the previous round's guide; the paper starts anew")
    future_offsets: int = setting(0, whole(0), "later tokens that the auxiliary loss predicts; 0: off")
    future_weight: float = setting(1.0, NOT_NEGATIVE, "weight of the auxiliary loss")
    log_every: int = setting(50, whole(1), "steps between lines of metrics")
    save_every: int = setting(250, whole(1), "steps between checkpoints")
    optimizer: Optimizer = Optimizer()


@dataclasses.dataclass(frozen=True)
class Policy:
    """Algorithms that train a copy of the reference."""

    batch_size: int = setting(64, whole(1), "rollouts per step; both of a pair count")
    prompts: int = setting(
        64, whole(1), "problems per batch of rollouts, each sampled collect.samples times; algorithms with a value head"
    )
    log_prob_limit: float = setting(
        0.0, NOT_NEGATIVE, "largest mean difference between sampler and trainer; 0: 1e-4 in float32, 0.05 in bfloat16",
        unit="nats",
    )  # fmt: skip
    detach_values: bool = setting(True, TRUTH, "the value head's error trains only the head, not the trunk")
    optimizer: Optimizer = Optimizer(name="adamw", learning_rate=1e-3, adam_learning_rate=1e-3)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """The evaluation on test problems."""

    problems: int = setting(500, whole(1), "test problems")
    samples: int = setting(8, whole(1), "samples of pi_ref per problem, for pass@k, majority and best of k")
    guided_samples: int = setting(1, whole(1), "samples of the guide or policy per problem and eta; the paper has 8")
    pass_at: tuple[float, ...] = setting((), PASS_AT, "k of pass@k, at most samples; (): 1, 2, 4, ... up to samples")
    etas: tuple[float, ...] = setting((0.5, 0.2, 0.1, 0.05), ETAS, "etas at which the last guide is evaluated")
    power: float = setting(
        1.0, POSITIVE_FINITE, "further evaluation of the last guide with its tilt to this power; 1: none"
    )
    batch_size: int = setting(250, whole(1), "rows decoded at once")


@dataclasses.dataclass(frozen=True)
class FitMesh:
    """Sizes of the axes of the mesh for fitting."""

    data: int = setting(1, whole(1), "copies of the weights, each with a part of the rows")
    fsdp: int = setting(1, whole(1), "parts of the weights, each with a part of the rows")
    tensor: int = setting(1, whole(1), "parts of heads and hidden units")


@dataclasses.dataclass(frozen=True)
class DecodeMesh:
    """Sizes of the axes of the mesh for decoding."""

    data: int = setting(1, whole(1), "copies of the weights, each with a part of the rows")
    attention_data: int = setting(1, whole(1), "parts of the rows in attention, of heads and hidden units elsewhere")
    tensor: int = setting(1, whole(1), "parts of heads and hidden units")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices: `--config.mesh=NAME` takes a preset of configs/meshes.py."""

    name: str = setting("single", Rule(TEXT.passes, "a preset's name"), "the preset")
    platform: str = setting("any", one_of("any", "cpu", "gpu", "tpu"), "the devices' platform, as in JAX")
    kind: str = setting("one device", Rule(TEXT.passes, "words for its devices"), "description of the devices")
    topology: str = setting(
        "", Rule(lambda v: isinstance(v, str), "a TPU slice, as v5e:2x4, or empty"), "of one TPU slice"
    )
    slices: int = setting(1, whole(1), "slices")
    hosts: int = setting(1, whole(1), "hosts per slice")
    devices_per_host: int = setting(1, whole(1), "devices per host")
    fit: FitMesh = FitMesh()
    decode: DecodeMesh = DecodeMesh()
    flops: float = setting(0.0, NOT_NEGATIVE, "dense bfloat16 FLOP/s per device; 0: not known")
    hbm_bytes: int = setting(0, whole(0), "memory per device; 0: not known")
    vmem_bytes: int = setting(0, whole(0), "fast memory per device, where the compiler keeps a layer's temporaries")
    hbm_bandwidth: float = setting(0.0, NOT_NEGATIVE, "of a device's memory", unit="bytes/s")
    ici_bandwidth: float = setting(0.0, NOT_NEGATIVE, "into a device from its slice, over all links", unit="bytes/s")
    dcn_bandwidth: float = setting(0.0, NOT_NEGATIVE, "into a device from other slices", unit="bytes/s")


@dataclasses.dataclass(frozen=True)
class Compare:
    """`qsharp compare` only. `changes` holds overrides of single algorithms, as `changes.NAME = ("fit.epochs=2",)`."""

    methods: tuple[str, ...] = setting((*registry.ALGORITHMS,), METHODS, "algorithms to compare")
    seeds: tuple[int, ...] = setting((0, 1, 2), SEEDS, "one run per algorithm and seed")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run."""

    seed: int = setting(0, whole(0), "seed of everything that is random")
    algorithm: str = setting(
        registry.DEFAULT, one_of(*registry.ALGORITHMS),
        f"{', '.join(registry.names('guide'))} learn a guide; the others train a copy of the reference",
    )  # fmt: skip
    rounds: int = setting(2, whole(1), "rounds of rollouts and training")
    ref: str = setting(
        "pretrain", Rule(TEXT.passes, "pretrain, or a model"),
        "the reference: pretrain trains it by the sections model and pretrain; or a folder as transformers saves it,"
        " a GGUF file, or an id on the Hugging Face hub (OWNER/NAME or OWNER/NAME@REVISION)",
    )  # fmt: skip
    guide: str = setting(
        "ref", Rule(TEXT.passes, "ref, scratch, or a model"),
        "how the first guide starts: ref: from the reference's weights; scratch: at random, by the section model; or a"
        " model or guide, given like ref",
    )  # fmt: skip
    dtype: str | None = setting(None, FLOATS, "dtype of models in folders")
    quantize: str = setting(
        "none", one_of("none", "int8", "int4"),
        "weights of decoding, with int8 keys and values: the reference is then this; guides are fitted in float32",
    )  # fmt: skip
    prompt_format: str = setting(
        "plain", one_of("plain", "chat"), "chat: one turn in the chat template of the reference's folder"
    )
    loggers: tuple[str, ...] = setting(
        loggers.DEFAULT, NAMES_OF_LOGGERS,
        "where the numbers of metrics.jsonl go as well; wandb and mlflow are packages to install",
    )  # fmt: skip
    pretrain: Pretrain = Pretrain()
    value: Value = Value()
    generate: Sampling = Sampling()
    collect: Collect = Collect()
    fit: Fit = Fit()
    policy: Policy = Policy()
    evaluate: Evaluate = Evaluate()
    mesh: Mesh = Mesh()
    compare: Compare = Compare()


def sections() -> dict[str, Any]:
    """Return the defaults of every section by its dotted name, from the outermost in; "" is the config itself."""
    algorithms = {name: record.settings for name, record in registry.ALGORITHMS.items() if record.settings is not None}
    return dict(_sections("", Run())) | algorithms


def _sections(prefix: str, section: Any) -> Iterator[tuple[str, Any]]:
    yield prefix, section
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(value := getattr(section, field.name)):
            yield from _sections(f"{prefix}.{field.name}".lstrip("."), value)


def settings(section: Any) -> dict[str, dataclasses.Field]:
    """Return the settings directly in a section, by name."""
    fields = {field.name: field for field in dataclasses.fields(section) if "rule" in field.metadata}
    return {name: fields[name] for name in GENERATE} if isinstance(section, Sampling) else fields


RULES: dict[str, Rule] = {
    f"{key}.{name}".lstrip("."): field.metadata["rule"]
    for key, section in sections().items()
    for name, field in settings(section).items()
}

ITEM_TYPES: dict[str, type] = {  # of settings that are lists
    f"{key}.{name}".lstrip("."): typing.get_args(types[name])[0]
    for key, section in sections().items()
    for types in [typing.get_type_hints(type(section))]
    for name in settings(section)
    if typing.get_origin(types[name]) in (tuple, collections.abc.Sequence)
}


def default_config() -> ConfigDict:
    """Return a config of all defaults but `compare`, with empty sections `task` and `model`, for a recipe to change."""

    config = ConfigDict()
    for key, section in sections().items():
        if key.partition(".")[0] in ("mesh", "compare"):
            continue
        parent, _, name = key.rpartition(".")
        if key:
            (config[parent] if parent else config)[name] = ConfigDict()
        part = config[key] if key else config
        types = typing.get_type_hints(type(section))
        for name in settings(section):
            value = getattr(section, name)
            part[name] = config_dict.placeholder(typing.get_args(types[name])[0]) if value is None else value
    config.mesh = "single"
    config.task, config.model = ConfigDict(), ConfigDict()
    return config
