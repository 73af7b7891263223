"""Checks of the arguments of `generate` and `ContinuousBatch`, and their split into data and compiled settings.

Shapes: B prompts, R rows, G guides.
"""

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.decoding.state import RECORDS, Controls, Guide, Settings
from qsharp_jax.models import attention, cpu_form, kv_cache, memory, sharding, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.models.kv_cache import KVCache, Sizes
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import MODES, Sampling
from qsharp_jax.system.errors import UserError

SHARE = 0.4  # of a device's memory that caches may take; weights and what else runs need the rest
OF_FREE = 0.8  # of what the weights leave free
STREAMS = 2  # arrays of the residual stream's size that exist at once in prefill, by the TPU compiler
MOST_ROWS = {"cpu": 64}  # by platform
MOST_ROWS_ELSEWHERE = 256


def checked(
    ref: LanguageModel,
    guide: Guide | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    rng: Any,
    samples: int,
    rows: int,
    record: Collection[str],
) -> tuple[Guide | None, Controls, Settings]:
    """Check the arguments of `generate` against each other, and split `sampling` for the loop.

    `rows` are those of the loop; controls have an entry for each of the prompts' samples.

    Returns:
      the guide, None where none runs, and what is data of the compiled program and what is part of it.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1")
    vocab_size = ref.config.vocab_size if sampling.vocab_size is None else sampling.vocab_size
    responses = len(prompts) * samples
    controls, settings = split(sampling, rng, responses, rows, vocab_size, record)
    if sampling.weights is not None and isinstance(guide, ValueModel):
        guide = (guide,)
    weights = _checked_weights(guide, sampling.weights, responses, sampling.mode)
    if not isinstance(guide, LanguageModel) and np.isinf(controls.eta).all():
        guide = None
    for member in members(guide):
        if isinstance(member, ValueModel):
            check_guide(member.config, sampling, vocab_size)
        _check_vocabulary(ref, member, vocab_size)
    if guide is not None:
        controls = controls.replace(weights=weights)
    _check_prompts(ref, guide, prompts, controls.budget.reshape(-1, samples).max(1, initial=0), vocab_size)
    return guide, controls, settings


def split(
    sampling: Sampling, rng: Any, responses: int, rows: int, vocab_size: int, record: Collection[str]
) -> tuple[Controls, Settings]:
    """Split the settings into the per-response arrays and what is compiled in, for a loop of `rows` rows.

    Raises:
      UserError: for an array that has not one entry per response, or seeds out of range.
    """

    def per_row(name: str, value: Any, dtype: Any) -> np.ndarray:
        array = np.asarray(value, dtype)
        if array.ndim > 1 or (array.ndim == 1 and array.shape != (responses,)):
            raise UserError(f"{name} has shape {array.shape}; give one number, or one for each of the {responses} rows")
        return np.broadcast_to(array, (responses,))

    seeds = per_row("rng", row_seeds(rng, responses) if np.ndim(rng) == 0 and rng >= 0 else rng, np.int64)
    if not np.all((0 <= seeds) & (seeds < 2**32)):
        raise UserError(f"rng is {rng}; it must be 0 or more, and less than 2^32 where it is one per row")
    by_row = not cpu_form.here()  # a CPU, whose time goes into arithmetic, computes the mode that is asked for alone
    controls = Controls(
        eta=per_row("eta", sampling.eta, np.float32),
        temperature=per_row("temperature", sampling.temperature, np.float32),
        top_p=per_row("top_p", sampling.top_p, np.float32),
        top_k=per_row("top_k", np.minimum(sampling.top_k, vocab_size), np.int32),
        threshold=per_row("candidate_threshold", sampling.candidate_threshold, np.float32),
        budget=per_row("budget", sampling.max_new_tokens if sampling.budget is None else sampling.budget, np.int32),
        seed=seeds.astype(np.uint32),
        mode=per_row("mode", MODES.index(sampling.mode), np.int32) if by_row else None,
    )
    slots = 0 if sampling.candidate_slots is None else math.ceil(sampling.candidate_slots * rows)
    settings = Settings(
        stop_ids=tuple(sampling.stop_ids),
        vocab_size=vocab_size,
        candidates=sampling.top_k_candidates,
        slots=min(slots, rows * sampling.top_k_candidates),
        mode=MODES[0] if by_row else sampling.mode,
        others=sampling.others,
        truncate=bool((controls.top_p < 1).any() or (controls.top_k > 0).any() or (controls.temperature == 0).any()),
        top_k=bool((controls.top_k > 0).any()),
        record=tuple(name for name in RECORDS if name in record),
    )
    return controls, settings


def row_seeds(seed: int, rows: int) -> np.ndarray:
    """[rows] uint32 seeds drawn from one."""
    return np.random.SeedSequence(int(seed)).generate_state(rows)


def members(guide: Guide | None) -> tuple[ValueModel | LanguageModel, ...]:
    """Return the models that a guide consists of."""
    return guide if isinstance(guide, tuple) else () if guide is None else (guide,)


def guide_names(count: int) -> list[str]:
    """Names of `count` guides in messages."""
    return ["guide"] if count == 1 else [f"guide {number}" for number in range(1, count + 1)]


def _checked_weights(guide: Guide | None, given: Any, rows: int, mode: str) -> np.ndarray | None:
    """[rows, G], or None without weights."""
    if not isinstance(guide, tuple):
        if given is not None:
            raise UserError("weights are of guides; there is none here")
        return None
    types = {member.config.type if isinstance(member, ValueModel) else None for member in guide}
    if len(types) != 1 or None in types:
        raise UserError("guides that are composed must be V-types, or Q-types, all of them, and at least one")
    weights = np.asarray([] if given is None else given, np.float32)
    if weights.shape not in ((len(guide),), (rows, len(guide))) or not np.isfinite(weights).all():
        raise UserError(
            f"weights are {given}; give one finite number for each of the {len(guide)} guides, or such numbers for each"
            f" of the {rows} rows"
        )
    if mode == "expectation" and (weights <= 0).any():
        raise UserError(f'weights are {given}; in the mode "expectation" they must be above 0')
    return np.broadcast_to(weights, (rows, len(guide)))


def _check_prompts(
    ref: LanguageModel,
    guide: Guide | None,
    prompts: Sequence[Sequence[int]],
    budget: np.ndarray,
    vocab_size: int,
) -> None:
    """`budget` is the longest response of each prompt, [B]."""
    if not prompts:
        raise UserError("there are no prompts; give at least one")
    positions = {"reference": ref.config.max_positions}
    if guide is not None:
        positions["guide"] = min(value.trunk(member).config.max_positions for member in members(guide))
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {row} is empty; a prompt needs at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise UserError(f"prompt {row} has token ids outside the vocabulary of {vocab_size}")
        for name, longest in positions.items():
            if len(prompt) + budget[row] > longest:
                raise UserError(
                    f"prompt {row} has {len(prompt)} tokens, which with max_new_tokens = {budget[row]} is more than"
                    f" the {name}'s {longest} positions; shorten the prompt or the response"
                )


def check_memory(
    ref: LanguageModel,
    guide: Guide | None,
    sizes: Sizes,
    *,
    prompts: int,
    tokens: int,
    chunk: int = attention.CHUNK,
) -> None:
    """Check that caches and prefill fit into memory beside the weights, which are loaded already.

    Args:
      sizes: of all caches that there are at a time.
      prompts: prefilled at once.
      tokens: of the longest of them, padded.
      chunk: those of each that go through a model at once.
    """
    configs, weights = by_name(ref, guide)
    parts: dict[str, Any] = sharding.abstract_rows(caches(configs, sizes)) | dequantized(configs, weights)
    mesh = jax.sharding.get_mesh()
    works = [prefill_work(config, prompts, tokens, mesh, chunk) for config in configs.values()]
    existing = {f"the {name}'s weights": params for name, params in weights.items()}
    memory.check_memory(parts | {"the prefill": max(works, key=_bytes)}, existing=existing)


def by_name(ref: LanguageModel, guide: Guide | None) -> tuple[dict[str, DecoderConfig], dict[str, Params]]:
    """Return the configs of the decoders that run, and the models' parameters: of the "reference" and of the guides."""
    configs, weights = {"reference": ref.config}, {"reference": ref.params}
    for name, member in zip(guide_names(len(members(guide))), members(guide), strict=True):
        configs[name], weights[name] = value.trunk(member).config, member.params
    return configs, weights


