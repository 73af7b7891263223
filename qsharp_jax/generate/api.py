"""`generate` and `stream`: from lists of tokens to the loop's arrays, and back.

Shapes: B prompts, P their padded length, R rows, N new tokens, V vocabulary, K candidates.
"""

import functools
import math
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import guidance, sampling
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
from qsharp_jax.models import decoder, kv_cache, memory, sharding, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import KVCache
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.system.errors import UserError

CACHE_BUCKET = 8  # positions of a cache are a multiple of it: else a TPU keeps them in another order outside the loop
PROMPT_BUCKET = 16  # the shortest padded length of prompts, see `padded_length`


def for_decoding(model: Any) -> Any:
    """The model with unstacked layers: do it once for many calls of `generate`. Models in that form pass through.

    On a CPU the weights are transposed as well, see `decoder.unstack`.
    """
    if isinstance(value.trunk(model).params["layers"], list):
        return model
    unstack = value.unstack if isinstance(model, ValueModel) else decoder.unstack
    return model.replace(params=unstack(model.params, transposed=decoder.transposed_here()))


def generate(ref: LanguageModel, guide: Guide | None, prompts: Sequence[Sequence[int]], **settings: Any) -> Generation:
    """Samples responses to prompts from the guided policy.

    As in the paper's program and in Hugging Face's order, the tilt comes first, then temperature, then top-k and top-p.
    A row's result depends on its own prompt, settings and seed only, up to rounding (and but for shared slots that do
    not suffice); in bfloat16 rounding may change a token, see `ContinuousBatch`. Every
    program is compiled once per number of rows, padded prompt length, `max_new_tokens` and `Settings`; eta,
    temperature, top-p, top-k, budget and seeds are data. Rows are the prompts' samples, a prompt's next to each other:
    what may be given one a row has len(prompts) * samples entries.

    Args:
      ref: the frozen reference model.
      guide: the value model; None, or eta = inf for all rows, gives exactly the reference, and then no guide runs. A
        tuple of several, of one type, composes them: their log-weights are added, each times its weight. A language
        model in its place is a policy of its own: its logits are sampled, whatever eta is, with the reference beside it
        for its log-probabilities and the KL. Its weights are data: they may change from call to call.
      prompts: B lists of token ids, each of at least one token.
      weights: of several guides, one number each, or [rows, guides] with such numbers for each row.
      eta: weight of the KL to the reference, at least 1e-6, in units of reward; a number or one per row. Small is
        strong guidance. By default inf.
      temperature: 0 takes the most probable token; else at least 1e-6. A number or one per row, by default 1.
      top_k_candidates: how many of the likeliest tokens under the reference the guide scores at each step, by default
        20.
      top_p: in (0, 1], a number or one a row, by default 1.
      top_k: 0 for no limit, which is the default, a number or one a row.
      max_new_tokens: length of the response at most, the stop token included; a static size.
      budget: tokens that each row may have, at most `max_new_tokens`, which is the default.
      rng: one seed a row, or an integer from which they are drawn.
      stop_ids: a response ends at the first of these.
      samples: responses to each prompt, by default 1; they share one prefill.
      mode: "qsharp" (the default), "cd" or "expectation", see `guidance.log_weights`.
      others: log-weight of the tokens that are not scored: "mass" (the default), under which the scored ones keep
        their mass under the reference; "prefix", that of the guide's own distribution at the pending token (a Q-type
        scores all tokens); or "zero", that of reward 0, with which even a constant guide is a top-K filter. See
        `limits.OTHERS`.
      vocab_size: ids from here on are rows that pad the reference's embedding, and never drawn; by default none are.
      candidate_slots: guide positions that a row has on average, for a V-type: all rows' candidates share so many times
        the rows, the most probable first. By default None: each has `top_k_candidates` of its own.
      candidate_threshold: least reference probability of a candidate that may have a shared slot, by default 1e-3.
      record: which of log-probabilities, KL and values to keep, by default all of `RECORDED`; others cost nothing.
      prompt_bucket: shortest padded length of prompts, in tokens, by default 16; see `padded_length`.

    Raises:
      UserError: for settings out of range, ids outside the vocabulary, prompts that do not fit the model's context, or
        caches that do not fit into memory.
    """
    run = Run(ref, guide, prompts, **settings)
    state = decode(run.ref, run.guide, run.state, run.controls, settings=run.settings)
    return run.generation(state)


