"""Collection on a star graph with a small model: every record can be told from the seeds, and a kill loses nothing."""

import math
from dataclasses import replace
from pathlib import Path

import helpers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsharp_jax import rollouts
from qsharp_jax.data.records import Rollout, Rollouts, read_rounds
from qsharp_jax.decoding import generate
from qsharp_jax.run import models
from qsharp_jax.run.problems import judge, train_problems
from qsharp_jax.system import files
from qsharp_jax.tasks import star_graph

ETA, SEED, SAMPLES, SHARD_ROWS, BUDGET = 0.3, 13, 4, 12, 7


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Reference, guide and session; at temperature 2 responses end early, late and never."""
    ref, folder = helpers.reference(), tmp_path_factory.mktemp("run")
    session = helpers.session(folder, "generate.temperature=2.0", f"generate.max_new_tokens={BUDGET}")
    return ref, helpers.random_guide(ref.config, scale=2.0), session


def collect(run, folder, number):
    ref, guide, session = run
    rollouts.collect(
        ref, guide if number > 1 else None, judge(session), models.tokenizer(session), train_problems(session, 1), folder,
        replace(models.sampling(session), eta=ETA), number=number, samples=SAMPLES, shard_rows=SHARD_ROWS, batch_size=8,
        seed=SEED,
    )  # fmt: skip


@pytest.fixture(scope="module")
def collected(run, tmp_path_factory):
    """Rounds 1 and 2, each of 48 rollouts in 4 shards."""
    folder = tmp_path_factory.mktemp("collected")
    for number in (1, 2):
        collect(run, folder / f"round_{number}", number)
    return folder


def test_in_one_loop_rollouts_are_those_of_two(run, collected, tmp_path, monkeypatch):
    """Roll-ins and roll-outs as rows of one batch, as on an accelerator."""
    monkeypatch.setattr(rollouts, "in_one_loop", lambda: True)
    collect(run, tmp_path / "round_2", 2)
    assert read(tmp_path, 2) == read(collected, 2)


def read(folder, number) -> list[Rollout]:
    return [*read_rounds(folder, [number])]


def problem_of(run, row):
    return train_problems(run[2], 1)[row // SAMPLES]


# --- What is recorded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_every_problem_gets_its_samples_and_every_reward_can_be_judged_again(run, collected, number):
    """From the record alone: the text is the tokens', and the reward that of the path from start to goal."""
    session, records = run[2], read(collected, number)
    assert len(records) == SAMPLES * len(train_problems(session, 1))
    for row, record in enumerate(records):
        problem = problem_of(run, row)
        assert record.prompt_id == problem.problem_id and record.round == number
        assert record.prompt_tokens == models.tokenizer(session).encode_prompt(problem.prompt)
        assert record.text == models.tokenizer(session).decode(record.response_tokens)
        edges, query = problem.prompt.removesuffix("=").split("/")
        start, goal = query.split(",")
        path = record.text.split(",")
        right = path[0] == start and path[-1] == goal and len(path) == 3
        right = right and all(f"{a},{b}" in edges.split("|") for a, b in zip(path, path[1:]))
        assert record.reward == float(right)
    assert 0 < sum(record.reward for record in records) < len(records)  # else nothing was tested


@pytest.mark.parametrize("number", [1, 2])
def test_a_response_ends_at_its_stop_token_or_at_the_budget_of_the_whole(run, collected, number):
    """FACTS section 3, 7: the roll-out gets what the roll-in left of the budget, not a fresh one."""
    stop = models.tokenizer(run[2]).stop_ids[0]
    records = read(collected, number)
    for record in records:
        response = record.response_tokens
        assert 1 <= len(response) <= BUDGET
        assert stop not in response[:-1]
        assert record.finished == (response[-1] == stop)
        assert record.finished or len(response) == BUDGET
        # The models' context is just as long: a roll-in makes the roll-out's prompt longer, not the whole.
        assert len(record.prompt_tokens) + BUDGET == run[0].config.max_positions
    assert 0 < sum(record.finished for record in records) < len(records)
    assert len({len(record.response_tokens) for record in records}) >= 4


