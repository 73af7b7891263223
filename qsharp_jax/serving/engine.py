"""Requests that arrive while others run: the rows of one decode loop, given to the next request as they end.

One thread owns the devices: that of `Engine.run`. It alternates between a piece of a waiting prompt and a few steps of
all rows, and hands on what each look at the rows brought. `submit`, `cancel` and `close` may be called from any thread.

Shapes: R rows, S positions of the rings, G guides.
"""

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.decoding import stops
from qsharp_jax.decoding.api import for_decoding
from qsharp_jax.decoding.checks import check_guide, check_memory
from qsharp_jax.decoding.loop import decode
from qsharp_jax.decoding.rows import First, empty_state, refill
from qsharp_jax.decoding.state import RECORDED, RECORDS, Controls, Record, Settings, empty_record
from qsharp_jax.models import cpu_form, sharding, value
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import Sizes
from qsharp_jax.models.value import ValueModel
from qsharp_jax.sampling import MODES, Sampling
from qsharp_jax.serving.prompts import PIECES, Prefill, Prompt
from qsharp_jax.serving.requests import Busy, Closed, Load, Request, Update
from qsharp_jax.system.errors import UserError

MOST_STEPS = 16  # between two looks at the rows
LOOK_SECONDS = 0.05  # that the steps between two looks are to take
LAST_STEP = 2**30  # positions are int32; the rings begin anew when no row is in use after so many


@dataclasses.dataclass(eq=False)
class _Row:
    """A row's response."""

    request: Request
    sample: int
    stops: stops.StopStrings | None
    length: int = 0  # tokens so far
    tokens: list[int] = dataclasses.field(default_factory=list)


@functools.partial(jax.jit, static_argnames=("count",))
def _columns(record: Record, begin: jax.Array, *, count: int) -> Record:
    """`count` columns of each row's record, from `begin` [R] on."""
    columns = jnp.minimum(begin[:, None] + jnp.arange(count), record.token.shape[1] - 1)
    return jax.tree.map(
        lambda leaf: jnp.take_along_axis(leaf, columns.reshape(*columns.shape, *(1,) * (leaf.ndim - 2)), axis=1), record
    )


