"""Requests, which go into the engine, and updates of their responses, which come out."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from qsharp_jax.decoding.state import Record
from qsharp_jax.sampling import Sampling


class Busy(Exception):
    """The queue is full."""


class Closed(Exception):
    """The engine takes no more requests."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt, and how to answer it.

    Attributes:
      prompt: token ids, at least one.
      sampling: with one number for each field; `weights` has one for each of the engine's guides. The candidates, what
        tokens get that are not scored, and the vocabulary's size are the engine's.
      seeds: of each response to the prompt.
      top_log_probs: whether to keep the most probable tokens at each position.
    """

    prompt: Sequence[int]
    sampling: Sampling
    seeds: Sequence[int]
    top_log_probs: bool = False

    @property
    def is_guided(self) -> bool:
        return math.isfinite(self.sampling.eta) and bool(np.any(self.sampling.weights))


@dataclasses.dataclass
class Update:
    """New tokens of a response, with what is known of each, and how the response ended, if it has.

    Attributes:
      sample: which response to the request's prompt.
      log_probs, ref_log_probs, kl, values: one number per token, as in `Generation`; a value is nan where the guide did
        not score the token.
      top: (token, log-probability) pairs per token, if asked for.
      finish: "stop", "length", "error", or None while it goes on.
    """

    request: Request
    sample: int
    tokens: list[int]
    log_probs: list[float]
    ref_log_probs: list[float]
    kl: list[float]
    values: list[float]
    top: list[list[tuple[int, float]]]
    finish: str | None = None

    @classmethod
    def of_record(cls, request: Request, sample: int, record: Record, finish: str | None) -> "Update":
        """The update of a row's new tokens; `record` has what the loop kept of them, [N, ...]."""
        top: list[list[tuple[int, float]]] = []
        if request.top_log_probs:
            pairs = zip(record.top_token.tolist(), record.top_log_prob.tolist(), strict=True)
            top = [[*zip(*pair, strict=True)] for pair in pairs]
        return cls(
            request=request,
            sample=sample,
            tokens=record.token.tolist(),
            log_probs=record.log_prob.tolist(),
            ref_log_probs=record.ref_log_prob.tolist(),
            kl=record.kl.tolist(),
            values=record.value.tolist() if request.is_guided else [math.nan] * len(record.token),
            top=top,
            finish=finish,
        )

    @classmethod
    def failed(cls, request: Request, sample: int) -> "Update":
        """The update that ends a response by an error."""
        return cls(request, sample, [], [], [], [], [], [], "error")

    def cut(self, count: int) -> None:
        """Leave out all tokens but the first `count`, with which the response ends."""
        for name in ("tokens", "log_probs", "ref_log_probs", "kl", "values", "top"):
            del getattr(self, name)[count:]
        self.finish = "stop"


@dataclasses.dataclass(frozen=True)
class Load:
    """Counts of what the engine is doing."""

    queued: int
    rows: int
    rows_in_use: int
    steps: int
    row_steps: int  # rows in use, summed over steps