def test_round_1_is_pi_ref_alone(run, collected):
    """No switch, no eta, a label at every token; and the tokens are those that pi_ref samples from the recorded seed."""
    ref, _, session = run
    records = read(collected, 1)
    assert all(record.switch == 0 and math.isinf(record.eta) and record.first_label == -1 for record in records)
    assert len({record.seed for record in records}) == len(records)
    again = generate(
        ref, None, [record.prompt_tokens for record in records[:8]], models.sampling(session),
        rng=np.asarray([record.seed for record in records[:8]]),
    )  # fmt: skip
    assert [again.response(row) for row in range(8)] == [record.response_tokens for record in records[:8]]


def roll_in_seeds(rows):
    return np.asarray([np.random.SeedSequence((SEED, 2, row)).generate_state(3)[0] for row in rows])


def test_later_rounds_roll_in_guided_and_finish_with_pi_ref(run, collected):
    """The first `switch` tokens are the guided policy's from the roll-in's seed; what follows is pi_ref's from the
    recorded seed, as a continuation of prompt and roll-in; 1 <= switch <= length of the roll-in - 1."""
    ref, guide, session = run
    sampling, records = replace(models.sampling(session), eta=ETA), read(collected, 2)
    lengths, differing, alone = [], 0, 0
    for begin in range(0, len(records), 8):
        part = records[begin : begin + 8]
        prompts = [record.prompt_tokens for record in part]
        guided = generate(ref, guide, prompts, sampling, rng=roll_in_seeds(range(begin, begin + len(part))))
        prefixes = [record.response_tokens[: record.switch] for record in part]
        rests = generate(
            ref, None, [[*prompt, *prefix] for prompt, prefix in zip(prompts, prefixes)],
            replace(sampling, budget=[BUDGET - record.switch for record in part]),
            rng=np.asarray([record.seed for record in part]),
        )  # fmt: skip
        for row, record in enumerate(part):
            roll_in = guided.response(row)
            lengths.append(len(roll_in))
            assert prefixes[row] == roll_in[: record.switch]
            assert record.eta == np.float32(ETA)
            if len(roll_in) == 1:  # nothing is left for pi_ref to choose
                assert record.switch == 1 and record.response_tokens == roll_in and record.finished
                alone += 1
            else:
                assert 1 <= record.switch <= len(roll_in) - 1
                assert record.response_tokens == prefixes[row] + rests.response(row)
                differing += record.response_tokens != roll_in
    assert alone and differing > 10 and len(set(lengths)) >= 4  # else nothing was tested
    seeds = [record.seed for record in records]
    assert len({*seeds, *(record.seed for record in read(collected, 1)), *roll_in_seeds(range(48)).tolist()}) == 3 * 48


def shard_bytes(folder: Path, number: int):
    return {path.name: path.read_bytes() for path in sorted((folder / f"round_{number}").iterdir())}


