"""`generate` and `stream`: from lists of tokens to the loop's arrays, and back.

Shapes: B prompts, P their padded length, R rows, N new tokens, V vocabulary, K candidates.
"""

import math
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

import qsharp_jax.decoding.stops as stops
from qsharp_jax.decoding.checks import check_memory, checked
from qsharp_jax.decoding.loop import BLOCK, decode, prefill_rows
from qsharp_jax.decoding.state import (
    RECORDED,
    Generation,
    Guide,
    Record,
    State,
    first_state,
    gives_values,
)
from qsharp_jax.models import cpu_form, decoder, gpu_form, quantized, sharding, tpu_attention, value
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import KVCache, Sizes
from qsharp_jax.models.value import ValueModel
from qsharp_jax.sampling import Sampling

SHARED = 512  # tokens of a prompt from which on its samples share its keys and values
SHARED_TO_NEW = 2  # times as long as responses may be
CACHE_BUCKET = 8  # positions of a cache are a multiple of it: else a TPU keeps them in another order outside the loop
LONG, LONG_BUCKET = 1024, tpu_attention.TILE  # from so many on they are a multiple of what a TPU copies at once


def for_decoding(model: Any) -> Any:
    """The model with unstacked layers: do it once for many calls of `generate`. Models in that form pass through.

    The decoder's matrices, float32 after a fit, are quantized as its config says, or cast to the dtype that it computes
    in; a value head stays float32.
    On a CPU the weights are transposed as well, see `cpu_form.py`, and on a GPU some are joined, see `gpu_form.py`.
    """
    if isinstance(model, ValueModel):
        return model.replace(params=model.params | {"trunk": for_decoding(value.trunk(model)).params})
    params, dtype = model.params, model.config.compute_dtype
    if not isinstance(params["layers"], list):
        params = decoder.unstack(params, transposed=cpu_form.here())
        params = quantized.cast(quantized.tree(params, model.config.quantize), dtype)
    return model.replace(params=gpu_form.fuse(params, model.config) if gpu_form.here() else params)


def generate(
    ref: LanguageModel,
    guide: Guide | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    rng: Any,
    samples: int = 1,
    record: Collection[str] = RECORDED,
    tokenizer: stops.Decodes | None = None,
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
      record: which of log-probabilities, KL, values and top_log_probs to keep; what is not kept costs nothing.
      tokenizer: needed for `sampling.stop`, which is looked for in the text that it decodes, once per `BLOCK` steps. A
        response's tokens end with the one that completes a stop string; its text is `stop_strings.cut` of theirs.

    Raises:
      UserError: for arrays of the wrong length, ids outside the vocabulary, prompts that do not fit the model's
        context, or caches that do not fit into memory.
    """
    run = Run(ref, guide, prompts, sampling, rng=rng, samples=samples, record=record, tokenizer=tokenizer)
    if run.stops is not None:
        *_, state = run.blocks()
        return run.generation(state)
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
    tokenizer: stops.Decodes | None = None,
) -> Generator[list[list[int]], None, Generation]:
    """`generate` that yields every row's new tokens after each block of steps, and returns the whole at the end."""
    run = Run(ref, guide, prompts, sampling, rng=rng, samples=samples, record=record, tokenizer=tokenizer)
    state, shown = run.state, np.zeros(len(run.controls.seed), int)
    for state in run.blocks():
        tokens, lengths = sharding.to_host((state.record.token, state.length))
        yield [row[begin:end].tolist() for row, begin, end in zip(tokens, shown, lengths, strict=True)]
        shown = lengths
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
        tokenizer: stops.Decodes | None = None,
    ):
        rows = len(prompts) * samples
        self.max_new_tokens = sampling.max_new_tokens
        self.stops = stops.of(sampling, tokenizer)
        guide, self.controls, self.settings = checked(
            ref, guide, prompts, sampling, rng=rng, samples=samples, rows=rows, record=record
        )
        padded, start = pad(prompts, padded_length(max(map(len, prompts)), sampling.prompt_bucket))
        steps = _steps(sampling.max_new_tokens)
        longest, bucket = max(map(len, prompts)), sampling.prompt_bucket
        sizes = cache_sizes(rows, samples, longest, sampling.max_new_tokens, bucket)
        self.ref, self.guide = for_decoding(ref), value.each(for_decoding, guide)
        check_memory(self.ref, self.guide, sizes, prompts=len(prompts), tokens=padded.shape[1] - 1)

        def fill(model: Any) -> KVCache:
            trunk = value.trunk(model)
            return prefill_rows(trunk.params, trunk.config, padded[:, :-1], start, sizes)

        self.state = first_state(
            fill(self.ref),
            value.each(fill, self.guide),
            np.repeat(padded, samples, axis=0),
            np.repeat(start, samples),
            steps,
            self.settings,
        )
        self.state, self.controls = sharding.place_rows((self.state, self.controls))

    def blocks(self) -> Iterator[State]:
        """Decode until every row has ended; yields the state after each block, which the next block overwrites."""
        state, active, checked = self.state, True, np.zeros(len(self.controls.seed), np.int32)
        while active:
            state = decode(self.ref, self.guide, state, self.controls, settings=self.settings, steps=np.int32(BLOCK))
            if self.stops is not None:
                tokens, lengths, stopped = sharding.to_host((state.record.token, state.length, state.stopped))
                checked, stopped = self.stops.ended(tokens, lengths, stopped, checked, [()] * len(checked))
                state = state.replace(length=sharding.place_rows(checked), stopped=sharding.place_rows(stopped))
            active = bool(sharding.to_host(state.active(self.controls)).any())
            yield state

    def generation(self, state: State) -> Generation:
        """The loop's result on the host."""
        state = sharding.to_host(state.replace(ref_cache=None, guide_cache=None))  # the caches stay where they are
        return to_generation(state, self.max_new_tokens, guided=gives_values(self.guide))


