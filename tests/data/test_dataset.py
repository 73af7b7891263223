"""Shards on disk, whole or absent, and batches that follow from the seed and the step."""

import dataclasses
import errno
import itertools
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import assert_trees_equal
from hypothesis import given, settings
from hypothesis import strategies as st

from qsharp_jax.data import dataset
from qsharp_jax.data.dataset import Batches, Example, Rollout
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
    response, text = [4] * (number + 1), "54-12=42. é😀"
    made = Rollout(f"p{number}", 1, [1, 2, 3], response, 0, 1.0, True, float("inf"), 2**32 - 1, text)
    return dataclasses.replace(made, **changes)


# --- Shards ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(ROLLOUTS, min_size=1, max_size=4))
def test_a_shard_gives_back_every_field_as_it_was(tmp_path_factory, rollouts):
    """Bit for bit: eta = inf, empty and non-ASCII texts, empty responses, seeds beyond 31 bits."""
    folder = tmp_path_factory.mktemp("shards")
    dataset.write_shard(folder, 3, rollouts)
    assert dataset.read_shard(dataset.shard_path(folder, 3)) == rollouts
    assert [path.name for path in folder.iterdir()] == ["shard-00003.parquet"]


def test_rounds_are_read_in_the_order_of_collection(tmp_path):
    """Round by round, shard by shard (the tenth after the second), row by row; and only the rounds asked for."""
    rollouts = [make_rollout(number, round=1 + number // 24) for number in range(36)]
    for shard in range(18):
        part = rollouts[2 * shard : 2 * shard + 2]
        dataset.write_shard(tmp_path / f"round_{part[0].round}", shard % 12, part)
    assert dataset.read_rounds(tmp_path, [1, 2]) == rollouts
    assert dataset.read_rounds(tmp_path, range(2, 3)) == rollouts[24:]


@pytest.mark.parametrize("killed_at", ["to_parquet", "fsync", "replace"])
def test_a_shard_is_whole_or_absent(tmp_path, monkeypatch, killed_at):
    """A write that ends anywhere leaves no shard, or the old one; the next write does not mind what was left."""
    folder = tmp_path / "round_1"
    old, new = [make_rollout(0)], [make_rollout(1), make_rollout(2)]
    dataset.write_shard(folder, 0, old)

    def half_written(self, file, **options):
        file.write(b"PAR1 and then the power went")
        file.flush()
        raise KeyboardInterrupt

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if killed_at == "to_parquet":
            patch.setattr(dataset.datasets.Dataset, "to_parquet", half_written)
        elif killed_at == "fsync":
            patch.setattr(os, "fsync", killed)
        else:
            patch.setattr(os, "replace", killed)
        for index in (0, 1):
            with pytest.raises(KeyboardInterrupt):
                dataset.write_shard(folder, index, new)
    assert [path.name for path in folder.iterdir() if path.suffix == ".parquet"] == ["shard-00000.parquet"]
    assert dataset.read_rounds(tmp_path, [1]) == old  # whatever else lies there is no shard

    dataset.write_shard(folder, 1, new)
    assert dataset.read_rounds(tmp_path, [1]) == old + new


def shard_bytes(folder):
    rollouts = [make_rollout(number, switch=number) for number in range(5)]
    dataset.write_shard(folder, 0, rollouts)
    return rollouts, dataset.shard_path(folder, 0).read_bytes()


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
    elif how == "column of another type":
        texts = pyarrow.array([str(reward) for reward in table["reward"].to_pylist()])
        pyarrow.parquet.write_table(table.set_column(table.column_names.index("reward"), "reward", texts), path)
    return path


DAMAGES = ("empty", "no parquet", "truncated", "page", "footer", "column missing", "column of another type")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_shard_is_named_with_what_to_do(tmp_path, how):
    path = damaged(how, tmp_path)
    with pytest.raises(UserError) as caught:
        dataset.read_rounds(tmp_path, [1])
    assert str(path) in str(caught.value)
    assert "collect again" in str(caught.value) and "--skip-damaged" in str(caught.value)


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
    """Nor left out: the error is raised as it is."""

    def fail(*arguments, **options):
        raise error

    shard_bytes(tmp_path / "round_1")
    monkeypatch.setattr(*where, fail)
    with pytest.raises(type(error)) as caught:
        dataset.read_rounds(tmp_path, [1], skip_damaged=True)
    assert caught.value is error


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_shard_is_left_out_only_when_told_to_and_aloud(tmp_path, capsys, how):
    path = damaged(how, tmp_path)
    others = [make_rollout(7), make_rollout(8)]
    dataset.write_shard(tmp_path / "round_1", 1, others)
    assert dataset.read_rounds(tmp_path, [1], skip_damaged=True) == others
    assert str(path) in capsys.readouterr().out
    dataset.shard_path(tmp_path / "round_1", 1).unlink()
    with pytest.raises(UserError, match="no rollouts"):
        dataset.read_rounds(tmp_path, [1], skip_damaged=True)


def test_no_flipped_byte_is_read_as_other_rollouts(tmp_path):
    """Wherever it lies: the shard is refused, or the byte was of no importance and the records are the same."""
    rollouts, whole = shard_bytes(tmp_path)
    path, refused = tmp_path / "shard-00001.parquet", 0
    for place, mask in itertools.product(range(0, len(whole), 9), (0x01, 0x80)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
        try:
            assert dataset.read_shard(path) == rollouts, f"byte {place} ^ {mask:#x}"
        except UserError:
            refused += 1
    assert refused > 100


def test_a_round_without_rollouts_is_refused(tmp_path):
    """Round 2 was not collected: to fit "round 2" to round 1 alone would be a silent mistake."""
    with pytest.raises(UserError, match="no rollouts of round 1"):
        dataset.read_rounds(tmp_path, [1])
    dataset.write_shard(tmp_path / "round_1", 0, [make_rollout()])
    (tmp_path / "round_2").mkdir()
    with pytest.raises(UserError, match="no rollouts of round 2.*qsharp collect"):
        dataset.read_rounds(tmp_path, [1, 2])


# --- Labels and masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switch", "labelled"),
    [
        (0, [-1, 0, 1, 2, 3, 4]),  # round 1: pi_ref chose everything, so the prompt's last token has its law too
        (1, [0, 1, 2, 3, 4]),  # one guided token: Z(prompt, it) is what pi_ref made of it
        (3, [2, 3, 4]),  # tokens 0 and 1 were followed by a guided token, not by pi_ref
        (4, [3, 4]),
    ],
)
def test_labels_begin_at_the_last_roll_in_token(switch, labelled):
    """DESIGN, section 2: "only tokens at positions >= the last roll-in token carry labels"."""
    rollout = make_rollout(4, switch=switch)
    batch = dataset.make_batch([dataset.from_rollout(rollout)], rows=1, width=8)
    places = [len(rollout.prompt_tokens) + at for at in labelled]
    assert np.flatnonzero(batch.label_mask[0]).tolist() == places
    assert (batch.reward_to_go[0, places] == np.float32(rollout.reward)).all()


def test_a_batch_by_hand():
    """Two rows of unlike length and a row that is left over. Prompt p, response r, padding 0."""
    examples = [Example([11, 12], [13, 14, 2], reward=0.5, first_label=1), Example([15], [2], reward=-2.0)]
    batch = dataset.make_batch(examples, rows=3, width=6)
    #                     p   p   r   r   r
    assert batch.tokens.tolist() == [[11, 12, 13, 14, 2, 0], [15, 2, 0, 0, 0, 0], [0] * 6]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0] * 6]
    assert batch.positions[0, :5].tolist() == [0, 1, 2, 3, 4] and batch.positions[1, :2].tolist() == [0, 1]
    assert batch.response_mask.astype(int).tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6]
    assert batch.label_mask.astype(int).tolist() == [[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6]
    # The rewards are 0, 0, 0.5 and -2; the sums from each response token on:
    assert batch.reward_to_go[0, 2:5].tolist() == [0.5, 0.5, 0.5] and batch.reward_to_go[1, 1] == -2
    assert not batch.reward_to_go[~batch.response_mask].any()
    assert [array.dtype for array in vars(batch).values()] == [np.int32] * 3 + [bool] * 2 + [np.float32]


# --- Batches --------------------------------------------------------------------------------------------------------

cases = st.fixed_dictionaries(
    dict(
        lengths=st.lists(st.tuples(st.integers(1, 15), st.integers(1, 15)), min_size=1, max_size=30),
        rows=st.integers(1, 5),
        bucket=st.integers(1, 9),
        seed=st.integers(0, 2**32 - 1),
        pack_length=st.sampled_from([0, 30, 47]),  # no example is longer than 30
    )
)


def examples_of(lengths):
    """Examples that differ, by a token of their own."""
    return [Example([100 + i] * prompt, [5] * response) for i, (prompt, response) in enumerate(lengths)]


def rows_of(batch):
    """The batch's sequences, without padding, as (prompt, response)."""
    found = []
    for tokens, segments, response in zip(batch.tokens, batch.segments, batch.response_mask, strict=True):
        for segment in range(1, segments.max() + 1):
            mine = segments == segment
            found.append((tokens[mine & ~response].tolist(), tokens[mine & response].tolist()))
    return found


@settings(max_examples=50, deadline=None)
@given(cases)
def test_every_example_comes_once_an_epoch(case):
    lengths = case.pop("lengths")
    batches = Batches(examples_of(lengths), **case)
    expected = sorted((list(example.prompt), list(example.response)) for example in examples_of(lengths))
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        assert sorted(row for step in steps for row in rows_of(batches[step])) == expected


@settings(max_examples=50, deadline=None)
@given(cases)
def test_batches_have_few_shapes_that_fit(case):
    """All have the same rows; widths are multiples of the bucket, and no row has a whole bucket of padding."""
    lengths = case.pop("lengths")
    batches = Batches(examples_of(lengths), **case | {"pack_length": 0})
    buckets = {-(-(prompt + response) // case["bucket"]) for prompt, response in lengths}
    full = 0
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        rows, width = batch.tokens.shape
        assert rows == case["rows"] and width // case["bucket"] in buckets and width % case["bucket"] == 0
        found = rows_of(batch)
        assert all(width - case["bucket"] < len(prompt) + len(response) <= width for prompt, response in found)
        full += len(found) == rows
    assert batches.steps_per_epoch - full <= len(buckets)  # at most the last of each width is not full


@settings(max_examples=30, deadline=None)
@given(cases, st.randoms(use_true_random=False))
def test_a_batch_depends_on_seed_and_step_alone(case, random):
    """Another object, asked in another order and more than once, gives the same: a run resumes from its step."""
    lengths = case.pop("lengths")
    straight, jumping = (Batches(examples_of(lengths), **case) for _ in range(2))
    expected = [straight[step] for step in range(2 * straight.steps_per_epoch)]
    for step in random.choices(range(len(expected)), k=6):
        assert_trees_equal(jumping[step], expected[step])


def test_epochs_and_seeds_differ():
    """In the order of the examples and in who shares a batch with whom."""
    examples = examples_of([(3, 3)] * 20 + [(9, 9)] * 20)

    def order(seed, epoch):
        batches = Batches(examples, rows=4, bucket=6, seed=seed)
        first = epoch * batches.steps_per_epoch
        return [rows_of(batches[first + place]) for place in range(batches.steps_per_epoch)]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        assert one != other
        together = [{frozenset(row[0][0] for row in batch) for batch in batches} for batches in (one, other)]
        assert together[0] != together[1]
    widths = [len(batch[0][0]) for batch in orders[0]]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)  # lengths are mixed over the epoch


# --- Packing --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 80))
def test_packed_groups_hold_everything_once_and_are_full(lengths, capacity):
    """Within the capacity; and no two groups would fit into one, which a packing that wastes half of it would have."""
    groups = dataset.pack(lengths, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    sums = sorted(sum(lengths[index] for index in group) for group in groups)
    assert all(total <= capacity for total in sums)
    assert len(sums) < 2 or sums[0] + sums[1] > capacity


def test_packing_by_hand():
    """Best fit, not first fit: the 1 goes to where 1 is left, not to the first group, where 3 are."""
    assert dataset.pack([1, 5, 7, 4], capacity=10) == [[2], [1, 3, 0]]


def test_a_packed_batch_by_hand():
    """Two examples share a row: segments 1 and 2, positions from 0 in each, labels and rewards each its own."""
    group = [Example([11, 12], [13, 14, 2], reward=0.5, first_label=1), Example([15], [16, 2], reward=-2.0)]
    batch = dataset.make_packed_batch([group], rows=2, width=10)
    assert batch.tokens.tolist() == [[11, 12, 13, 14, 2, 15, 16, 2, 0, 0], [0] * 10]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [0] * 10]
    assert batch.positions[0, :8].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.response_mask.astype(int).tolist() == [[0, 0, 1, 1, 1, 0, 1, 1, 0, 0], [0] * 10]
    assert batch.label_mask.astype(int).tolist() == [[0, 0, 0, 1, 1, 0, 1, 1, 0, 0], [0] * 10]
    assert batch.reward_to_go[0].tolist() == [0, 0, 0.5, 0.5, 0.5, 0, -2, -2, 0, 0]


def test_padding_is_under_a_twentieth_of_packed_batches():
    """Of lengths as reasoning rollouts have them, log-normal, in rows of twice the longest; buckets leave more."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.0, 0.6, 1500), 20, 1024).astype(int)
    examples = [Example([1] * 10, [2] * (length - 10)) for length in lengths]

    def padding(**changes):
        batches = Batches(examples, rows=4, bucket=128, seed=0, **changes)
        masks = [batches[step].segments > 0 for step in range(batches.steps_per_epoch)]
        return 1 - sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)

    assert padding(pack_length=2048) < 0.05 < 0.2 < padding()


def test_packed_epochs_have_as_many_steps_and_other_companies():
    """All batches of one shape; examples of one length change places from epoch to epoch."""
    examples = examples_of([(3, 3)] * 20 + [(9, 9)] * 20 + [(2, 5)] * 7)
    batches = Batches(examples, rows=4, bucket=6, seed=0, pack_length=40)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        assert {batches[step].tokens.shape for step in steps} == {(4, 40)}
        epochs.append({frozenset(row[0][0] for row in rows_of(batches[step])) for step in steps})
    assert epochs[0] != epochs[1]


def test_an_example_longer_than_a_packed_row_is_refused():
    with pytest.raises(UserError, match="example of 18 tokens.*fit.pack_length, which is 17"):
        Batches(examples_of([(3, 3), (9, 9)]), rows=2, bucket=6, seed=0, pack_length=17)