@pytest.mark.parametrize("number", [1, 2])
def test_a_collection_with_holes_is_filled_up(run, collected, tmp_path, number):
    """Whichever shards are missing: the records are those of a collection that never stopped, and what is there stays."""
    whole = shard_bytes(collected, number)
    assert list(whole) == [f"shard-0000{index}.parquet" for index in range(4)]
    for case, missing in enumerate([{0}, {3}, {1, 2}]):
        folder = tmp_path / str(case) / f"round_{number}"
        folder.mkdir(parents=True)
        for index, (name, content) in enumerate(whole.items()):
            if index not in missing:
                (folder / name).write_bytes(content)
                (folder / name).chmod(0o444)
        kept = {name: (folder / name).stat().st_mtime_ns for name in whole if (folder / name).exists()}
        collect(run, folder, number)
        assert read(folder.parent, number) == read(collected, number)
        assert all((folder / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_a_killed_collection_goes_on(run, collected, tmp_path, monkeypatch):
    """Killed while it judges, with some shards whole and others begun; once more while it writes the next."""
    judged = 0

    def reward(problem, response):
        nonlocal judged
        judged += 1
        if judged == 3 * SHARD_ROWS:
            raise KeyboardInterrupt
        return right_reward(problem, response)

    right_reward = star_graph.reward
    monkeypatch.setattr(star_graph, "reward", reward)
    with pytest.raises(KeyboardInterrupt):
        collect(run, tmp_path / "round_2", 2)
    whole = len(read(tmp_path, 2))
    assert whole in (SHARD_ROWS, 2 * SHARD_ROWS)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            collect(run, tmp_path / "round_2", 2)
    assert len(read(tmp_path, 2)) == whole
    judged = -1000
    collect(run, tmp_path / "round_2", 2)
    assert judged == -1000 + 48 - whole  # what is there is not made again
    assert read(tmp_path, 2) == read(collected, 2)


@pytest.mark.parametrize("length", [2, 3, 8, 57])
def test_switches_are_uniform(length):
    """Over 1 .. length - 1: the chi-square of 40,000 draws is below its 99.99% quantile (Wilson and Hilferty's)."""
    count, places = 40_000, length - 1
    draws = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint32)
    switches = rollouts.draw_switches(np.full(count, length, np.int32), draws)
    observed = np.bincount(switches, minlength=length + 1)
    assert observed[0] == 0 and observed[length:].sum() == 0
    chi_square = np.sum((observed[1:length] - count / places) ** 2) / (count / places)
    freedom = places - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9
    assert chi_square < quantile
    np.testing.assert_array_equal(switches, rollouts.draw_switches(np.full(count, length, np.int32), draws))


@given(st.lists(st.tuples(st.integers(1, 100_000), st.integers(0, 2**32 - 1)), min_size=1, max_size=20))
def test_a_switch_leaves_both_sides_a_token(pairs):
    """The extremes of the random bits and long responses included; a response of one token is kept whole."""
    lengths, draws = (np.asarray(column) for column in zip(*pairs))
    switches = rollouts.draw_switches(lengths.astype(np.int32), draws.astype(np.uint32))
    assert ((1 <= switches) & (switches <= np.maximum(lengths - 1, 1))).all()
    exact = [1 + draw * max(length - 1, 1) // 2**32 for length, draw in pairs]  # without overflow
    assert switches.tolist() == exact


def test_samples_come_in_the_callers_order_whatever_the_batch_size(run):
    """Prompts of mixed lengths, each with its own seed, eta and budget: batches of 8 and of 3 give the same rows."""
    ref, guide, session = run
    rng = np.random.default_rng(3)
    prompts = [[1, *rng.integers(3, 13, length)] for length in (9, 2, 15, 5, 11, 1, 12, 9, 3, 15, 6)]
    rows = len(prompts)
    seeds = np.arange(1000, 1000 + rows)
    eta = np.where(np.arange(rows) % 3 == 0, np.inf, 0.2).astype(np.float32)
    budget = np.asarray([7, 3, 7, 1, 7, 5, 7, 0, 7, 2, 7])
    eights, threes = (
        rollouts.sample(
            ref, guide, prompts, replace(models.sampling(session), eta=eta, budget=budget), seeds=seeds, batch_size=size
        )
        for size in (8, 3)
    )
    for name, array in eights.arrays.items():
        equal = np.testing.assert_array_equal if array.dtype.kind != "f" else np.testing.assert_allclose
        equal(getattr(threes, name), array, **({} if array.dtype.kind != "f" else {"atol": 2e-5}), err_msg=name)
    assert (eights.lengths <= budget).all() and eights.lengths[7] == 0
    assert not eights.kl[eta == np.inf].any() and eights.kl[eta < 1].any(axis=1).sum() >= 5


def test_statistics_by_hand():
    """One problem has a response of 5 tokens with labels from the third on, and one of 3 with labels on all; of another
    two that are alike: their rewards do not vary."""
    common = dict(round=2, prompt_tokens=[1], eta=0.1, seed=0, text="")
    figures = rollouts.statistics(
        Rollouts.of(
            [
                Rollout(prompt_id="p", response_tokens=[3] * 5, switch=3, reward=1.0, finished=False, **common),
                Rollout(prompt_id="p", response_tokens=[3] * 3, switch=1, reward=0.0, finished=True, **common),
                *[Rollout(prompt_id="q", response_tokens=[3] * 6, switch=1, reward=0.5, finished=True, **common)] * 2,
            ]
        )
    )
    labelled = (3 + 3 + 6 + 6) / (5 + 3 + 6 + 6)
    assert figures == dict(
        rollouts=4, reward=0.5, response_tokens=5.0, finished=0.75, labelled=labelled, varied=1 / 2
    )  # fmt: skip
