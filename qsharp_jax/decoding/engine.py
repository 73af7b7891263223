"""Continuous batching: a loop of fixed rows in which a row that ends is given to the next waiting prompt.

Shapes: R rows, S positions of the ring, U prompts prefilled at once, P their padded length, N new tokens. Yu et al.,
"Orca", OSDI 2022, call it iteration-level scheduling.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

import qsharp_jax.decoding.api as api
import qsharp_jax.decoding.stops as stops
from qsharp_jax.decoding.checks import check_memory, checked
from qsharp_jax.decoding.loop import decode, prefill
from qsharp_jax.decoding.rows import First, Waiting, empty_state, refill, rewind
from qsharp_jax.decoding.state import RECORDED, Controls, Generation, Guide, gives_values
from qsharp_jax.models import attention, cpu_form, sharding, value
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import Sizes
from qsharp_jax.models.tpu_attention import TILE
from qsharp_jax.sampling import Sampling

BLOCK = 2  # steps between two looks at how many rows are free
FREE = 16  # one in so many rows is free before the loop stops for them
LONGEST = 64  # steps until control returns to the host, so that whoever reads the responses can end it
GO_ON = 16  # steps between two looks for rows that go on from an earlier place
STOP_STRINGS = 8  # steps between two looks for stop strings, where there are some
PROMPTS = 16  # prefilled at once
TOKENS = 2048  # of all of them that go through a model at once, where one program serves prompts of all lengths

# The place of a response, the tokens of its prompt and those that it begins with, and how many it may still have.
_Begun = tuple[int, tuple[int, ...], int]
_Then = Callable[[int, list[int]], tuple[int, int] | None]


def tokens_at_once(prompts: int) -> int:
    """Number of tokens of each of so many prompts that go through a model at once on an accelerator."""
    return min(attention.CHUNK, -(-TOKENS // prompts))


def loop_sizes(
    rows: int,
    samples: int,
    longest: int,
    max_new_tokens: int,
    prompt_bucket: int,
    *,
    on_cpu: bool,
    goes_on: bool = False,
    parts: int | None = None,
) -> Sizes:
    """Sizes of the caches of a `ContinuousBatch`.

    Args:
      rows, samples, longest, max_new_tokens, prompt_bucket, parts: as of `cache_sizes`.
      on_cpu: it runs on CPUs.
      goes_on: responses go on from others', in their rows.
    """
    sizes = api.cache_sizes(rows, samples, longest, max_new_tokens, prompt_bucket, parts=parts)
    if on_cpu and not goes_on:  # on an accelerator all loops of a run are of one size
        return sizes
    # Rows that have ended write on until the host looks, and not over what may be kept; the kernels for CUDA and TPUs
    # can divide the positions into tiles.
    return sizes._replace(positions=-(-(sizes.positions + GO_ON) // TILE) * TILE)


class ContinuousBatch:
    """Responses to any number of prompts, as they end. Iterate over it once.

    Yields, at least every `LONGEST` steps, the responses that have ended since (perhaps none): their indices [n] among
    all responses (prompt 0's samples, then prompt 1's, ...), and their `Generation`. In float32 a response is
    the one that `generate` gives: it depends on its own prompt, settings and seed, not on the row, the time or the
    neighbors that it had, unless a draw falls within rounding (about 1e-6) of the border between two tokens. In
    bfloat16 the place in the ring changes the order of attention's sums, and with it how hidden states round: some
    responses become other samples of the same policy.
    Where samples share a long prompt, see `cache_sizes`, their rows get the next prompt together.

    Attributes:
      row_steps: rows times steps that were computed so far.
      tokens: how many of these went into responses.
    """

    def __init__(
        self,
        ref: LanguageModel,
        guide: Guide | None,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        rng: Any,
        rows: int,
        samples: int = 1,
        longest: int = 0,
        order: Iterable[int] | None = None,
        starts: Iterable[tuple[int, Sequence[int]]] | None = None,
        then: _Then | None = None,
        record: Collection[str] = RECORDED,
        tokenizer: stops.Decodes | None = None,
    ):
        """Arguments and errors as of `generate`, and:

        Args:
          rows: of the loop, rounded to what the mesh that is set divides.
          longest: tokens of a prompt for which the caches have room at least, so that batches share their programs.
          order: the places of the responses that are begun, in this order; by default all of them.
          starts: in its place, the place of each response and the tokens that it begins with, which come out of its
            budget. It is read as rows become free. A response that begins with its end gets no more tokens, and has
            finished. No prompt is shared.
          then: of a response that has ended, by its place and tokens: the place of another that goes on in its row from
            its first tokens, without a prefill, and how many these are; or None. It begins as those of `starts` do.
        """
        self._rows = rows = sharding.round_rows(rows)
        self._guide, controls, self._settings = checked(
            ref, guide, prompts, sampling, rng=rng, samples=samples, rows=rows, record=record
        )
        self._controls = jax.tree.map(np.asarray, controls)
        self._ref = api.for_decoding(ref)
        self._guide = value.each(api.for_decoding, self._guide)
        self._bucket, self._new = sampling.prompt_bucket, sampling.max_new_tokens
        longest = max(longest, *map(len, prompts))
        on_cpu, width = cpu_form.here(), api.padded_length(longest, self._bucket)
        sizes = loop_sizes(
            rows, samples if starts is None else 1, longest, self._new, self._bucket,
            on_cpu=on_cpu, goes_on=then is not None,
        )  # fmt: skip
        self._slots = sizes.prompts or rows  # each has one prompt at a time
        self._prompts_at_once = at_once = sharding.round_rows(min(PROMPTS, self._slots))
        # On an accelerator one program serves prompts of all lengths, and leaves out chunks of padding. A CPU computes
        # whole prompts, with a program for each width.
        one_width = starts is None and not on_cpu
        self._width = width if one_width else None
        self._chunk = tokens_at_once(at_once) if one_width else attention.CHUNK
        with_waiting = dict(prompts=sizes.prompts + at_once) if sizes.prompts else dict(rows=rows + at_once)
        check_memory(
            self._ref, self._guide, sizes._replace(**with_waiting), prompts=at_once, tokens=width - 1,
            chunk=self._chunk,
        )  # fmt: skip
        trunk = value.each(lambda model: value.trunk(model).config, self._guide)
        self._state = empty_state(
            ref.config, trunk, sizes, self._new, self._settings,
            on_cpu=cpu_form.is_transposed(self._ref.params),
        )  # fmt: skip
        self._stops = stops.of(sampling, tokenizer)
        steps = (LONGEST, STOP_STRINGS if self._stops else LONGEST, GO_ON if then else LONGEST)
        self._steps = np.int32(min(steps))
        self._place = np.full(rows, -1)  # of each row's response; -1: the row is free
        self._checked = np.zeros(rows, np.int32)  # tokens of each row that complete no stop string
        self._start: dict[int, list[int]] = {}  # of the responses that have begun, by place
        self._over: set[int] = set()  # places of responses that begin with their end
        self._budget = np.zeros(rows, np.int32)
        order = range(len(prompts) * samples) if order is None else order
        starts = ((place, ()) for place in order) if starts is None else starts
        self._prompt, self._then = lambda place: prompts[place // samples], then
        begun = ((place, (*self._prompt(place), *start), self._left(place, start)) for place, start in starts)
        # Those that begin alike and follow each other share a prefill.
        self._groups = ([*group] for _, group in itertools.groupby(begun, key=lambda one: one[1]))
        self._waiting: Waiting | None = None
        self._queue: collections.deque[tuple[int, list[_Begun]]] = collections.deque()  # those of each that waits
        self._of_slot: list[list[_Begun]] = [[] for _ in range(self._slots)]  # those that have no row yet
        self.row_steps = self.tokens = 0

    def __iter__(self) -> Iterator[tuple[np.ndarray, Generation]]:
        ended, enough = None, 0
        while True:
            if np.sum(self._place < 0) >= enough:
                self._fill()
                # Beside the rows for which there are no more prompts: so the last responses are given as they end, too.
                enough = min(self._rows, int((self._place < 0).sum()) + max(1, self._rows // FREE))
            if (self._place < 0).all():
                break
            controls = self._row_controls()
            self._state = decode(
                self._ref, self._guide, self._state, controls,
                settings=self._settings, block=BLOCK, enough=np.int32(enough), steps=self._steps,
            )  # fmt: skip
            if ended is not None:  # while the devices go on
                yield ended
            ended = self._ended()
        if ended is not None:
            yield ended

    def _left(self, place: int, start: Sequence[int]) -> int:
        """Number of tokens that a response may still have."""
        if len(start) > 0:
            if self._stops:
                self._start[place] = [*start]
            if start[-1] in self._settings.stop_ids or (self._stops and self._stops.end(start) is not None):
                self._over.add(place)
                return 0
        return int(self._controls.budget[place]) - len(start)

    def _fill(self) -> None:
        """Give the free rows to the next responses."""
        rows_of = np.arange(self._rows).reshape(self._slots, -1)
        while True:
            source, first, is_idle = np.full(self._slots, -1, np.int32), First.none(self._rows), False
            is_free = (self._place < 0).reshape(rows_of.shape)
            for slot in np.flatnonzero(is_free.any(axis=1)):
                if is_free[slot].all() and not self._of_slot[slot]:
                    if not self._queue:
                        is_idle = True
                        continue
                    source[slot], self._of_slot[slot] = self._queue.popleft()
                for row in rows_of[slot][is_free[slot]][: len(self._of_slot[slot])]:
                    place, tokens, left = self._of_slot[slot].pop(0)
                    self._set(row, place, left)
                    first.set(row, tokens)
            if first.begins.any():
                self._state = refill(self._state, self._waiting, *sharding.place_rows((source, first)))
            if not is_idle or not self._prefill():
                return

    def _set(self, row: int, place: int, left: int) -> None:
        self._place[row], self._budget[row], self._checked[row] = place, left, 0

    def _prefill(self) -> bool:
        """Prefill the next prompts; return False if there are none."""
        groups = list(itertools.islice(self._groups, self._prompts_at_once))
        if not groups:
            return False
        self._waiting = None
        prompts = [group[0][1] for group in groups]
        for number, group in enumerate(groups):
            together = [group] if self._slots < self._rows else [[one] for one in group]
            self._queue.extend((number, part) for part in together)
        filled = prompts + [prompts[0][:1]] * (self._prompts_at_once - len(prompts))
        width = self._width or api.padded_length(max(map(len, filled)), self._bucket)
        padded, start = api.pad(filled, width)
        fill = functools.partial(prefill, tokens=padded[:, :-1], start=start, size=width - 1, chunk=self._chunk)
        self._waiting = Waiting(
            ref_cache=fill(self._ref.params, self._ref.config),
            guide_cache=value.each(
                lambda model: fill(value.trunk(model).params, value.trunk(model).config), self._guide
            ),
        )
        return True

    def _row_controls(self) -> Controls:
        """Return the controls of the rows' current responses; a free row has a budget of 0."""
        controls = jax.tree.map(lambda array: array[self._place], self._controls)
        return sharding.place_rows(controls.replace(budget=np.where(self._place >= 0, self._budget, 0)))

    def _ended(self) -> tuple[np.ndarray, Generation]:
        """Wait for the devices, and return the responses of the rows that have ended, which become free."""
        state = self._state
        length, stopped, steps = sharding.to_host((state.length, state.stopped, state.step))
        stopped = stopped | np.isin(self._place, list(self._over))
        if self._stops:
            starts = [self._start.get(place, []) for place in self._place.tolist()]
            tokens = sharding.to_host(state.record.token)
            length, stopped = self._stops.ended(tokens, length, stopped, self._checked, starts)
            self._checked = length.copy()
        rows = np.flatnonzero((self._place >= 0) & (stopped | (length >= self._budget)))
        places = self._place[rows]
        self._place[rows] = -1
        self.row_steps = int(steps) * self._rows
        self.tokens += int(length[rows].sum())
        kept = state.replace(
            ref_cache=None, guide_cache=None, pending=None, previous=None, step=None, length=length, stopped=stopped
        )
        if len(rows) == 0:  # then the records stay where they are
            kept = jax.tree.map(lambda leaf: np.zeros((0, *leaf.shape[1:]), leaf.dtype), kept)
        else:
            kept = jax.tree.map(lambda leaf: leaf[rows], sharding.to_host(kept))
        part = api.to_generation(kept, self._new, guided=gives_values(self._guide))
        if self._then is not None:
            self._go_on(rows, places, part, self._then)
        return places, part

    def _go_on(self, rows: np.ndarray, places: np.ndarray, part: Generation, then: _Then) -> None:
        """Begin other responses in rows that have ended, from places in their own caches."""
        kept, first = np.full(self._rows, -1, np.int32), First.none(self._rows)
        for index, row in enumerate(rows):
            place, tokens = int(places[index]), part.response(index)
            if (following := then(place, tokens)) is not None:
                other, start = following[0], tokens[: following[1]]
                self._set(row, other, self._left(other, start))
                begun = (*self._prompt(place), *start)
                kept[row] = len(begun) - 1
                first.set(row, begun)
        if first.begins.any():
            self._state = rewind(self._state, *sharding.place_rows((kept, first)))