class Engine:
    """Rows of a decode loop, and a bounded queue of requests for them.

    A response is the one that `generate` gives for the same prompt, settings and seed, in float32 up to a draw within
    rounding of the border between two tokens.
    """

    def __init__(
        self,
        ref: LanguageModel,
        guides: Sequence[ValueModel],
        sampling: Sampling,
        *,
        rows: int,
        context: int,
        queue: int,
        chunk: int,
        deliver: Callable[[list[Update]], None],
        tokenizer: stops.Decodes | None = None,
    ):
        """Prepare the models and the rows.

        Args:
          guides: V-types, or Q-types, all of them; none for the reference alone.
          sampling: what all requests share: candidates, what other tokens get, vocabulary and stop ids.
          rows: responses decoded at once, rounded to what the mesh that is set divides.
          context: longest prompt with its response, in tokens.
          queue: requests that may wait.
          chunk: tokens of a prompt that are prefilled between two looks, a multiple of `PIECES`.
          deliver: called on the engine's thread with the updates of a look.
          tokenizer: for requests with stop strings.

        Raises:
          UserError: for guides that do not go together, a context longer than a model's, or too little memory.
        """
        self._sampling, self.context, self._chunk = sampling, context, chunk
        self._deliver_updates, self._tokenizer, self.most_queued = deliver, tokenizer, queue
        if len({guide.config.type for guide in guides}) > 1:
            raise UserError("the guides are a V-type and a Q-type; serve those of one type together")
        self.vocab_size = ref.config.vocab_size if sampling.vocab_size is None else sampling.vocab_size
        for model in (ref, *guides):
            if (longest := value.trunk(model).config.max_positions) < context:
                raise UserError(f"the context is {context}, but a model has {longest} positions; give a smaller one")
        self.guides = tuple(map(for_decoding, guides))
        self._ref = for_decoding(ref)
        self.rows = sharding.round_rows(rows)
        size = context + chunk // PIECES  # a prompt's first piece may begin with padding
        at_once = sharding.round_rows(1)
        check_memory(self._ref, self.guides or None, Sizes(self.rows + at_once, size), prompts=at_once, tokens=chunk)
        self._prefill = Prefill(self._ref, self.guides, size, chunk)
        self._state = self._empty_state()
        self._row: list[_Row | None] = [None] * self.rows
        self._controls = Controls.none(self.rows, len(self.guides))
        self._prompt: Prompt | None = None
        self._steps = 1
        self._queue: collections.deque[Request] = collections.deque()
        self._cancelled: set[Request] = set()
        self._closed = self._failed = False
        self._changed = threading.Condition()
        self._done = self._row_steps = 0

    # --- From any thread --------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise a UserError for a request that the engine cannot answer."""
        prompt, new = request.prompt, request.sampling.max_new_tokens
        if not len(prompt):
            raise UserError("the prompt has no tokens; write at least one word")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise UserError(f"the prompt has token ids outside the vocabulary of {self.vocab_size}")
        if len(prompt) + new > self.context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, which with {new} new ones is more than the context of"
                f" {self.context}; shorten the prompt or the response"
            )
        if request.is_guided:
            weights = zip(self.guides, np.asarray(request.sampling.weights), strict=True)
            for guide in (guide for guide, weight in weights if weight != 0):
                check_guide(guide.config, request.sampling, self.vocab_size)

    def submit(self, request: Request) -> None:
        """Queue a request; its updates come to `deliver`.

        Raises:
          UserError: as of `check`.
          Busy: if the queue is full.
          Closed: after `close`, or after an error of the engine's thread.
        """
        self.check(request)
        with self._changed:
            if self._closed or self._failed:
                raise Closed
            if len(self._queue) >= self.most_queued:
                raise Busy
            self._queue.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """End a request: its rows are free from the next look on; updates on their way may still come."""
        with self._changed:
            if request in self._queue:
                self._queue.remove(request)
            else:
                self._cancelled.add(request)
            self._changed.notify()

    def close(self) -> None:
        """Take no more requests; `run` returns when those that are there are answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    @property
    def has_failed(self) -> bool:
        """True after an error of the engine's thread."""
        return self._failed

    @property
    def load(self) -> Load:
        in_use = sum(row is not None for row in self._row)
        return Load(len(self._queue), self.rows, in_use, self._done, self._row_steps)

    # --- On the engine's thread -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Answer requests until the engine is closed and none is left.

        After an error all requests end with `finish` "error", and it is raised.
        """
        updates: list[tuple[_Row, Update]] = []
        try:
            while self._wait(updates):
                self._free_cancelled()
                self._admit()
                begun = time.monotonic()
                steps = self._dispatch()
                seen, updates = updates, []
                self._deliver(seen)  # while the devices go on
                updates = self._look(steps, begun) if steps else []
        except BaseException:
            try:
                self._deliver(updates)  # of rows that have ended, which nothing else knows of
            finally:
                self._fail()
            raise

    def warm_up(self) -> None:
        """Compile all programs, by answering a few requests before `run`."""
        weights = np.ones(len(self.guides)) if self.guides else None
        plain = dataclasses.replace(self._sampling, max_new_tokens=min(3, self.context - 1), weights=None)
        kinds = [plain, dataclasses.replace(plain, top_p=0.9), dataclasses.replace(plain, top_k=1)]
        kinds += [dataclasses.replace(kind, eta=1.0, weights=weights) for kind in kinds if self.guides]
        lengths = [1 + self._chunk * piece // PIECES for piece in range(1, PIECES + 1)]
        requests = [Request([0], kind, [0]) for kind in kinds]
        requests += [Request([0], kind, [0], top_log_probs=True) for kind in (kinds[0], kinds[-1])]
        requests += [Request([0] * length, kinds[-1], [0]) for length in lengths if length + 3 <= self.context]
        for request in requests:
            if self._closed:
                break
            self._queue.append(request)
            while self._queue or self._prompt or any(self._row):
                self._admit()
                self._look(self._dispatch(), time.monotonic())
        self._done = self._row_steps = 0

    def _wait(self, updates: list) -> bool:
        """Wait until there is something to do; False at the end."""
        with self._changed:
            while not (updates or self._queue or self._prompt or any(self._row)):
                if self._closed:
                    return False
                if self._done > LAST_STEP:
                    self._state, self._done = self._empty_state(), 0
                self._changed.wait()
        return True

    def _free_cancelled(self) -> None:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
        for place, row in enumerate(self._row):
            if row is not None and row.request in cancelled:
                self._free(place)
        if self._prompt is not None and self._prompt.request in cancelled:
            self._prompt = None

    def _free(self, place: int) -> None:
        self._row[place] = None
        self._controls.budget[place] = 0

    def _admit(self) -> None:
        """Prefill pieces of waiting prompts, and give free rows to those that are ready.

        While rows decode, there are as many pieces as there are free rows with a request for them, at least one.
        """
        free = self._row.count(None)
        most, pieces = max(1, min(len(self._queue) + 1, free)), 0
        while True:
            if any(self._row) and pieces >= most:
                return
            if self._prompt is None:
                with self._changed:
                    if not self._queue:
                        return
                    request = self._queue[0]
                prompt = self._prefill.begin(request)  # which may fail: the request is in the queue until it has begun
                with self._changed:
                    if not self._queue or self._queue[0] is not request:  # it was cancelled meanwhile
                        continue
                    self._queue.popleft()
                self._prompt = prompt
            if not self._prompt.is_ready:
                self._prefill.go_on(self._prompt)
                pieces += 1
                if self._cancelled:  # perhaps this prompt, which may be long
                    return
            if self._prompt.is_ready:
                self._give_rows(self._prompt)
                if self._prompt.samples:  # no row is free
                    return
                self._prompt = None

    def _give_rows(self, prompt: Prompt) -> None:
        """Give free rows to responses that have none."""
        source, first = np.full(self.rows, -1, np.int32), First.none(self.rows)
        request, sampling = prompt.request, prompt.request.sampling
        for place, row in enumerate(self._row):
            if row is None and prompt.samples:
                sample = prompt.samples.popleft()
                source[place] = 0
                first.set(place, request.prompt)
                self._row[place] = _Row(request, sample, stops.of(sampling, self._tokenizer))
                self._set_controls(place, request, sample)
        if (source < 0).all():
            return
        self._state = refill(self._state, self._prefill.waiting(prompt), *sharding.place_rows((source, first)))

    def _dispatch(self) -> int:
        """Begin steps of all rows in use; returns how many."""
        rows = [row for row in self._row if row is not None]
        if not rows:
            return 0
        requests = [row.request for row in rows]
        guided = any(request.is_guided for request in requests)
        # Those of `top_log_probs` have one program, guided or not, that can do all: it is compiled before `run`.
        top = any(request.top_log_probs for request in requests)
        truncate = any(r.sampling.top_p < 1 or r.sampling.top_k or r.sampling.temperature == 0 for r in requests)
        settings = Settings(
            stop_ids=tuple(self._sampling.stop_ids),
            vocab_size=self.vocab_size,
            candidates=self._sampling.top_k_candidates,
            others=self._sampling.others,
            truncate=truncate or top,
            top_k=top or any(request.sampling.top_k for request in requests),
            record=RECORDS if top else RECORDED,
        )
        record = self._state.record
        if (record.top_token is None) == top:
            empty = empty_record(self.rows, record.token.shape[1], settings)
            record = record.replace(top_token=empty.top_token, top_log_prob=empty.top_log_prob)
        controls = jax.tree.map(np.copy, self._controls)  # the devices may read it after it has changed
        state, guide_cache = self._state.replace(record=record), self._state.guide_cache
        if not guided:
            state, controls = state.replace(guide_cache=None), controls.replace(weights=None, mode=None)
        steps = 1 if any(row.length == 0 for row in rows) else self._steps
        state = decode(
            self._ref, self.guides if guided else None, state, sharding.place_rows(controls),
            settings=settings, block=1, steps=np.int32(steps),
        )  # fmt: skip
        self._state = state if guided else state.replace(guide_cache=guide_cache)
        return steps

    def _look(self, steps: int, begun: float) -> list[tuple[_Row, Update]]:
        """Wait for the devices, and collect each row's new tokens; rows that have ended become free."""
        begin = np.asarray([0 if row is None else row.length for row in self._row], np.int32)
        columns = _columns(self._state.record, sharding.place_rows(begin), count=MOST_STEPS)
        length, stopped, record = sharding.to_host((self._state.length, self._state.stopped, columns))
        self._steps = int(np.clip(LOOK_SECONDS * steps / (time.monotonic() - begun), 1, MOST_STEPS))
        self._done += steps
        updates = []
        for place, row in enumerate(self._row):
            if row is None:
                continue
            finish = None
            if stopped[place] or length[place] >= self._controls.budget[place]:
                finish = "stop" if stopped[place] else "length"
                self._free(place)
            count, row.length = int(length[place]) - row.length, int(length[place])
            self._row_steps += count
            new = jax.tree.map(lambda leaf, at=(place, slice(count)): leaf[at], record)
            updates.append((row, Update.of_record(row.request, row.sample, new, finish)))
        return updates

    def _deliver(self, updates: list[tuple[_Row, Update]]) -> None:
        """Hand on the updates, cut at stop strings and a request's own stop ids, for which only the host looks."""
        for row, update in updates:
            before = len(row.tokens)
            row.tokens += update.tokens
            own = [at for at, token in enumerate(update.tokens) if token in row.request.sampling.stop_ids]
            ends = [before + at + 1 for at in own[:1]]
            if row.stops is not None and (end := row.stops.end(row.tokens, before)) is not None:
                ends.append(end)
            if ends:
                update.cut(min(ends) - before)
                if row in self._row:  # else the row ended by itself, and may have another response
                    self._free(self._row.index(row))
        if updates:
            self._deliver_updates([update for _, update in updates])

    def _fail(self) -> None:
        """End all requests with an error."""
        with self._changed:
            self._failed = True
            queued = [*self._queue]
            self._queue.clear()
        waiting = [(request, sample) for request in queued for sample in range(len(request.seeds))]
        if self._prompt is not None:
            waiting += [(self._prompt.request, sample) for sample in self._prompt.samples]
        waiting += [(row.request, row.sample) for row in self._row if row is not None]
        self._deliver_updates([Update.failed(*one) for one in waiting])

    # --- Data ---------------------------------------------------------------------------------------------------------

    def _empty_state(self) -> Any:
        guides = tuple(value.trunk(guide).config for guide in self.guides)
        settings = Settings(self._sampling.stop_ids, self.vocab_size, self._sampling.top_k_candidates)
        return empty_state(
            self._ref.config, guides or None, Sizes(self.rows, self._prefill.size), self.context, settings,
            on_cpu=cpu_form.is_transposed(self._ref.params),
        )  # fmt: skip

    def _set_controls(self, place: int, request: Request, sample: int) -> None:
        sampling, controls = request.sampling, self._controls
        controls.eta[place] = sampling.eta if request.is_guided else np.inf
        controls.weights[place] = sampling.weights if request.is_guided else 0
        for name in ("temperature", "top_p", "top_k"):
            getattr(controls, name)[place] = getattr(sampling, name)
        controls.budget[place] = sampling.max_new_tokens
        controls.seed[place] = request.seeds[sample]
        controls.mode[place] = MODES.index(sampling.mode)
