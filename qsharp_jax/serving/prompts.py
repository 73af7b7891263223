"""Prefill of one prompt at a time, in pieces between which the rows decode."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qsharp_jax.decoding.loop import prefill_chunk
from qsharp_jax.decoding.rows import Waiting
from qsharp_jax.models import cpu_form, kv_cache, sharding, value
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import KVCache, Sizes
from qsharp_jax.models.value import ValueModel
from qsharp_jax.serving.requests import Request

PIECES = 4  # lengths of a prompt's first piece, up to a whole chunk: each is a program


@dataclasses.dataclass(eq=False)
class Prompt:
    """A prompt on its way into the caches, and its responses that have no row yet."""

    request: Request
    tokens: np.ndarray  # [1, T], what is still to be prefilled
    previous: int  # the token before them, -1 for none
    caches: list[KVCache | None]  # of the reference, and of each guide; None for one that does not see it
    samples: collections.deque[int]

    @property
    def is_ready(self) -> bool:
        """True once all but its last token, with which decoding begins, are in the caches."""
        return not self.tokens.size


class Prefill:
    """The models that prompts go through, and the lengths of pieces.

    Attributes:
      size: positions of a prompt's caches.
    """

    def __init__(self, ref: LanguageModel, guides: Sequence[ValueModel], size: int, chunk: int):
        """Take models in the decoding form; `chunk` tokens, a multiple of `PIECES`, are a whole piece."""
        self.size, self._chunk = size, chunk
        self._models = [value.trunk(model) for model in (ref, *guides)]
        # Of a prompt that a model does not see: a row without any positions.
        self._unseen = [self._cache(model, 0) for model in self._models]

    def begin(self, request: Request) -> Prompt:
        """A request's prompt, padded so that its pieces have few lengths."""
        tokens, piece = np.asarray(request.prompt[:-1], np.int32), self._chunk // PIECES
        padding = -len(tokens) % piece
        return Prompt(
            request=request,
            tokens=np.pad(tokens, (padding, 0))[None],
            previous=-1,
            caches=[
                self._cache(model, padding) if place == 0 or request.is_guided else None
                for place, model in enumerate(self._models)
            ],
            samples=collections.deque(range(len(request.seeds))),
        )

    def go_on(self, prompt: Prompt) -> None:
        """Prefill the next piece: the first is what whole chunks leave over."""
        count = prompt.tokens.shape[1] % self._chunk or self._chunk
        piece, prompt.tokens = prompt.tokens[:, :count], prompt.tokens[:, count:]
        tokens, previous = _rows(piece[0]), _rows(prompt.previous)
        prompt.caches = [
            cache and prefill_chunk(model.params, model.config, cache, tokens, previous)
            for model, cache in zip(self._models, prompt.caches, strict=True)
        ]
        prompt.previous = int(piece[0, -1])

    def waiting(self, prompt: Prompt) -> Waiting:
        """A prompt that is ready, as `refill` takes it."""
        ref_cache, *guide_caches = (cache or unseen for cache, unseen in zip(prompt.caches, self._unseen, strict=True))
        return Waiting(ref_cache=ref_cache, guide_cache=tuple(guide_caches) or None)

    def _cache(self, model: Any, padding: int) -> KVCache:
        int8 = kv_cache.is_int8(model.config, on_cpu=cpu_form.is_transposed(model.params))
        cache = kv_cache.empty(model.config, Sizes(sharding.round_rows(1), self.size), int8=int8)
        return sharding.place_rows(cache.replace(start=np.full(len(cache.start), padding, np.int32)))


def _rows(values: Any) -> jax.Array:
    """A prompt's int32 values in as many rows as the mesh that is set needs, [U, ...]."""
    values = np.asarray(values, np.int32)
    return sharding.place_rows(np.broadcast_to(values, (sharding.round_rows(1), *values.shape)))
