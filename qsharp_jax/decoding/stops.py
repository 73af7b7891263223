"""Ends of responses by stop strings. The host looks for them in the decoded text, between blocks of steps.

Shapes: R rows, N new tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from qsharp_jax.sampling import Sampling
from qsharp_jax.system import stop_strings
from qsharp_jax.system.errors import UserError

MARGIN = 4  # characters that differ, at most, where a text is decoded from the middle: bytes of one, or a space


class Decodes(Protocol):
    """Whatever turns token ids into text, such as `data.tokenizer.Tokenizer`."""

    def decode(self, tokens: Sequence[int], /) -> str: ...


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """The stop strings of a `Sampling`, and the tokenizer in whose text they are looked for."""

    stop: tuple[str, ...]
    tokenizer: Decodes

    def end(self, tokens: Sequence[int], checked: int = 0) -> int | None:
        """Return how many tokens there are up to the one that completes a stop string; None if none does.

        Args:
          tokens: of a response so far.
          checked: so many of them, from the first on, complete none.
        """
        width, begin = max(map(len, self.stop)) + MARGIN, checked
        while begin and len(self.tokenizer.decode(tokens[begin:checked])) < width:
            begin = max(0, begin - width)
        if not stop_strings.contains(self.tokenizer.decode(tokens[begin:]), self.stop):
            return None
        for count in range(checked + 1, len(tokens) + 1):
            if stop_strings.contains(self.tokenizer.decode(tokens[:count]), self.stop):
                return count
        return None

    def ended(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        stopped: np.ndarray,
        checked: np.ndarray,
        starts: Sequence[Sequence[int]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return lengths [R], and whether rows have stopped [R], with the rows that have come to a stop string.

        Args:
          tokens, lengths, stopped: [R, N], [R] and [R], as the loop has them.
          checked: [R], as in `end`.
          starts: R lists of tokens that precede those of each row.
        """
        lengths, stopped = lengths.copy(), stopped.copy()
        for row in np.flatnonzero(lengths > checked).tolist():
            start = starts[row]
            end = self.end([*start, *tokens[row, : lengths[row]].tolist()], len(start) + checked[row])
            if end is not None:
                lengths[row], stopped[row] = end - len(start), True
        return lengths, stopped


def of(sampling: Sampling, tokenizer: Decodes | None) -> StopStrings | None:
    """Return the stop strings of the settings, None if there are none; raises a UserError without a tokenizer."""
    if not sampling.stop:
        return None
    if tokenizer is None:
        raise UserError("sampling.stop is looked for in decoded text; give tokenizer=, or use stop_ids")
    return StopStrings(tuple(sampling.stop), tokenizer)