def pad(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [B, P] int32, padded on the left to `width` tokens, and the place [B] where each begins."""
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, width - len(prompt) :] = prompt
    return padded, np.asarray([width - len(prompt) for prompt in prompts], np.int32)


def to_generation(state: State, max_new_tokens: int, *, guided: bool) -> Generation:
    """Convert a loop's state, on the host, to a `Generation`, with everything past the end of a row cleared."""
    within = np.arange(max_new_tokens) < state.length[:, None]

    def clear(leaf: np.ndarray) -> np.ndarray:
        kept = within.reshape(*within.shape, *(1,) * (leaf.ndim - 2))
        return np.where(kept, leaf[:, :max_new_tokens], 0)

    record = jax.tree.map(clear, state.record)
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
        top_tokens=record.top_token,
        top_log_probs=record.top_log_prob,
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
    """Number of positions in the caches of `generate` for prompts of at most `longest` tokens, if none is shared."""
    return _positions(padded_length(longest, prompt_bucket) - 1 + _steps(max_new_tokens))


def cache_sizes(
    rows: int, samples: int, longest: int, max_new_tokens: int, prompt_bucket: int, *, parts: int | None = None
) -> Sizes:
    """Sizes of the caches of a loop of so many rows, in which samples share long prompts.

    Rows of a shared prompt get the next one together, so some wait for others: it pays where prompts are much longer
    than responses.

    Args:
      samples: responses to each prompt; a divisor of it is the number of rows that share a prompt.
      longest: tokens of the longest prompt.
      parts: groups of devices that divide the rows; by default, those of the mesh that is set.
    """
    parts = sharding.round_rows(1) if parts is None else parts
    prompt, new = padded_length(longest, prompt_bucket), _steps(max_new_tokens)
    each = math.gcd(samples, rows // parts)  # rows of a prompt
    if each == 1 or prompt < max(SHARED, SHARED_TO_NEW * new):
        return Sizes(rows, _positions(prompt - 1 + new))
    return Sizes(rows, _positions(new), rows // each, _positions(prompt - 1))


def _positions(count: int) -> int:
    bucket = LONG_BUCKET if count > LONG else CACHE_BUCKET
    return -(-count // bucket) * bucket


def _steps(max_new_tokens: int) -> int:
    """Round up to whole blocks."""
    return -(-max_new_tokens // BLOCK) * BLOCK
