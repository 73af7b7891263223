"""Rollout records in Parquet shards: `round_N/shard-00000.parquet`, ... A shard is whole or absent."""

import dataclasses
import io
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qsharp_jax.system import files
from qsharp_jax.system.errors import UserError

if TYPE_CHECKING:
    import pyarrow


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


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.parquet"


def write_shard(folder: Path, index: int, rollouts: Sequence[Rollout]) -> None:
    """Write one shard, whole or not at all."""
    import pyarrow.parquet

    if not files.is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist([vars(rollout) for rollout in rollouts], schema=_schema())
    with files.writing(shard_path(folder, index)) as file:
        pyarrow.parquet.write_table(table, file, write_page_checksum=True)


def read_shard(path: Path) -> list[Rollout]:
    """Read the rollouts of one shard.

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
    except MemoryError:  # pyarrow.ArrowMemoryError is one too
        raise
    # Checksums cover the pages only: a flipped bit in the schema may leave a name that is not UTF-8, a ValueError.
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise UserError(
            f"the shard {path} is damaged ({str(error).splitlines()[0]}); delete it and collect again, or continue"
            " without it with --skip-damaged"
        ) from error
    return [Rollout(**row) for row in table.to_pylist()]


def read_rounds(folder: Path, rounds: Iterable[int], *, skip_damaged: bool = False) -> list[Rollout]:
    """Read all rollouts of some rounds, in the order they were collected.

    Args:
      folder: holds `round_1/`, `round_2/`, ...
      skip_damaged: leave out damaged shards, printing each, instead of raising a UserError at the first.
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


def with_reward(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Drop the rollouts that have no reward."""
    return [rollout for rollout in rollouts if rollout.reward is not None]


def is_held_out(prompt_id: str, share: float) -> bool:
    """Return true if a prompt is among the `share` that the guide is measured on and not fitted to, in every round."""
    return zlib.crc32(prompt_id.encode()) < share * 2**32


def with_variation(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Drop the problems whose rollouts of a round all have the same reward."""
    rewards = defaultdict(set)
    for rollout in rollouts:
        rewards[rollout.round, rollout.prompt_id].add(rollout.reward)
    return [rollout for rollout in rollouts if len(rewards[rollout.round, rollout.prompt_id]) > 1]