def _check_vocabulary(ref: LanguageModel, guide: ValueModel | LanguageModel, vocab_size: int) -> None:
    # Embeddings of one vocabulary may be padded to different sizes.
    theirs, guides = ref.config.vocab_size, value.trunk(guide).config.vocab_size
    if vocab_size > min(theirs, guides):
        raise UserError(
            f"the guide's vocabulary has {guides} entries, the reference's {theirs}, of which {vocab_size} are in use;"
            " use a guide with the reference's vocabulary"
        )
    if isinstance(guide, LanguageModel) and guides != theirs:
        raise UserError(
            f"the policy has {guides} tokens in its embedding, the reference {theirs}; their logits are compared token"
            " by token, so pad them to one size"
        )


def check_guide(guide: ValueConfig, sampling: Sampling, vocab_size: int) -> None:
    never_negative = guide.distribution == "bernoulli" or (guide.distribution == "categorical" and guide.atoms[0] >= 0)
    if sampling.mode == "expectation" and not never_negative:
        raise UserError(
            'mode "expectation" takes the logarithm of the mean, so the guide must not give negative ones; use a'
            " bernoulli guide, or a categorical one with atoms of 0 and more"
        )
    if sampling.top_k_candidates > vocab_size:
        raise UserError(f"top_k_candidates is {sampling.top_k_candidates}; it must be in 1 .. {vocab_size}")
    if sampling.candidate_slots is not None and guide.type == "q":
        raise UserError("a Q-type guide reads all candidates at one position: leave candidate_slots out")


