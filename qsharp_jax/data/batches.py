"""Fixed-shape batches of token sequences, bucketed by length or packed.

Batches depend only on the seed and the step, so the step is the position in the data. Shapes: B rows, T tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from qsharp_jax.data.records import Rollout, Rollouts
from qsharp_jax.system.errors import UserError


@flax.struct.dataclass
class Batch:
    """Rows of prompt and response, right-padded; a packed row holds several, one after the other."""

    tokens: jax.Array  # [B, T] int32
    segments: jax.Array  # [B, T] int32, counted from 1 in each row, 0 at padding
    positions: jax.Array  # [B, T] int32, counted from each segment's first token
    response_mask: jax.Array  # [B, T] bool, true at response tokens
    label_mask: jax.Array  # [B, T] bool, true at labeled tokens: tokens of the response, and the prompt's last
    reward_to_go: jax.Array  # [B, T] float32, the sum of rewards from each of these tokens on


@dataclasses.dataclass(frozen=True)
class Example:
    """A sequence of token ids to learn from, with the reward of the whole response.

    `first_label` is the first labeled token, counted from the response's first; -1 is the prompt's last token.
    """

    prompt: Sequence[int]
    response: Sequence[int]
    reward: float = 0.0
    first_label: int = 0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def from_rollout(rollout: Rollout) -> Example:
    return Example(rollout.prompt_tokens, rollout.response_tokens, rollout.reward, rollout.first_label)


class RolloutExamples(Sequence[Example]):
    """Rollouts as examples, each made when it is taken; its tokens are views."""

    def __init__(self, rollouts: Rollouts):
        self._rollouts = rollouts
        self._prompts, self._responses = (rollouts.columns[name] for name in ("prompt_tokens", "response_tokens"))

    def __len__(self) -> int:
        return len(self._rollouts)

    def __getitem__(self, index: int) -> Example:
        return Example(
            self._prompts[index],
            self._responses[index],
            self._rollouts.rewards[index].item(),
            self._rollouts.first_labels[index].item(),
        )


def make_batch(examples: Sequence[Example], rows: int, width: int) -> Batch:
    """Lay out one example per row in a batch of `rows` x `width`; the remaining rows are padding."""
    return make_packed_batch([[example] for example in examples], rows, width)


def make_packed_batch(
    groups: Sequence[Sequence[Example]], rows: int, width: int, local: np.ndarray | None = None
) -> Batch:
    """Lay out one group per row, each example as a segment of it, in a batch of `rows` x `width`.

    Args:
      local: [rows] bool, the rows to fill in; the others have their segments alone. By default all.
    """
    tokens, segments, positions = (np.zeros((rows, width), np.int32) for _ in range(3))
    response_mask, label_mask = np.zeros((rows, width), bool), np.zeros((rows, width), bool)
    reward_to_go = np.zeros((rows, width), np.float32)
    for row, group in enumerate(groups):
        end = 0
        for segment, example in enumerate(group, start=1):
            first, begin, end = end, end + len(example.prompt), end + len(example)
            segments[row, first:end] = segment
            if local is not None and not local[row]:
                continue
            tokens[row, first:begin], tokens[row, begin:end] = example.prompt, example.response
            positions[row, first:end] = np.arange(len(example))
            response_mask[row, begin:end] = True
            label_mask[row, begin + example.first_label : end] = True
            # The reward comes at the end, so the reward-to-go is the same at every token of the response.
            reward_to_go[row, begin + min(example.first_label, 0) : end] = example.reward
    return Batch(tokens, segments, positions, response_mask, label_mask, reward_to_go)


def length_batches(lengths: Sequence[int], *, rows: int, bucket: int) -> list[tuple[int, np.ndarray]]:
    """Group sequences of similar length: (width, indices) per group, where the width fits all of its lengths.

    Args:
      lengths: [n], in tokens.
      rows: maximum number of sequences in a group.
      bucket: widths are multiples of it, so there are at most as many shapes as buckets.
    """
    widths = -(-np.asarray(lengths) // bucket) * bucket
    batches = []
    for width in np.unique(widths):
        indices = np.flatnonzero(widths == width)
        batches += [(int(width), indices[i : i + rows]) for i in range(0, len(indices), rows)]
    return batches


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group indices so that each group's lengths add up to at most `capacity`: best-fit decreasing (Johnson 1973).

    Longest first, each goes to the group with the least room left among those with room for it. A length above
    `capacity` is a UserError.
    """
    if max(lengths, default=0) > capacity:
        raise UserError(
            f"an example of {max(lengths)} tokens does not fit into fit.pack_length, which is {capacity}; give a larger"
            " one, or 0 to turn packing off"
        )
    groups: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # groups by the room that they have left
    rooms = 0  # bit r: a group has room r left
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        if fitting := rooms >> length << length:
            room = (fitting & -fitting).bit_length() - 1  # the lowest bit
            group = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
        else:
            room, group = capacity, len(groups)
            groups.append([])
        groups[group].append(index)
        with_room[room - length].append(group)
        rooms |= 1 << room - length
    return groups


class Batches:
    """Shuffled batches: `batches[step]` depends only on the seed and the step. Every example comes once per epoch."""

    def __init__(
        self,
        examples: Sequence[Any],
        *,
        rows: int,
        bucket: int,
        seed: int,
        pack_length: int = 0,
        lengths: np.ndarray | None = None,
        make: Callable[[Sequence[Sequence[Any]], int, int], Any] = make_packed_batch,
    ):
        """Args:
        examples: `Example`s, or other objects with a length that `make` accepts.
        rows: B, of every batch.
        bucket: widths are multiples of it, in tokens.
        pack_length: width of every batch, in tokens, with several examples per row; 0: one example per row.
        lengths: of the examples, [n], where they are known without making each of them.
        make: (groups of examples, rows, width) -> the batch.
        """
        self._examples, self._rows, self._bucket, self._seed, self._make = examples, rows, bucket, seed, make
        self._lengths = np.asarray([len(example) for example in examples]) if lengths is None else lengths
        self._pack_length = pack_length
        # Every epoch packs the same lengths together, but shuffles the examples of each length.
        self._groups = pack(-np.sort(-self._lengths), pack_length) if pack_length else None
        self._epoch, self._order = 0, self._shuffled(0)

    @property
    def steps_per_epoch(self) -> int:
        return len(self._order)

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        width, groups = self._order[place]
        return self._make([[self._examples[i] for i in group] for group in groups], self._rows, width)

    def _shuffled(self, epoch: int) -> list[tuple[int, list[np.ndarray]]]:
        """The width of each of the epoch's batches, and the examples of each row."""
        rng = np.random.default_rng((self._seed, epoch))
        shuffle = rng.permutation(len(self._lengths))
        if self._groups is None:
            batches = length_batches(self._lengths[shuffle], rows=self._rows, bucket=self._bucket)
            return [(batches[i][0], [*shuffle[batches[i][1]][:, None]]) for i in rng.permutation(len(batches))]
        longest_first = shuffle[np.argsort(-self._lengths[shuffle], kind="stable")]
        groups = [longest_first[self._groups[i]] for i in rng.permutation(len(self._groups))]
        return [(self._pack_length, groups[i : i + self._rows]) for i in range(0, len(groups), self._rows)]
