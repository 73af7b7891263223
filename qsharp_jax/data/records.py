"""Rollout records in Parquet shards: `round_N/shard-00000.parquet`, ... A shard is whole or absent.

In memory, rollouts are columns: tokens are int32 in one array for all rollouts, so 10^6 rollouts of 550 tokens take
2.3 GB. Shapes: N rollouts.
"""

import array
import dataclasses
import io
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qsharp_jax.system import files
from qsharp_jax.system.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow

TOKENS = ("prompt_tokens", "response_tokens")
REPEATED = re.compile(r"^([0-9a-f]{16})-\d+$")  # see `tasks.base.content_id`


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One response with its reward."""

    prompt_id: str  # identity of the problem
    round: int  # 1, 2, ...
    # prompt_tokens, response_tokens: ids, including the stop token
    prompt_tokens: list[int]
    response_tokens: list[int]
    switch: int  # number of response tokens that the guided policy chose before `pi_ref` took over; 0 in round 1
    reward: float | None  # of the whole response; None where the reward function failed
    finished: bool  # whether the response ended with a stop token
    eta: float  # eta of the roll-in; inf where `pi_ref` chose everything
    seed: int  # seed of the roll-out
    text: str  # the response as text

    @property
    def first_label(self) -> int:
        """First labeled position, counted from the response's first token: the last token not chosen by `pi_ref`.

        This is the last token of the roll-in, or -1, the prompt's last token, without a roll-in.
        """
        return self.switch - 1


def _schema() -> "pyarrow.Schema":
    """Types of the columns, one per field of `Rollout`."""
    import pyarrow

    return pyarrow.schema(
        dict(
            prompt_id=pyarrow.string(),
            round=pyarrow.int32(),
            prompt_tokens=pyarrow.list_(pyarrow.int32()),
            response_tokens=pyarrow.list_(pyarrow.int32()),
            switch=pyarrow.int32(),
            reward=pyarrow.float32(),
            finished=pyarrow.bool_(),
            eta=pyarrow.float32(),
            seed=pyarrow.int64(),
            text=pyarrow.string(),
        )
    )


class Lists:
    """N lists of token ids in one array: list n is `values[starts[n] : starts[n] + lengths[n]]`."""

    def __init__(self, values: np.ndarray, lengths: np.ndarray, starts: np.ndarray | None = None):
        self.values, self.lengths = values, lengths.astype(np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths if starts is None else starts  # by default end to end

    def __getitem__(self, index: int | np.ndarray) -> "np.ndarray | Lists":
        """Return one list, or the lists of some rows (indices, or a mask [N]), both without copying a token."""
        if isinstance(index, np.ndarray):
            return Lists(self.values, self.lengths[index], self.starts[index])
        return self.values[self.starts[index] : self.starts[index] + self.lengths[index]]


class Rollouts(Sequence[Rollout]):
    """N rollouts in columns; an index gives one of them as a `Rollout`.

    Attributes:
      columns: by the names of `Rollout`'s fields: `Lists` of tokens, arrays [N] of numbers (a reward that is None is
        nan) and of str objects. A text that was not read is empty.
    """

    def __init__(self, columns: dict[str, Any]):
        self.columns = columns

    @classmethod
    def of(cls, rollouts: Iterable[Rollout]) -> "Rollouts":
        return _from_table(_to_table(rollouts))

    def __len__(self) -> int:
        return len(self.rewards)

    def __getitem__(self, index: int) -> Rollout:
        row = {name: column[index] for name, column in self.columns.items()}
        row = {name: value if isinstance(value, str) else value.tolist() for name, value in row.items()}
        return Rollout(**row | {"reward": None if math.isnan(row["reward"]) else row["reward"]})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    def select(self, rows: np.ndarray) -> "Rollouts":
        """Return the rollouts of some rows (indices, or a mask [N]), without copying a token."""
        return Rollouts({name: column[rows] for name, column in self.columns.items()})

    @property
    def prompt_ids(self) -> list[str]:
        return self.columns["prompt_id"].tolist()

    @property
    def rewards(self) -> np.ndarray:
        """[N] float32, nan where there is none."""
        return self.columns["reward"]

    @property
    def first_labels(self) -> np.ndarray:
        """`Rollout.first_label`, [N]."""
        return self.columns["switch"] - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of prompt and response together, [N]."""
        return self.columns["prompt_tokens"].lengths + self.columns["response_tokens"].lengths


def _to_table(rollouts: Iterable[Rollout]) -> "pyarrow.Table":
    import pyarrow

    return pyarrow.Table.from_pylist([vars(rollout) for rollout in rollouts], schema=_schema())


def _from_table(table: "pyarrow.Table") -> Rollouts:
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name in TOKENS:
            values, lengths = column.flatten(), column.value_lengths()
            columns[name] = Lists(values.to_numpy(), lengths.to_numpy(zero_copy_only=False))
        else:
            columns[name] = column.to_numpy(zero_copy_only=False)
    return Rollouts(columns)