def caches(configs: Mapping[str, DecoderConfig], sizes: Sizes) -> dict[str, KVCache]:
    """The models' caches as `jax.ShapeDtypeStruct`s, for `memory.check_memory`.

    Args:
      configs: of the decoders that run, by name: "reference", "guide".
      sizes: see `cache_sizes`.
    """
    return {f"the {name}'s cache": _cache(config, sizes) for name, config in configs.items()}


def dequantized(configs: Mapping[str, DecoderConfig], weights: Mapping[str, Params]) -> dict[str, Any]:
    """The copies of quantized weights where the default device is a CPU, for `memory.check_memory`.

    Args:
      configs: as of `caches`.
      weights: the models' parameters, by the same names.
    """
    if not cpu_form.here():
        return {}
    copies = {name: cpu_form.dequantized_copies(weights[name], config) for name, config in configs.items()}
    return {f"the {name}'s {memory.DEQUANTIZED} weights": arrays for name, arrays in copies.items() if arrays}


def _cache(config: DecoderConfig, sizes: Sizes) -> KVCache:
    return kv_cache.abstract(config, sizes, int8=kv_cache.is_int8(config, on_cpu=cpu_form.here()))


def prefill_work(
    config: DecoderConfig, prompts: int, tokens: int, mesh: Any, chunk: int = attention.CHUNK
) -> list[jax.ShapeDtypeStruct]:
    """The arrays that prefill has at its peak beside weights and caches, with their shardings on the mesh.

    Args:
      prompts: at once.
      tokens: of each, padded.
      chunk: those of each that go through the model at once.
    """
    chunk = min(tokens, chunk)
    keys = attention.KEYS if tokens > chunk else tokens
    dtype, array = config.compute_dtype, functools.partial(sharding.abstract, mesh=mesh)
    stream = array((prompts, chunk, config.embed), dtype, ("stream", None, None))
    scores = array((prompts, config.heads, chunk, keys), jnp.float32, ("batch", "heads", None, None))
    hidden = array((prompts, chunk, config.mlp), dtype, ("stream", None, "mlp"))
    # Of whole prompts keys and values are kept beside the cache, of chunks they are written into it.
    kept = array((prompts, config.kv_heads, tokens, config.head_dim), dtype, sharding.CACHE)
    of_whole = [kept] * 2 * config.layers if tokens <= chunk else []
    # Scores and their exponentials, or what gate and up give.
    return [stream] * STREAMS + [max(scores, hidden, key=_bytes)] * 2 + of_whole


def rows_that_fit(configs: Sequence[DecoderConfig], size: int, weights: Any = None) -> int:
    """Return the largest power of two of rows whose caches fit on the devices, at most 64 on a CPU, else 256.

    The devices are those of the mesh that is set, else the default device.

    Args:
      configs: of the decoders that run.
      size: positions, see `cache_size`.
      weights: a tree of `jax.ShapeDtypeStruct`s that are still to be loaded or copied; by default the rows depend on
        the device alone, not on what is free there.
    """
    device = memory.default_device()
    room = SHARE * memory.total(device)
    if weights is not None and (free := memory.available(device)) is not None:
        room = min(room, OF_FREE * (free - _bytes(weights)))
    parts = sharding.round_rows(1)  # the fewest rows that the mesh divides
    per_part = sum(_bytes(sharding.abstract_rows(_cache(config, Sizes(parts, size)))) for config in configs)
    rows = max(1, min(MOST_ROWS.get(device.platform, MOST_ROWS_ELSEWHERE), parts * int(room / per_part)))
    return 1 << (rows.bit_length() - 1)


def _bytes(tree: Any) -> int:
    """Bytes on each device."""
    platform = memory.default_device().platform
    return math.ceil(sum(
        math.prod(leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape))
        * memory.item_bytes(leaf.dtype, platform)
        for leaf in jax.tree.leaves(tree)
    ))  # fmt: skip
