"""The aggregated dataset: rollout records in Parquet shards on disk, and fixed-shape batches of them.

A shard is whole or absent. The batches of an epoch follow from the seed, and a step's batch from the step alone, so
the position in the data is the step. Shapes: B rows, T tokens. It knows nothing about models, tasks or losses.
"""

import dataclasses
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import flax.struct
import jax
import numpy as np
import pyarrow
import pyarrow.parquet

from qsharp_jax.system import files
from qsharp_jax.system.errors import UserError

datasets.disable_progress_bars()  # a shard takes milliseconds

FEATURES = datasets.Features(
    prompt_id=datasets.Value("string"),
    round=datasets.Value("int32"),
    prompt_tokens=datasets.List(datasets.Value("int32")),
    response_tokens=datasets.List(datasets.Value("int32")),
    switch=datasets.Value("int32"),
    reward=datasets.Value("float32"),
    finished=datasets.Value("bool"),
    eta=datasets.Value("float32"),
    seed=datasets.Value("int64"),
    text=datasets.Value("string"),
)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One response with its reward.

    Attributes:
      prompt_id: the problem's.
      round: 1, 2, ...
      prompt_tokens, response_tokens: ids, the stop token included.
      switch: how many response tokens the guided policy chose before `pi_ref` took over; 0 in round 1.
      reward: of the whole response.
      finished: ended by a stop token.
      eta: of the roll-in; inf where `pi_ref` chose everything.
      seed: of the roll-out.
      text: the response as text.
    """

    prompt_id: str
    round: int
    prompt_tokens: list[int]
    response_tokens: list[int]
    switch: int
    reward: float
    finished: bool
    eta: float
    seed: int
    text: str

    @property
    def first_label(self) -> int:
        """First position with a label, counted from the response's first token: the last token that `pi_ref` did not
        choose. That is the last roll-in token, or -1, the prompt's last token, where `pi_ref` chose all."""
        return self.switch - 1


# --- Shards ---------------------------------------------------------------------------------------------------------


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.parquet"


def write_shard(folder: Path, index: int, rollouts: Sequence[Rollout]) -> None:
    """Writes one shard, so that it is whole or absent."""
    if not files.is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    columns = {name: [getattr(rollout, name) for rollout in rollouts] for name in FEATURES}
    with files.writing(shard_path(folder, index)) as file:
        datasets.Dataset.from_dict(columns, features=FEATURES).to_parquet(file, write_page_checksum=True)


def read_shard(path: Path) -> list[Rollout]:
    """The rollouts of one shard.

    Raises:
      UserError: if it is damaged or is no shard of rollouts.
      OSError: if it cannot be read, which says nothing about what is in it.
    """
    content = path.read_bytes()  # first: of what is read below, a failure is of the content
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content), page_checksum_verification=True)
        if not table.schema.equals(FEATURES.arrow_schema):
            raise pyarrow.ArrowInvalid("its columns are not a rollout's")
    except MemoryError:  # one of Arrow's exceptions is such a one too
        raise
    # The checksums are the pages'; in the schema, a flipped bit may also leave a name that is no UTF-8: a ValueError.
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise UserError(
            f"the shard {path} is damaged ({str(error).splitlines()[0]}); delete it and collect again, or go on without"
            " it with --skip-damaged"
        ) from error
    return [Rollout(**row) for row in table.to_pylist()]


def read_rounds(folder: Path, rounds: Iterable[int], *, skip_damaged: bool = False) -> list[Rollout]:
    """All rollouts of some rounds, in the order they were collected.

    Args:
      folder: holds `round_1/`, `round_2/`, ...
      skip_damaged: leave out damaged shards, naming each, instead of stopping at the first.

    Raises:
      UserError: for a damaged shard, or if a round has no rollouts.
    """
    rollouts = []
    for number in rounds:
        before = len(rollouts)
        for path in sorted((folder / f"round_{number}").glob("shard-*.parquet")):
            try:
                rollouts += read_shard(path)
            except UserError as error:
                if not skip_damaged:
                    raise
                print(f"left out: {error}")
        if len(rollouts) == before:
            raise UserError(f"there are no rollouts of round {number} in {folder}; run `qsharp collect` first")
    return rollouts


