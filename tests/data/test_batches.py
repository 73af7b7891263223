"""Fixed-shape batches: labels and masks by hand, every example once per epoch, a batch from the seed and the step."""

import itertools

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal
from hypothesis import given, settings
from hypothesis import strategies as st

from qsharp_jax.data.batches import Batches, Example, RolloutExamples, from_rollout, make_batch, make_packed_batch, pack
from qsharp_jax.data.records import Rollout, Rollouts
from qsharp_jax.system.errors import UserError


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
    rollout = Rollout("p", 1, [1, 2, 3], [4] * 5, switch, 1.0, True, float("inf"), 0, "")
    batch = make_batch([from_rollout(rollout)], rows=1, width=8)
    places = [len(rollout.prompt_tokens) + at for at in labelled]
    assert np.flatnonzero(batch.label_mask[0]).tolist() == places
    assert (batch.reward_to_go[0, places] == np.float32(rollout.reward)).all()


def test_a_batch_by_hand():
    """Two rows of unlike length and a row that is left over. Prompt p, response r, padding 0."""
    examples = [Example([11, 12], [13, 14, 2], reward=0.5, first_label=1), Example([15], [2], reward=-2.0)]
    batch = make_batch(examples, rows=3, width=6)
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


@settings(max_examples=50)
@given(cases)
def test_every_example_comes_once_an_epoch(case):
    lengths = case.pop("lengths")
    batches = Batches(examples_of(lengths), **case)
    expected = sorted((list(example.prompt), list(example.response)) for example in examples_of(lengths))
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        assert sorted(row for step in steps for row in rows_of(batches[step])) == expected


@settings(max_examples=50)
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


@settings(max_examples=30)
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


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 80))
def test_packed_groups_hold_everything_once_and_are_full(lengths, capacity):
    """Within the capacity; and no two groups would fit into one, which a packing that wastes half of it would have."""
    groups = pack(lengths, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    sums = sorted(sum(lengths[index] for index in group) for group in groups)
    assert all(total <= capacity for total in sums)
    assert len(sums) < 2 or sums[0] + sums[1] > capacity


def test_packing_by_hand():
    """Best fit, not first fit: the 1 goes to where 1 is left, not to the first group, where 3 are."""
    assert pack([1, 5, 7, 4], capacity=10) == [[2], [1, 3, 0]]


def test_a_packed_batch_by_hand():
    """Two examples share a row: segments 1 and 2, positions from 0 in each, labels and rewards each its own."""
    group = [Example([11, 12], [13, 14, 2], reward=0.5, first_label=1), Example([15], [16, 2], reward=-2.0)]
    batch = make_packed_batch([group], rows=2, width=10)
    assert batch.tokens.tolist() == [[11, 12, 13, 14, 2, 15, 16, 2, 0, 0], [0] * 10]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [0] * 10]
    assert batch.positions[0, :8].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.response_mask.astype(int).tolist() == [[0, 0, 1, 1, 1, 0, 1, 1, 0, 0], [0] * 10]
    assert batch.label_mask.astype(int).tolist() == [[0, 0, 0, 1, 1, 0, 1, 1, 0, 0], [0] * 10]
    assert batch.reward_to_go[0].tolist() == [0, 0, 0.5, 0.5, 0.5, 0, -2, -2, 0, 0]


def test_rows_of_other_hosts_have_their_segments_alone():
    """Each host's rows are those of the whole batch; the rest costs it no reading of tokens."""
    rng = np.random.default_rng(0)
    rollouts = Rollouts.of(
        Rollout("p", 2, [5] * 3, rng.integers(3, 9, n).tolist(), 2, 0.5, True, 0.1, 0, "") for n in (4, 6, 2, 5, 7)
    )
    groups = [[example] for example in RolloutExamples(rollouts)]
    whole, local = make_packed_batch(groups, 6, 10), np.asarray([False, True, True, False, False, True])
    part = make_packed_batch(groups, 6, 10, local)
    assert_trees_equal(part, make_packed_batch([[from_rollout(r)] for r in rollouts], 6, 10, local))
    assert_trees_equal(*(jax.tree.map(lambda array: array[local], batch) for batch in (part, whole)))
    assert (part.segments == whole.segments).all() and not part.tokens[~local].any()


def test_padding_is_under_a_twentieth_of_packed_batches():
    """Lengths as reasoning rollouts have them, log-normal, in rows of twice the longest; buckets leave more."""
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