def stream(
    ref: LanguageModel, guide: Guide | None, prompts: Sequence[Sequence[int]], **settings: Any
) -> Generator[list[list[int]], None, Generation]:
    """`generate` that yields every row's new tokens after each block of steps, and returns the whole at the end."""
    run = Run(ref, guide, prompts, **settings)
    state, shown, until, going_on = run.state, np.zeros(len(run.controls.seed), int), 0, True
    while going_on:
        until += BLOCK
        state = decode(run.ref, run.guide, state, run.controls, settings=run.settings, until=np.int32(until))
        tokens, lengths = sharding.to_host((state.record.token, state.length))
        yield [row[begin:end].tolist() for row, begin, end in zip(tokens, shown, lengths, strict=True)]
        shown, going_on = lengths, bool(sharding.to_host(state.active(run.controls)).any())
    return run.generation(state)


class Run:
    """The checked arguments of `generate` as the loop's arrays, prompts prefilled: `decode` goes on from `state`.

    Arguments and errors as of `generate`. `ref` and `guide` are in the decoding form; `guide` is None where none runs.
    """

    def __init__(
        self,
        ref: LanguageModel,
        guide: Guide | None,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        samples: int = 1,
        prompt_bucket: int = PROMPT_BUCKET,
        **settings: Any,
    ):
        rows = len(prompts) * samples
        self.max_new_tokens = max_new_tokens
        guide, self.controls, self.settings = checked(
            ref,
            guide,
            prompts,
            samples=samples,
            rows=rows,
            max_new_tokens=max_new_tokens,
            prompt_bucket=prompt_bucket,
            **settings,
        )
        padded, start = pad(prompts, prompt_bucket)
        steps = _steps(max_new_tokens)
        size = cache_size(max(map(len, prompts)), max_new_tokens, prompt_bucket)
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
    *,
    weights: Any = None,
    eta: Any = jnp.inf,
    temperature: Any = 1.0,
    top_k_candidates: int = 20,
    top_p: Any = 1.0,
    top_k: Any = 0,
    max_new_tokens: int,
    budget: Any = None,
    rng: Any,
    stop_ids: Sequence[int],
    samples: int,
    rows: int,
    mode: str = "qsharp",
    others: str = "mass",
    vocab_size: int | None = None,
    candidate_slots: float | None = None,
    candidate_threshold: float = 1e-3,
    record: Collection[str] = RECORDED,
    prompt_bucket: int,
) -> tuple[Guide | None, Controls, Settings]:
    """The guide, None where none runs, and the loop's controls and settings from the arguments of `generate`.

    `rows` are those of the loop; controls have an entry for each of the prompts' samples.
    """
    for name, count in dict(max_new_tokens=max_new_tokens, prompt_bucket=prompt_bucket, samples=samples).items():
        if count < 1:
            raise UserError(f"{name} is {count}; it must be at least 1")
    if mode not in guidance.MODES:
        raise UserError(f"mode is {mode!r}; it must be one of {', '.join(guidance.MODES)}")
    if others not in sampling.OTHERS:
        raise UserError(f"others is {others!r}; it must be one of {', '.join(sampling.OTHERS)}")
    responses = len(prompts) * samples
    least_eta, least_temperature = np.float32(sampling.LEAST_ETA), np.float32(sampling.LEAST_TEMPERATURE)
    controls = Controls(
        eta=_per_row(
            "eta", eta, responses, np.float32, lambda x: x >= least_eta, f"at least {sampling.LEAST_ETA:g}"
        ),
        temperature=_per_row(
            "temperature", temperature, responses, np.float32,
            lambda x: (x == 0) | (least_temperature <= x) & np.isfinite(x),
            f"0, which is greedy, or a finite number of at least {sampling.LEAST_TEMPERATURE:g}",
        ),
        top_p=_per_row("top_p", top_p, responses, np.float32, lambda x: (x > 0) & (x <= 1), "in (0, 1]"),
        top_k=_per_row("top_k", top_k, responses, np.int32, lambda x: x >= 0, "0 or more"),
        threshold=_per_row(
            "candidate_threshold", candidate_threshold, responses, np.float32, lambda x: (0 <= x) & (x < 1), "in [0, 1)"
        ),
        budget=_per_row(
            "budget",
            max_new_tokens if budget is None else budget,
            responses,
            np.int32,
            lambda x: (x >= 0) & (x <= max_new_tokens),
            f"in 0 .. max_new_tokens = {max_new_tokens}",
        ),
        seed=_per_row(
            "rng",
            row_seeds(rng, responses) if np.ndim(rng) == 0 and rng >= 0 else rng,
            responses,
            np.int64,
            lambda x: (0 <= x) & (x < 2**32),
            "0 or more, and less than 2^32 where it is one a row",
        ).astype(np.uint32),
    )
    weights = _checked_weights(guide, weights, responses, mode)
    if not isinstance(guide, LanguageModel) and np.isinf(controls.eta).all():
        guide = None
    vocab_size = ref.config.vocab_size if vocab_size is None else vocab_size
    for member in members(guide):
        if isinstance(member, ValueModel):
            _check_guide(member.config, mode, vocab_size, top_k_candidates, candidate_slots)
        _check_vocabulary(ref, member, vocab_size)
    if guide is not None:
        controls = controls.replace(weights=weights)
    _check_prompts(ref, guide, prompts, controls.budget.reshape(-1, samples).max(1, initial=0), vocab_size)
    settings = Settings(
        stop_ids=tuple(stop_ids),
        vocab_size=vocab_size,
        candidates=top_k_candidates,
        slots=0 if candidate_slots is None else min(math.ceil(candidate_slots * rows), rows * top_k_candidates),
        mode=mode,
        others=others,
        truncate=bool((controls.top_p < 1).any() or (controls.top_k > 0).any() or (controls.temperature == 0).any()),
        record=tuple(name for name in RECORDED if name in record),
    )
    return guide, controls, settings