def _join(parts: Iterable[Rollouts]) -> Rollouts:
    """Join rollouts whose lists lie end to end, each part taken as it comes, so that only one is there twice."""
    tokens = {name: array.array("i") for name in TOKENS}  # grows in place, unlike an array of NumPy
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    for part in parts:
        for name, column in part.columns.items():
            if name in TOKENS:
                tokens[name].frombytes(column.values.view(np.uint8))
            columns[name].append(column.lengths if name in TOKENS else column)
    joined = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    lists = {name: Lists(np.frombuffer(tokens[name], np.int32), joined[name]) for name in TOKENS}
    return Rollouts(joined | lists)


# --- On disk --------------------------------------------------------------------------------------------------------


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.parquet"


def write_shard(folder: Path, index: int, rollouts: Sequence[Rollout]) -> None:
    """Write one shard, whole or not at all."""
    import pyarrow.parquet

    if not files.is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    table = _to_table(rollouts)
    with files.writing(shard_path(folder, index)) as file:
        pyarrow.parquet.write_table(table, file, write_page_checksum=True)


def read_shard(path: Path, *, texts: bool = True) -> Rollouts:
    """Read the rollouts of one shard.

    Args:
      texts: keep the responses' texts in memory; they are checked in any case.

    Raises:
      UserError: if it is damaged or not a shard of rollouts.
      OSError: if it cannot be read, whatever its content.
    """
    import pyarrow.parquet

    content = path.read_bytes()  # first, so that failures below are due to the content
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content), page_checksum_verification=True)
        if not table.schema.equals(_schema()):
            raise pyarrow.ArrowInvalid("its columns are not those of rollouts")
        if any(table[name].null_count for name in table.column_names if name != "reward"):
            raise pyarrow.ArrowInvalid("a field other than the reward is missing")
    except MemoryError:  # pyarrow.ArrowMemoryError is one too
        raise
    # Checksums cover the pages only: a flipped bit in the schema may leave a name that is not UTF-8, a ValueError.
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise UserError(
            f"the shard {path} is damaged ({first_line(error)}); delete it and collect again, or continue"
            " without it with --skip-damaged"
        ) from error
    rollouts = _from_table(table if texts else table.drop_columns(["text"]))
    empty = {} if texts else {"text": np.full(len(table), "", object)}
    return Rollouts(rollouts.columns | empty)


def read_rounds(folder: Path, rounds: Iterable[int], *, skip_damaged: bool = False, texts: bool = True) -> Rollouts:
    """Read all rollouts of some rounds, in the order they were collected.

    Args:
      folder: holds `round_1/`, `round_2/`, ...
      skip_damaged: leave out damaged shards, printing each, instead of raising a UserError at the first.
      texts: as in `read_shard`.
    """

    def shards() -> Iterator[Rollouts]:
        for number in rounds:
            count = 0
            for path in sorted((folder / f"round_{number}").glob("shard-*.parquet")):
                try:
                    shard = read_shard(path, texts=texts)
                except UserError as error:
                    if not skip_damaged:
                        raise
                    print(f"left out: {error}")
                    continue
                count += len(shard)
                yield shard
            if not count:
                raise UserError(f"there are no rollouts of round {number} in {folder}; run `qsharp collect` first")

    return _join(shards())


def count_rollouts(folder: Path) -> int:
    """Return the number of rollouts in the shards of a round's folder; a UserError for a damaged one."""
    import pyarrow.parquet

    count = 0
    for path in sorted(folder.glob("shard-*.parquet")):
        try:
            with path.open("rb") as file:  # of which only the end is read
                count += pyarrow.parquet.read_metadata(file).num_rows
        except (pyarrow.ArrowException, OSError):
            count += len(read_shard(path))  # which says what is wrong
    return count


# --- Choices of rollouts --------------------------------------------------------------------------------------------


def with_reward(rollouts: Rollouts) -> Rollouts:
    """Drop the rollouts that have no reward."""
    return rollouts.select(~np.isnan(rollouts.rewards))


def is_held_out(prompt_id: str, share: float) -> bool:
    """Return true if a prompt is among the `share` that the guide is measured on and not fitted to, in every round.

    A repeated prompt, whose id is that of its content with -2, -3, ... at the end, is where the first one is.
    """
    return zlib.crc32(REPEATED.sub(r"\1", prompt_id).encode()) < share * 2**32


def split_held_out(rollouts: Rollouts, share: float) -> tuple[Rollouts, Rollouts]:
    """Return the rollouts to learn from, and those whose prompts are held out."""
    held_out = np.asarray([is_held_out(prompt_id, share) for prompt_id in rollouts.prompt_ids], bool)
    return rollouts.select(~held_out), rollouts.select(held_out)


def with_variation(rollouts: Rollouts) -> Rollouts:
    """Drop the problems whose rollouts of a round all have the same reward."""
    numbers: dict[tuple[int, str], int] = {}  # of the problems of each round
    keys = zip(rollouts.columns["round"].tolist(), rollouts.prompt_ids, strict=True)
    problems = np.asarray([numbers.setdefault(key, len(numbers)) for key in keys], int)
    least, most = np.full(len(numbers), np.inf), np.full(len(numbers), -np.inf)
    np.minimum.at(least, problems, rollouts.rewards)
    np.maximum.at(most, problems, rollouts.rewards)
    return rollouts.select((least < most)[problems])
