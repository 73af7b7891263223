"""Continuous batching: a loop of fixed rows in which a row that ends is given to the next waiting prompt.

Shapes: R rows, S positions of the ring, U prompts prefilled at once, P their padded length, N new tokens. Yu et al.,
"Orca", OSDI 2022, call it iteration-level scheduling.
"""

import collections
import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import qsharp_jax.decoding.api as api
import qsharp_jax.decoding.stops as stops
from qsharp_jax.decoding.checks import check_memory, checked
from qsharp_jax.decoding.loop import decode, prefill
from qsharp_jax.decoding.state import RECORDED, Controls, Generation, Guide, Settings, State, first_state, gives_values
from qsharp_jax.models import cpu_form, kv_cache, sharding, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import KVCache
from qsharp_jax.sampling import Sampling

BLOCK = 2  # steps between two looks at how many rows are free
FREE = 16  # one in so many rows is free before the loop stops for them
LONGEST = 64  # steps until control returns to the host, so that whoever reads the responses can end it
STOP_STRINGS = 8  # steps between two looks for stop strings, where there are some
PROMPTS = 16  # prefilled at once


@flax.struct.dataclass
class Waiting:
    """Prompts that have been prefilled, [U]: the caches end at their last position."""

    ref_cache: KVCache
    guide_cache: Any  # as of `State`
    pending: jax.Array
    previous: jax.Array


@functools.partial(jax.jit, static_argnames=("ref", "guide", "rows", "size", "steps", "settings", "positions_last"))
def empty_state(
    ref: DecoderConfig, guide: Any, rows: int, size: int, steps: int, settings: Settings, *, positions_last: bool
) -> State:
    """The loop's carry before any row has a prompt: rings of `size` positions, room for `steps` new tokens per row.

    `guide` is the shape of its trunk, a tuple of them for several, or None.
    """

    def empty(config: DecoderConfig) -> KVCache:
        return kv_cache.empty(config, rows, size, positions_last=positions_last).replace(ring=True)

    ref_ring, guide_ring = (jax.tree.map(empty, shapes) for shapes in (ref, guide))
    nothing = np.zeros((rows, 1), np.int32)
    return sharding.constrain_rows(first_state(ref_ring, guide_ring, nothing, nothing[:, 0], steps, settings))


@functools.partial(jax.jit, donate_argnames=("state",))
def refill(state: State, waiting: Waiting, source: jax.Array) -> State:
    """Give rows to waiting prompts.

    Args:
      source: [R], which of them the row gets; -1: the row goes on.
    """
    given = source >= 0
    rings = {
        name: kv_cache.each(
            lambda ring, prompts: kv_cache.refill(ring, prompts, source), getattr(state, name), getattr(waiting, name)
        )
        for name in ("ref_cache", "guide_cache")
    }
    return sharding.constrain_rows(
        state.replace(
            **rings,
            pending=jnp.where(given, waiting.pending[source], state.pending),
            previous=jnp.where(given, waiting.previous[source], state.previous),
            length=jnp.where(given, 0, state.length),
            stopped=state.stopped & ~given,
            dropped=jnp.where(given, 0, state.dropped),
        )
    )


