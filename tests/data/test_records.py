"""Shards on disk: read back bit for bit, whole or absent, damage noticed, readable by and from `datasets`."""

import dataclasses
import errno
import itertools
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from qsharp_jax.data.records import (
    Rollout,
    is_held_out,
    read_rounds,
    read_shard,
    shard_path,
    split_held_out,
    with_reward,
    with_variation,
    write_shard,
)
from qsharp_jax.system.errors import UserError

ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
ROLLOUTS = st.builds(
    Rollout,
    prompt_id=st.text(),
    round=st.integers(1, 2**31 - 1),
    prompt_tokens=ids,
    response_tokens=ids,
    switch=st.integers(0, 2**31 - 1),
    reward=st.floats(width=32, allow_nan=False),
    finished=st.booleans(),
    eta=st.floats(width=32, min_value=0, exclude_min=True),  # inf among them
    seed=st.integers(0, 2**32 - 1),
    text=st.text(),
)


def make_rollout(number=0, **changes):
    text = "54-12=42. é😀"
    rollout = Rollout(f"p{number}", 1, [1, 2, 3], [4] * (number + 1), 0, 1.0, True, float("inf"), 2**32 - 1, text)
    return dataclasses.replace(rollout, **changes)


@settings(max_examples=30)
@given(st.lists(ROLLOUTS, min_size=1, max_size=4))
def test_a_shard_gives_back_every_field_as_it_was(tmp_path_factory, rollouts):
    """Bit for bit: eta = inf, empty and non-ASCII texts, empty responses, seeds beyond 31 bits."""
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder, 3, rollouts)
    assert read_shard(shard_path(folder, 3)) == rollouts
    assert [path.name for path in folder.iterdir()] == ["shard-00003.parquet"]


def test_shards_are_those_of_the_package_datasets(tmp_path):
    """It reads ours, and ours reads what it writes, as shards of earlier runs are."""
    kinds = dict(
        prompt_id="string", round="int32", switch="int32", reward="float32", finished="bool", eta="float32",
        seed="int64", text="string",
    )  # fmt: skip
    features = {name: datasets.Value(kind) for name, kind in kinds.items()}
    features |= {name: datasets.List(datasets.Value("int32")) for name in ("prompt_tokens", "response_tokens")}
    order = [field.name for field in dataclasses.fields(Rollout)]
    features = datasets.Features({name: features[name] for name in order})
    rollouts = [make_rollout(number, switch=number, reward=0.5) for number in range(3)]
    write_shard(tmp_path, 0, rollouts)
    loaded = datasets.Dataset.from_parquet(str(shard_path(tmp_path, 0)), cache_dir=tmp_path / "cache")
    assert loaded.features == features and loaded.to_list() == [vars(rollout) for rollout in rollouts]
    other = datasets.Dataset.from_list([vars(rollout) for rollout in rollouts], features=features)
    other.to_parquet(shard_path(tmp_path, 1), write_page_checksum=True)
    assert read_shard(shard_path(tmp_path, 1)) == rollouts


