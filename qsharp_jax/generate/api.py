"""`generate` and `stream`: from lists of tokens to the loop's arrays, and back.

Shapes: B prompts, P their padded length, R rows, N new tokens, V vocabulary, K candidates.
"""

import functools
import math
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qsharp_jax.generate.loop import BLOCK, decode, prefill
from qsharp_jax.generate.state import (
    RECORDED,
    Controls,
    Generation,
    Guide,
    Record,
    Settings,
    State,
    first_state,
    gives_values,
)
from qsharp_jax.models import cpu_form, decoder, kv_cache, memory, sharding, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import KVCache
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import Sampling
from qsharp_jax.system.errors import UserError

CACHE_BUCKET = 8  # positions of a cache are a multiple of it: else a TPU keeps them in another order outside the loop


def for_decoding(model: Any) -> Any:
    """The model with unstacked layers: do it once for many calls of `generate`. Models in that form pass through.

    On a CPU the weights are transposed as well, see `cpu_form.py`.
    """
    if isinstance(value.trunk(model).params["layers"], list):
        return model
    unstack = value.unstack if isinstance(model, ValueModel) else decoder.unstack
    return model.replace(params=unstack(model.params, transposed=cpu_form.here()))


def generate(
    ref: LanguageModel,
    guide: Guide | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    rng: Any,
    samples: int = 1,
    record: Collection[str] = RECORDED,
) -> Generation:
    """Sample responses to prompts from the guided policy.

    As in the paper's program and in Hugging Face's order, the tilt comes first, then temperature, then top-k and top-p.
    A row's result depends on its own prompt, settings and seed only, up to rounding (and except for shared slots that
    do not suffice); in bfloat16 rounding may change a token, see `ContinuousBatch`. Every program is compiled once per
    number of rows, padded prompt length, `max_new_tokens` and static part of `sampling`. Rows are the prompts' samples,
    a prompt's next to each other: what may be given per row has len(prompts) * samples entries.

    Args:
      ref: the frozen reference model.
      guide: the value model; None, or eta = inf for all rows, gives exactly the reference, and then no guide runs. A
        tuple of several, of one type, composes them: their log-weights are added, each times its weight. A language
        model in its place is a policy of its own: its logits are sampled, whatever eta is, with the reference beside it
        for its log-probabilities and the KL. Its weights are data: they may change from call to call.
      prompts: B lists of token ids, each of at least one token.
      rng: one seed per row, or an integer from which they are drawn.
      samples: responses to each prompt; they share one prefill.
      record: which of log-probabilities, KL and values to keep; what is not kept costs nothing.

    Raises:
      UserError: for arrays of the wrong length, ids outside the vocabulary, prompts that do not fit the model's
        context, or caches that do not fit into memory.
    """
    run = Run(ref, guide, prompts, sampling, rng=rng, samples=samples, record=record)
    state = decode(run.ref, run.guide, run.state, run.controls, settings=run.settings)
    return run.generation(state)


def stream(
    ref: LanguageModel,
    guide: Guide | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    rng: Any,
    samples: int = 1,
    record: Collection[str] = RECORDED,
) -> Generator[list[list[int]], None, Generation]:
    """`generate` that yields every row's new tokens after each block of steps, and returns the whole at the end."""
    run = Run(ref, guide, prompts, sampling, rng=rng, samples=samples, record=record)
    state, shown, active = run.state, np.zeros(len(run.controls.seed), int), True
    while active:
        state = decode(run.ref, run.guide, state, run.controls, settings=run.settings, steps=np.int32(BLOCK))
        tokens, lengths = sharding.to_host((state.record.token, state.length))
        yield [row[begin:end].tolist() for row, begin, end in zip(tokens, shown, lengths, strict=True)]
        shown, active = lengths, bool(sharding.to_host(state.active(run.controls)).any())
    return run.generation(state)


class Run:
    """The arguments of `generate`, checked, as the loop's arrays, prompts prefilled: `decode` continues from `state`.

    `ref` and `guide` are in the decoding form; `guide` is None where none runs.
    """

    def __init__(
        self,
        ref: LanguageModel,
        guide: Guide | None,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        rng: Any,
        samples: int = 1,
        record: Collection[str] = RECORDED,
    ):
        rows = len(prompts) * samples
        self.max_new_tokens = sampling.max_new_tokens
        guide, self.controls, self.settings = checked(
            ref, guide, prompts, sampling, rng=rng, samples=samples, rows=rows, record=record
        )
        padded, start = pad(prompts, sampling.prompt_bucket)
        steps = _steps(sampling.max_new_tokens)
        size = cache_size(max(map(len, prompts)), sampling.max_new_tokens, sampling.prompt_bucket)
        self.ref, self.guide = for_decoding(ref), value.each(for_decoding, guide)
        check_memory(self.ref, self.guide, rows, size)
        fill = functools.partial(prefill, tokens=padded[:, :-1], start=start, size=size, samples=samples)
        self.state = first_state(
            fill(self.ref.params, ref.config),
            value.each(lambda model: fill(value.trunk(model).params, value.trunk(model).config), self.guide),
            np.repeat(padded, samples, axis=0),
            np.repeat(start, samples),
            steps,
            self.settings,
        )
        self.state, self.controls = sharding.place_rows((self.state, self.controls))

    def generation(self, state: State) -> Generation:
        """The loop's result on the host."""
        state = sharding.to_host(state.replace(ref_cache=None, guide_cache=None))  # the caches stay where they are
        return to_generation(state, self.max_new_tokens, guided=gives_values(self.guide))


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
    weights = _checked_weights(guide, sampling.weights, responses, sampling.mode)
    if not isinstance(guide, LanguageModel) and np.isinf(controls.eta).all():
        guide = None
    for member in members(guide):
        if isinstance(member, ValueModel):
            _check_guide(member.config, sampling, vocab_size)
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
    controls = Controls(
        eta=per_row("eta", sampling.eta, np.float32),
        temperature=per_row("temperature", sampling.temperature, np.float32),
        top_p=per_row("top_p", sampling.top_p, np.float32),
        top_k=per_row("top_k", sampling.top_k, np.int32),
        threshold=per_row("candidate_threshold", sampling.candidate_threshold, np.float32),
        budget=per_row("budget", sampling.max_new_tokens if sampling.budget is None else sampling.budget, np.int32),
        seed=seeds.astype(np.uint32),
    )
    slots = 0 if sampling.candidate_slots is None else math.ceil(sampling.candidate_slots * rows)
    settings = Settings(
        stop_ids=tuple(sampling.stop_ids),
        vocab_size=vocab_size,
        candidates=sampling.top_k_candidates,
        slots=min(slots, rows * sampling.top_k_candidates),
        mode=sampling.mode,
        others=sampling.others,
        truncate=bool((controls.top_p < 1).any() or (controls.top_k > 0).any() or (controls.temperature == 0).any()),
        record=tuple(name for name in RECORDED if name in record),
    )
    return controls, settings