class ContinuousBatch:
    """Responses to any number of prompts, as they end. Iterate over it once.

    Yields, at least every `LONGEST` steps, the responses that have ended since (perhaps none): their indices [n] among
    all responses (prompt 0's samples, then prompt 1's, ...), and their `Generation`. In float32 a response is
    the one that `generate` gives: it depends on its own prompt, settings and seed, not on the row, the time or the
    neighbors that it had, unless a draw falls within rounding (about 1e-6) of the border between two tokens. In
    bfloat16 the place in the ring changes the order of attention's sums, and with it how hidden states round: some
    responses become other samples of the same policy.

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
        starts: Iterable[tuple[int, Sequence[int]] | None] | None = None,
        record: Collection[str] = RECORDED,
        tokenizer: stops.Decodes | None = None,
    ):
        """Arguments and errors as of `generate`, and:

        Args:
          rows: of the loop, rounded to what the mesh that is set divides.
          starts: in the order in which they are begun, the place of each response and the tokens that it begins with,
            which come out of its budget. It is read as rows become free; None is a pause, after which it is read again
            when other responses have ended. By default all places, with none. A response that begins with its end gets
            no more tokens, and has finished.
        """
        self._rows = rows = sharding.round_rows(rows)
        self._guide, controls, self._settings = checked(
            ref, guide, prompts, sampling, rng=rng, samples=samples, rows=rows, record=record
        )
        self._controls = jax.tree.map(np.asarray, controls)
        self._ref = api.for_decoding(ref)
        self._guide = value.each(api.for_decoding, self._guide)
        self._bucket, self._new = sampling.prompt_bucket, sampling.max_new_tokens
        size = api.cache_size(max(map(len, prompts)), self._new, self._bucket)
        self._prompts_at_once = sharding.round_rows(min(PROMPTS, rows))
        check_memory(
            self._ref, self._guide, rows + self._prompts_at_once, size, prompts=self._prompts_at_once,
            tokens=api.padded_length(max(map(len, prompts)), self._bucket) - 1,
        )  # fmt: skip
        trunk = value.each(lambda model: value.trunk(model).config, self._guide)
        self._state = empty_state(
            ref.config, trunk, rows, size, self._new, self._settings,
            positions_last=cpu_form.positions_last(self._ref.params, rows),
        )  # fmt: skip
        self._stops = stops.of(sampling, tokenizer)
        self._steps = np.int32(LONGEST if self._stops is None else STOP_STRINGS)
        self._place = np.full(rows, -1)  # of each row's response; -1: the row is free
        self._checked = np.zeros(rows, np.int32)  # tokens of each row that complete no stop string
        self._start: dict[int, list[int]] = {}  # of the responses that have begun, by place
        self._over: set[int] = set()  # places of responses that begin with their end
        self._budget = np.zeros(rows, np.int32)
        starts = ((place, ()) for place in range(len(prompts) * samples)) if starts is None else starts
        self._begun = (
            one and (one[0], (*prompts[one[0] // samples], *one[1]), self._left(*one)) for one in starts
        )
        self._groups = self._until_a_pause()
        self._queue: collections.deque[tuple[int, int, int]] = collections.deque()  # place, budget, prompt [U]
        self._waiting: Waiting | None = None
        self.row_steps = self.tokens = 0

    def __iter__(self) -> Iterator[tuple[np.ndarray, Generation]]:
        ended, enough = None, 0
        while True:
            if np.sum(self._place < 0) >= enough:
                self._fill()
                # Beside the rows for which there are no more prompts: so the last responses are given as they end, too.
                enough = min(self._rows, int((self._place < 0).sum()) + max(1, self._rows // FREE))
            if (self._place < 0).all():
                if ended is None:
                    break
                yield ended  # after which there may be others to begin
                ended, enough = None, 0
                continue
            controls = self._row_controls()
            self._state = decode(
                self._ref, self._guide, self._state, controls,
                settings=self._settings, block=BLOCK, enough=np.int32(enough), steps=self._steps,
            )  # fmt: skip
            if ended is not None:  # while the devices go on
                yield ended
            ended = self._ended()

    def _until_a_pause(self) -> Iterator[list[tuple[int, tuple[int, ...], int]]]:
        """Responses to begin, up to a pause; those that begin alike and follow each other share a prefill."""

        def begun() -> Iterator[tuple[int, tuple[int, ...], int]]:
            for one in self._begun:
                if one is None:
                    return
                yield one

        return ([*group] for _, group in itertools.groupby(begun(), key=lambda one: one[1]))

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
        while len(free := np.flatnonzero(self._place < 0)) and (self._queue or self._prefill()):
            source = np.full(self._rows, -1, np.int32)
            for row in free[: len(self._queue)]:
                self._place[row], self._budget[row], source[row] = self._queue.popleft()
                self._checked[row] = 0
            self._state = refill(self._state, self._waiting, sharding.place_rows(source))

    def _prefill(self) -> bool:
        """Prefill the next prompts; return False if there are none."""
        self._waiting = None
        groups = list(itertools.islice(self._groups, self._prompts_at_once))
        if len(groups) < self._prompts_at_once:
            self._groups = self._until_a_pause()
        if not groups:
            return False
        prompts = [group[0][1] for group in groups]
        self._queue.extend((place, left, i) for i, group in enumerate(groups) for place, _, left in group)
        filled = prompts + [prompts[0][:1]] * (self._prompts_at_once - len(prompts))
        padded, start = api.pad(filled, self._bucket)
        fill = functools.partial(prefill, tokens=padded[:, :-1], start=start, size=padded.shape[1] - 1)
        self._waiting = Waiting(
            ref_cache=fill(self._ref.params, self._ref.config),
            guide_cache=value.each(
                lambda model: fill(value.trunk(model).params, value.trunk(model).config), self._guide
            ),
            pending=sharding.place_rows(padded[:, -1]),
            previous=sharding.place_rows(np.asarray([p[-2] if len(p) > 1 else -1 for p in filled], np.int32)),
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
        return places, api.to_generation(kept, self._new, guided=gives_values(self._guide))