def pad(prompts: Sequence[Sequence[int]], prompt_bucket: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded prompts [B, P] int32, and the place [B] where each begins."""
    width = padded_length(max(map(len, prompts)), prompt_bucket)
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, width - len(prompt) :] = prompt
    return padded, np.asarray([width - len(prompt) for prompt in prompts], np.int32)


def to_generation(state: State, max_new_tokens: int, *, guided: bool) -> Generation:
    """What a loop's state, on the host, holds of its rows, without what lies past the end of each."""
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
    """Positions of the caches that `generate` makes for prompts of which the longest has so many tokens."""
    filled = padded_length(longest, prompt_bucket) - 1 + _steps(max_new_tokens)
    return -(-filled // CACHE_BUCKET) * CACHE_BUCKET


def _steps(max_new_tokens: int) -> int:
    """Whole blocks."""
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


def _per_row(name: str, given: Any, rows: int, dtype: Any, allowed: Any, words: str) -> np.ndarray:
    array = np.asarray(given, dtype)
    if array.ndim > 1 or (array.ndim == 1 and array.shape != (rows,)):
        raise UserError(f"{name} has shape {array.shape}; give one number, or one for each of the {rows} rows")
    if not np.all(allowed(array)):
        raise UserError(f"{name} is {given}; it must be {words}")
    return np.broadcast_to(array, (rows,))


def members(guide: Guide | None) -> tuple[ValueModel | LanguageModel, ...]:
    """The models that a guide consists of."""
    return guide if isinstance(guide, tuple) else () if guide is None else (guide,)


def guide_names(count: int) -> list[str]:
    """Of so many guides, in messages."""
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
    """That the caches fit beside the weights, which are there already."""
    configs, weights = {"reference": ref.config}, {"the reference's weights": ref.params}
    for name, member in zip(guide_names(len(members(guide))), members(guide), strict=True):
        configs[name], weights[f"the {name}'s weights"] = value.trunk(member).config, member.params
    memory.check_memory(sharding.abstract_rows(caches(configs, rows, size)), held=weights)


def _check_vocabulary(ref: LanguageModel, guide: Guide, vocab_size: int) -> None:
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


def _check_guide(guide: ValueConfig, mode: str, vocab_size: int, candidates: int, slots: float | None) -> None:
    never_negative = guide.distribution == "bernoulli" or (guide.distribution == "categorical" and guide.atoms[0] >= 0)
    if mode == "expectation" and not never_negative:
        raise UserError(
            'mode "expectation" takes the logarithm of the mean, so the guide must not give negative ones; use a'
            " bernoulli guide, or a categorical one with atoms of 0 and more"
        )
    if not 1 <= candidates <= vocab_size:
        raise UserError(f"top_k_candidates is {candidates}; it must be in 1 .. {vocab_size}")
    if slots is not None and not 0 < slots <= candidates:
        raise UserError(f"candidate_slots is {slots}; it must be above 0, at most top_k_candidates = {candidates}")
    if slots is not None and guide.type == "q":
        raise UserError("a Q-type guide reads all candidates at one position: leave candidate_slots out")