def test_rounds_are_read_in_the_order_of_collection(tmp_path):
    """Round by round, shard by shard (the tenth after the second), row by row; and only the rounds asked for."""
    rollouts = [make_rollout(number, round=1 + number // 24) for number in range(36)]
    for shard in range(18):
        part = rollouts[2 * shard : 2 * shard + 2]
        write_shard(tmp_path / f"round_{part[0].round}", shard % 12, part)
    assert read_rounds(tmp_path, [1, 2]) == rollouts
    assert read_rounds(tmp_path, range(2, 3)) == rollouts[24:]


def test_choices_of_rollouts_are_those_of_a_loop(tmp_path):
    """Rows of columns against a loop over the records, over shards, without texts, and with rewards that are missing."""
    rng = np.random.default_rng(0)
    rollouts = [
        make_rollout(number % 17, round=1 + number // 40, reward=[None, 0.0, 1.0][rng.integers(3)]) for number in range(80)
    ]
    for shard in range(8):
        part = rollouts[10 * shard : 10 * shard + 10]
        write_shard(tmp_path / f"round_{part[0].round}", shard, part)
    columns = read_rounds(tmp_path, [1, 2], texts=False)
    rollouts = [dataclasses.replace(rollout, text="") for rollout in rollouts]
    assert columns == rollouts
    judged = [rollout for rollout in rollouts if rollout.reward is not None]
    assert with_reward(columns) == judged
    ids = [f"{number:016x}" for number in range(50)]
    assert [is_held_out(f"{repeated}-3", 0.4) for repeated in ids] == [is_held_out(once, 0.4) for once in ids]
    learned, held_out = split_held_out(with_reward(columns), 0.4)
    assert held_out == [rollout for rollout in judged if is_held_out(rollout.prompt_id, 0.4)] != []
    assert learned == [rollout for rollout in judged if not is_held_out(rollout.prompt_id, 0.4)] != []
    assert held_out.lengths.tolist() == [len(r.prompt_tokens) + len(r.response_tokens) for r in held_out]

    def rewards(like):
        return {r.reward for r in learned if (r.round, r.prompt_id) == (like.round, like.prompt_id)}

    assert 0 < len(with_variation(learned)) < len(learned)
    assert with_variation(learned) == [rollout for rollout in learned if len(rewards(rollout)) > 1]


@pytest.mark.parametrize("killed_at", ["write_table", "fsync", "replace"])
def test_a_shard_is_whole_or_absent(tmp_path, monkeypatch, killed_at):
    """A write that ends anywhere leaves no shard, or the old one; the next write does not mind what was left."""
    folder = tmp_path / "round_1"
    old, new = [make_rollout(0)], [make_rollout(1), make_rollout(2)]
    write_shard(folder, 0, old)

    def half_written(table, file, **options):
        file.write(b"PAR1 and then the power went")
        file.flush()
        raise KeyboardInterrupt

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if killed_at == "write_table":
            patch.setattr(pyarrow.parquet, "write_table", half_written)
        else:
            patch.setattr(os, killed_at, killed)
        for index in (0, 1):
            with pytest.raises(KeyboardInterrupt):
                write_shard(folder, index, new)
    assert [path.name for path in folder.iterdir() if path.suffix == ".parquet"] == ["shard-00000.parquet"]
    assert read_rounds(tmp_path, [1]) == old  # whatever else lies there is no shard

    write_shard(folder, 1, new)
    assert read_rounds(tmp_path, [1]) == old + new


def shard_bytes(folder):
    rollouts = [make_rollout(number, switch=number) for number in range(5)]
    write_shard(folder, 0, rollouts)
    return rollouts, shard_path(folder, 0).read_bytes()


def damaged(how, tmp_path):
    """A file named as a shard, and not one."""
    path = tmp_path / "round_1" / "shard-00000.parquet"
    rollouts, whole = shard_bytes(tmp_path / "round_1")
    table = pyarrow.parquet.read_table(path)
    if how == "empty":
        path.write_bytes(b"")
    elif how == "no parquet":
        path.write_text("prompt_id,round\n")
    elif how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "page":  # the last byte of the column's last page
        column = pyarrow.parquet.read_metadata(path).row_group(0).column(0)
        place = column.dictionary_page_offset + column.total_compressed_size - 1
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    elif how == "footer":  # which no checksum covers: the column's name is no UTF-8 any more
        place = whole.index(b"prompt_id", len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"))
        path.write_bytes(whole[:place] + b"\xf0" + whole[place + 1 :])
    elif how == "column missing":
        pyarrow.parquet.write_table(table.drop_columns(["seed"]), path)
    elif how == "field missing":
        numbers = pyarrow.array([None] * len(table), pyarrow.int32())
        pyarrow.parquet.write_table(table.set_column(table.column_names.index("switch"), "switch", numbers), path)
    elif how == "column of another type":
        texts = pyarrow.array([str(reward) for reward in table["reward"].to_pylist()])
        pyarrow.parquet.write_table(table.set_column(table.column_names.index("reward"), "reward", texts), path)
    return path


DAMAGES = (
    "empty", "no parquet", "truncated", "page", "footer", "column missing", "field missing", "column of another type",
)  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_shard_is_named_with_what_to_do(tmp_path, how):
    path = damaged(how, tmp_path)
    message = refusal(read_rounds, tmp_path, [1])
    assert str(path) in message
    assert "collect again" in message and "--skip-damaged" in message


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ((Path, "read_bytes"), OSError(errno.EIO, "Input/output error")),
        ((Path, "read_bytes"), OSError(errno.ESTALE, "Stale file handle")),
        ((Path, "read_bytes"), OSError("503, Service Unavailable")),  # of a bucket
        ((Path, "read_bytes"), TimeoutError()),
        ((Path, "read_bytes"), PermissionError(errno.EACCES, "Permission denied")),
        ((pyarrow.parquet, "read_table"), pyarrow.ArrowMemoryError("malloc of size 8 failed")),
        ((pyarrow.parquet, "read_table"), MemoryError()),
    ],
    ids=repr,
)
def test_a_shard_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, where, error):
    def fail(*arguments, **options):
        raise error

    shard_bytes(tmp_path / "round_1")
    monkeypatch.setattr(*where, fail)
    with pytest.raises(type(error)) as caught:
        read_rounds(tmp_path, [1], skip_damaged=True)
    assert caught.value is error


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_shard_is_left_out_only_when_told_to_and_aloud(tmp_path, capsys, how):
    path = damaged(how, tmp_path)
    others = [make_rollout(7), make_rollout(8)]
    write_shard(tmp_path / "round_1", 1, others)
    assert read_rounds(tmp_path, [1], skip_damaged=True) == others
    assert str(path) in capsys.readouterr().out
    shard_path(tmp_path / "round_1", 1).unlink()
    with pytest.raises(UserError, match="no rollouts"):
        read_rounds(tmp_path, [1], skip_damaged=True)


def test_no_flipped_byte_is_read_as_other_rollouts(tmp_path):
    """Wherever it lies: the shard is refused, or the byte was of no importance and the records are the same."""
    rollouts, whole = shard_bytes(tmp_path)
    path, refused = tmp_path / "shard-00001.parquet", 0
    for place, mask in itertools.product(range(0, len(whole), 9), (0x01, 0x80)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
        try:
            assert read_shard(path) == rollouts, f"byte {place} ^ {mask:#x}"
        except UserError:
            refused += 1
    assert refused > 100


def test_a_round_without_rollouts_is_refused(tmp_path):
    """Round 2 was not collected: to fit "round 2" to round 1 alone would be a silent mistake."""
    with pytest.raises(UserError, match="no rollouts of round 1"):
        read_rounds(tmp_path, [1])
    write_shard(tmp_path / "round_1", 0, [make_rollout()])
    (tmp_path / "round_2").mkdir()
    with pytest.raises(UserError, match="no rollouts of round 2.*qsharp collect"):
        read_rounds(tmp_path, [1, 2])