def pad(prompts: Sequence[Sequence[int]], prompt_bucket: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded prompts [B, P] int32, and the place [B] where each begins."""
    width = padded_length(max(map(len, prompts)), prompt_bucket)
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, width - len(prompt) :] = prompt
    return padded, np.asarray([width - len(prompt) for prompt in prompts], np.int32)


def to_generation(state: State, max_new_tokens: int, *, guided: bool) -> Generation:
    """Convert a loop's state, on the host, to a `Generation`, with everything past the end of a row cleared."""
    within = np.arange(max_new_tokens) < state.length[:, None]
    record = jax.tree.map(lambda leaf: np.where(within, leaf[:, :max_new_tokens], 0), state.record)
    return Generation(
        tokens=record.token,
        lengths=state.length,
        finished=state.stopped,
        dropped=state.dropped,
        log_probs=record.log_prob,
        ref_log_probs=record.ref_log_prob,
        kl=record.kl,
        kl_truncated=record.kl_truncated,
        values=None if record.value is None else _values(record, state.length, guided),
    )


def _values(record: Record, lengths: np.ndarray, guided: bool) -> np.ndarray:
    """[R, N]: the guide's mean at every token, nan without a value model and past the end.

    A V-type reads a token's value when it was a candidate; one that was not is read a step later, as pending.
    """
    within = np.arange(record.value.shape[1]) < lengths[:, None]
    if not guided:
        return np.full(within.shape, np.nan, np.float32)
    later = np.pad(record.pending_value[:, 1:], ((0, 0), (0, 1)), constant_values=np.nan)
    later = np.where(np.pad(within[:, 1:], ((0, 0), (0, 1))), later, np.nan)
    return np.where(within, np.where(np.isnan(record.value), later, record.value), np.nan)


def padded_length(length: int, shortest: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, ... times `shortest` that is at least `length`.

    Two sizes an octave: programs are few (18 for prompts of 16 to 8,192 tokens), and padding is at most a half.
    """
    multiple = -(-length // shortest)
    octave = 1 << max(multiple - 1, 1).bit_length() - 1
    return shortest * min(size for size in (1, octave, octave * 3 // 2, octave * 2) if size >= multiple)


def cache_size(longest: int, max_new_tokens: int, prompt_bucket: int) -> int:
    """Number of positions in the caches of `generate` for prompts of at most `longest` tokens."""
    filled = padded_length(longest, prompt_bucket) - 1 + _steps(max_new_tokens)
    return -(-filled // CACHE_BUCKET) * CACHE_BUCKET


def _steps(max_new_tokens: int) -> int:
    """Round up to whole blocks."""
    return -(-max_new_tokens // BLOCK) * BLOCK


def caches(configs: Mapping[str, DecoderConfig], rows: int, size: int) -> dict[str, KVCache]:
    """The models' caches as `jax.ShapeDtypeStruct`s, for `memory.check_memory`.

    Args:
      configs: of the decoders that run, by name: "reference", "guide".
      rows: of a batch, all samples of its prompts.
      size: positions, see `cache_size`.
    """
    return {f"the {name}'s cache": kv_cache.abstract(config, rows, size) for name, config in configs.items()}


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
    """[rows, G] of several guides, None of one."""
    if not isinstance(guide, tuple):
        if given is not None:
            raise UserError("weights are of several guides; give a tuple of them as the guide")
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


def check_memory(ref: LanguageModel, guide: Guide | None, rows: int, size: int) -> None:
    """Check that the caches fit into memory beside the weights, which are loaded already."""
    configs, weights = {"reference": ref.config}, {"the reference's weights": ref.params}
    for name, member in zip(guide_names(len(members(guide))), members(guide), strict=True):
        configs[name], weights[f"the {name}'s weights"] = value.trunk(member).config, member.params
    memory.check_memory(sharding.abstract_rows(caches(configs, rows, size)), existing=weights)


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


def _check_guide(guide: ValueConfig, sampling: Sampling, vocab_size: int) -> None:
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