def with_variation(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Without the problems whose rollouts of a round all have the same reward."""
    rewards = defaultdict(set)
    for rollout in rollouts:
        rewards[rollout.round, rollout.prompt_id].add(rollout.reward)
    return [rollout for rollout in rollouts if len(rewards[rollout.round, rollout.prompt_id]) > 1]


# --- Batches --------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Batch:
    """Rows of prompt and response, right-padded; a packed row has several, one behind the other.

    Attributes:
      tokens: [B, T] int32.
      segments: [B, T] int32, from 1 on in each row, 0 at padding.
      positions: [B, T] int32, counted from each segment's first token.
      response_mask: [B, T] bool, true at response tokens.
      label_mask: [B, T] bool, true at the tokens that carry a label: of the response, and the prompt's last.
      reward_to_go: [B, T] float32, the sum of rewards from each of these tokens on.
    """

    tokens: jax.Array
    segments: jax.Array
    positions: jax.Array
    response_mask: jax.Array
    label_mask: jax.Array
    reward_to_go: jax.Array


@dataclasses.dataclass(frozen=True)
class Example:
    """A sequence to learn from.

    Attributes:
      first_label: of the labelled tokens, counted from the response's first; -1 is the prompt's last token.
    """

    prompt: Sequence[int]
    response: Sequence[int]
    reward: float = 0.0
    first_label: int = 0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def from_rollout(rollout: Rollout) -> Example:
    return Example(rollout.prompt_tokens, rollout.response_tokens, rollout.reward, rollout.first_label)


def make_batch(examples: Sequence[Example], rows: int, width: int) -> Batch:
    """`examples`, one a row, as a batch of `rows` x `width`; rows that are left over are padding."""
    return make_packed_batch([[example] for example in examples], rows, width)


def make_packed_batch(groups: Sequence[Sequence[Example]], rows: int, width: int) -> Batch:
    """Groups of examples, one group a row and each example a segment of it, as a batch of `rows` x `width`."""
    tokens, segments, positions = (np.zeros((rows, width), np.int32) for _ in range(3))
    response_mask, label_mask = np.zeros((rows, width), bool), np.zeros((rows, width), bool)
    reward_to_go = np.zeros((rows, width), np.float32)
    for row, group in enumerate(groups):
        end = 0
        for segment, example in enumerate(group, start=1):
            first, begin, end = end, end + len(example.prompt), end + len(example)
            tokens[row, first:end] = [*example.prompt, *example.response]
            segments[row, first:end] = segment
            positions[row, first:end] = np.arange(len(example))
            response_mask[row, begin:end] = True
            label_mask[row, begin + example.first_label : end] = True
            # The reward comes at the end, so every token of the response has the whole of it still to come.
            reward_to_go[row, begin + min(example.first_label, 0) : end] = example.reward
    return Batch(tokens, segments, positions, response_mask, label_mask, reward_to_go)


def length_batches(lengths: Sequence[int], *, rows: int, bucket: int) -> list[tuple[int, np.ndarray]]:
    """Indices in groups of at most `rows`, with the width that fits them: those of like length together.

    Widths are multiples of `bucket`, so there are as many shapes as buckets.
    """
    widths = -(-np.asarray(lengths) // bucket) * bucket
    batches = []
    for width in np.unique(widths):
        indices = np.flatnonzero(widths == width)
        batches += [(int(width), indices[i : i + rows]) for i in range(0, len(indices), rows)]
    return batches


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in groups whose lengths add up to at most `capacity`, by best-fit decreasing (Johnson 1973).

    Longest first, each goes to the group that has the least place left among those that have place for it.

    Raises:
      UserError: if one is longer than `capacity`.
    """
    if max(lengths, default=0) > capacity:
        raise UserError(
            f"an example of {max(lengths)} tokens does not fit into fit.pack_length, which is {capacity}; give a longer"
            " one, or 0 to pack nothing"
        )
    groups: list[list[int]] = []
    with_place: list[list[int]] = [[] for _ in range(capacity + 1)]  # groups, by the place that they have left
    present = 0  # bit p: a group has place p left
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        if fitting := present >> length << length:
            place = (fitting & -fitting).bit_length() - 1  # the lowest bit
            group = with_place[place].pop()
            present ^= 0 if with_place[place] else 1 << place
        else:
            place, group = capacity, len(groups)
            groups.append([])
        groups[group].append(index)
        with_place[place - length].append(group)
        present |= 1 << place - length
    return groups


class Batches:
    """Shuffled batches, bucketed by length or packed: `batches[step]` depends on the seed and the step only.

    Every example comes once an epoch.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        *,
        rows: int,
        bucket: int,
        seed: int,
        pack_length: int = 0,
        make: Callable[[Sequence[Sequence[Any]], int, int], Any] = make_packed_batch,
    ):
        """Args:
        examples: `Example`s, or what has a length and `make` makes batches of.
        rows: B, of every batch.
        bucket: widths are multiples of it, in tokens.
        seed: of the shuffling.
        pack_length: several examples share a row, and every batch is of this width, in tokens; 0: one example a row.
        make: of (groups of examples, rows, width), the batch.

        Raises:
          UserError: if an example is longer than `pack_length`.
        """
        self._examples, self._rows, self._bucket, self._seed, self._make = examples, rows, bucket, seed, make
        self._lengths = np.asarray([len(example) for example in examples])
        self._pack_length = pack_length
        # How lengths share rows is the same in every epoch; which examples of a length, is shuffled.
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
        """The epoch's batches: widths, and the examples of each row."""
        rng = np.random.default_rng((self._seed, epoch))
        shuffle = rng.permutation(len(self._lengths))
        if self._groups is None:
            batches = length_batches(self._lengths[shuffle], rows=self._rows, bucket=self._bucket)
            return [(batches[i][0], [*shuffle[batches[i][1]][:, None]]) for i in rng.permutation(len(batches))]
        longest_first = shuffle[np.argsort(-self._lengths[shuffle], kind="stable")]
        groups = [longest_first[self._groups[i]] for i in rng.permutation(len(self._groups))]
        return [(self._pack_length, groups[i : i + self._rows]) for i in range(0, len(groups), self._rows)]
