"""Samples of a method while they are under way: in shards, from which one that was stopped goes on, on two hosts too."""

import functools
import json
import math
import sys

import helpers
import pytest
from processes import free_port, start

from qsharp_jax.decoding import ContinuousBatch
from qsharp_jax.evaluation import samples, score
from qsharp_jax.run import config as configs
from qsharp_jax.run import models
from qsharp_jax.run.problems import judge
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system import multihost
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.multihost import Place
from qsharp_jax.tasks.judging import Judgement

ETAS = (0.5, 0.1)
assert_same_samples = functools.partial(
    helpers.assert_same_rows, numbers=("kl", "kl_truncated", "values"), atol=2e-4
)


def make_models(session):
    """A reference that has learned nothing, and a guide that steers it."""
    ref = helpers.random_model(models.tokenizer(session).vocab_size)
    return ref, helpers.random_guide(ref.config, seed=1, scale=3.0)


def sample(session, ref, guide, etas=ETAS):
    return samples.sample_method(
        session, "qsharp", ref, guide, models.sampling(session), number=1, etas=etas, samples=2
    )


def stop_judging(patch, session, after: int, error: BaseException):
    """The judge raises when it has judged so many responses."""
    submit, calls = judge(session).submit, []

    def stopping(problem, response, **options):
        calls.append(response)
        if len(calls) > after:
            raise error
        return submit(problem, response, **options)

    patch.setattr(judge(session), "submit", stopping)


# --- In the other processes -----------------------------------------------------------------------------------------


def main(port: int, index: int, folder: str, after: int) -> None:
    """One of two processes that sample a method; process 1 refuses to go on after some responses."""
    with multihost.joined(Place("localhost", port, 2, index), 200, lambda error: (2, str(error))):
        workdir = Workdir.open(folder) if index == 0 else Workdir.attach(folder)
        mesh = ("mesh.hosts=2", "mesh.fit.data=2")
        configs.override_stored(workdir.config, [f"--config.{change}" for change in mesh])
        session = Session(workdir)
        with pytest.MonkeyPatch.context() as patch:
            if index == 1:
                stop_judging(patch, session, after, UserError("the judge has had enough"))
            print(len(sample(session, *make_models(session))), flush=True)
        workdir.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))


# --- Here -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stoppable(tmp_path):
    """A session of ten problems with four responses each, in shards of two problems: eight rows are decoded at once."""
    session = helpers.session(tmp_path / "stopped")
    return session, *make_models(session)


def shards_of(session, name):
    return sorted((session.workdir.samples / name).glob("*"))


def forbid_sampling(patch):
    def forbidden(*arguments, **options):
        raise AssertionError("samples again")

    patch.setattr(samples, "ContinuousBatch", forbidden)


def test_a_method_that_is_stopped_goes_on_from_its_shards(stoppable, tmp_path, monkeypatch):
    """Twice: what is whole is left alone, only what is missing is sampled, and the end is that of one that never was."""
    session, ref, guide = stoppable
    straight = helpers.session(tmp_path / "straight")
    expected = sample(straight, ref, guide)
    assert [path.name for path in straight.workdir.samples.iterdir()] == ["qsharp_round_1.jsonl"]
    for after, error in ((22, KeyboardInterrupt), (14, ValueError)):
        before = {path: path.read_bytes() for path in shards_of(session, "qsharp_round_1")}
        with monkeypatch.context() as patch:
            stop_judging(patch, session, after, error("stop"))
            with pytest.raises(error):
                sample(session, ref, guide)
        assert not (session.workdir.samples / "qsharp_round_1.jsonl").exists()
        whole = {path: path.read_bytes() for path in shards_of(session, "qsharp_round_1")}
        assert len(before) < len(whole) < 5 and before.items() <= whole.items()
        for content in whole.values():
            assert_same_samples(
                rows := [json.loads(line) for line in content.splitlines()],
                [row for row in expected if row["problem_id"] in {row["problem_id"] for row in rows}],
            )
    places, batch = [], ContinuousBatch

    def noted(*arguments, order, **options):
        places.extend(order := list(order))
        return batch(*arguments, order=order, **options)

    monkeypatch.setattr(samples, "ContinuousBatch", noted)
    rows = sample(session, ref, guide)
    assert len(places) == 8 * (5 - len(whole))
    assert_same_samples(rows, expected)
    assert samples.read_samples(samples.samples_path(session.workdir, "qsharp", 1)) == rows
    assert all(row["seconds"] > 0 for row in rows)
    assert [path.name for path in session.workdir.samples.iterdir()] == ["qsharp_round_1.jsonl"]
    forbid_sampling(monkeypatch)
    assert sample(session, ref, guide) == rows


def test_a_damaged_shard_is_named_and_those_of_other_etas_are_not_taken(stoppable, monkeypatch):
    session, ref, guide = stoppable
    with monkeypatch.context() as patch:
        stop_judging(patch, session, 30, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            sample(session, ref, guide)
    path = shards_of(session, "qsharp_round_1")[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=f"{path}, line 8, is damaged; delete the file"):
        sample(session, ref, guide)
    path.write_bytes(whole)
    rows = sample(session, ref, guide, etas=(0.3, 0.1))
    assert [row["eta"] for row in rows] == [0.3, 0.3, 0.1, 0.1] * 10


def test_shards_that_a_kill_left_beside_the_whole_file_are_removed(stoppable, monkeypatch):
    session, ref, guide = stoppable
    rows = sample(session, ref, guide)
    folder = session.workdir.samples / "qsharp_round_1"
    folder.mkdir()
    samples.write_samples(folder / "shard-00000.jsonl", rows[:8])
    (folder / ".shard-00001.jsonl.7.tmp").write_text("{")
    forbid_sampling(monkeypatch)
    assert sample(session, ref, guide) == rows and not folder.exists()


def test_values_of_samples_are_kept_in_shards_too(stoppable, tmp_path, monkeypatch):
    session, ref, guide = stoppable
    rows = samples.sample_method(session, "pi_ref", ref, None, models.sampling(session), number=0, samples=3)
    straight = helpers.session(tmp_path / "straight")
    expected = samples.score_samples(straight, guide, rows, number=2)
    scorer, calls = score.score, []

    def stopping(*arguments, **options):
        calls.append(arguments)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return scorer(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(score, "score", stopping)
        with pytest.raises(KeyboardInterrupt):
            samples.score_samples(session, guide, rows, number=2)
    assert len(shards_of(session, "pi_ref_values_round_2")) == 2
    scored = samples.score_samples(session, guide, rows, number=2)
    assert helpers.without_seconds(scored) == helpers.without_seconds(expected)
    assert [row["problem_id"] for row in scored] == [row["problem_id"] for row in rows]
    assert all(scored["seconds"] > row["seconds"] for scored, row in zip(scored, rows, strict=True))
    assert not shards_of(session, "pi_ref_values_round_2")
    others = [row | {"tokens": [*row["tokens"], 1]} for row in rows]
    again = samples.score_samples(session, guide, others, number=2)
    assert [len(row["values"]) for row in again] == [len(row["tokens"]) for row in others], "of other responses"


def test_a_reward_that_is_no_number_is_refused(stoppable, monkeypatch):
    session, ref, guide = stoppable
    monkeypatch.setattr(judge(session), "submit", lambda *_, **__: lambda: Judgement(math.nan, "1"))
    with pytest.raises(UserError, match="was not written: a sample's reward or KL is not a finite number"):
        sample(session, ref, guide)
    assert not shards_of(session, "qsharp_round_1")


@pytest.mark.slow
def test_two_hosts_share_the_shards_and_go_on_from_those_of_both(tmp_path):
    straight = helpers.session(tmp_path / "straight")
    expected = sample(straight, *make_models(straight))
    two = helpers.session(tmp_path / "two")
    two.workdir.close()
    for after, code in ((15, 2), (100, 0)):  # of its 16 responses: one of its two shards is whole
        port = free_port()
        arguments = (str(two.workdir.path), str(after))
        both = [start(__file__, str(port), str(index), *arguments, devices=1) for index in range(2)]
        outputs = [process.communicate(timeout=240) for process in both]
        assert [process.returncode for process in both] == [code, code], outputs
        if code:
            assert all("the judge has had enough" in errors for _, errors in outputs), outputs
            assert shards_of(two, "qsharp_round_1")
        else:
            assert all(output.splitlines()[-1] == "40" for output, _ in outputs), outputs
    assert_same_samples(samples.read_samples(samples.samples_path(two.workdir, "qsharp", 1)), expected)
    assert not shards_of(two, "qsharp_round_1")
