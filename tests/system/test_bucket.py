"""Workdirs in a bucket: a whole job through the clients' own code, on a server in this process that keeps it in memory."""

import json
import os
import subprocess
import sys
import threading
import time

import fake_gcs
import helpers
import jax
import numpy as np
import pytest
from checkpoints import make_state, save
from commands import CONFIG, SMALL, refused
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from repository import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsharp_jax import cli
from qsharp_jax.data.records import Rollout, read_rounds, shard_path, write_shard
from qsharp_jax.notebook import inputs, training
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system import files, lock
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import own
from qsharp_jax.train import checkpoint
from qsharp_jax.train.checkpoint import Checkpoints

URL = "gs://bucket/runs/one"
QUICK = [
    *SMALL, "--config.rounds=1", "--config.pretrain.steps=20", "--config.pretrain.log_every=5",
    "--config.evaluate.etas=0.1", "--config.fit.future_offsets=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The bucket "bucket", which the clients of this process find in place of Google's; and an empty folder to be in,
    where a URL that is taken for a path would leave something."""
    with fake_gcs.serve("bucket") as (store, url), pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")  # for TensorStore, which else asks for Google's machines
        pytest.importorskip("gcsfs")
        folder = tmp_path_factory.mktemp("empty")
        patch.chdir(folder)
        files.make_path(URL)  # as it sets gcsfs up, so that the next line adds to it
        import fsspec

        patch.setitem(fsspec.config.conf, "gcs", fsspec.config.conf["gcs"] | {"token": "anon"})
        yield store
        assert not list(folder.iterdir()), "a URL was taken for a folder of this machine"


@pytest.fixture
def bucket(server):
    """Empty."""
    server.objects.clear()
    server.generations.clear()
    server.writes.clear()
    server.moves.clear()
    server.refusals.clear()
    return server


@pytest.fixture
def quick_locks(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    monkeypatch.setattr(lock, "STALE", 0.6)


def opened(**settings) -> Workdir:
    return Workdir.open(URL, ConfigDict({"seed": 0, **settings}))


def job(*arguments: str) -> int:
    return cli.main(["run", "--config", CONFIG, "--workdir", URL, *QUICK, *arguments])


def under(bucket, folder: str) -> list[str]:
    start = f"runs/one/{folder}"
    return [name.removeprefix(start) for name in sorted(bucket.objects) if name.startswith(start)]


@pytest.mark.slow
def test_a_whole_job_in_a_bucket(bucket, capsys, tmp_path):
    """Pre-train, collect, fit, evaluate, report; then everything again, which computes nothing, and single commands."""
    assert job("--profile") == 0
    assert "| pi_ref" in capsys.readouterr().out
    names = {name.partition("/")[0] for name in under(bucket, "")}
    assert names - {"programs"} == {  # of which there are some where one took a second to compile
        "config.json", "metrics.jsonl", "results.json", "report.md", "frontier.png", "rounds.png", "calibration.png",
        "lengths.png", "examples.html", "ref", "guide", "rollouts", "samples", "tensorboard", "lock", "profile",
    }  # fmt: skip
    assert not bucket.moves, "a file is renamed when it is whole, an object is whole"
    assert not any("tmp" in name for name in bucket.objects)
    lines = [json.loads(line) for line in bucket.objects["runs/one/metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines if line["phase"] == "pre-train pi_ref"] == [5, 10, 15, 20]
    assert any(name.endswith("xplane.pb") for name in under(bucket, "profile/pretrain/"))
    assert any(name.startswith("ref/tokenizer/") for name in under(bucket, ""))
    (events,) = under(bucket, "tensorboard/pre-train_pi_ref/")
    (tmp_path / events).write_bytes(bucket.objects[f"runs/one/tensorboard/pre-train_pi_ref/{events}"])
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    np.testing.assert_allclose([event.value for event in shown], [line["loss"] for line in lines[:4]], rtol=1e-6)

    kept = ("ref/", "guide/", "rollouts/", "samples/")
    before = {name: bucket.writes[name] for start in kept for name in bucket.objects if f"/{start}" in name}
    assert job() == 0
    assert {name: bucket.writes[name] for name in before} == before
    for command in (["report"], ["generate", "0,1|1,2|0,3|3,4/0,2=", "--output", str(tmp_path / "out.jsonl")]):
        assert cli.main([command[0], "--workdir", URL, *command[1:]]) == 0
    assert "seed: 0 -> 9" in refused(capsys, "run", "--config", CONFIG, "--workdir", URL, *QUICK, "--config.seed=9")
    lost = next(name for name in bucket.objects if name.endswith("shard-00000.parquet"))
    del bucket.objects[lost]
    assert cli.main(["collect", "--workdir", URL, "--round", "1"]) == 0 and lost in bucket.objects, "made again"


def test_a_workdir_in_a_bucket_keeps_its_config_and_metrics(bucket):
    with opened() as workdir:
        for step in range(3):
            workdir.append_metrics({"phase": "fit", "step": step, "loss": 0.5})
    with Workdir.open(URL) as workdir:
        assert workdir.config.seed == 0
        workdir.append_metrics({"phase": "fit", "step": 3, "loss": 0.25})  # behind what another process wrote
        assert [row["step"] for row in workdir.read_metrics()] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        opened(seed=1)
    with pytest.raises(UserError, match="gs://bucket/none is not a workdir"):
        Workdir.open("gs://bucket/none")


def test_prompts_that_a_notebook_stores_in_a_bucket_are_read_there(bucket):
    rows = [{"prompt": "Sam"}, {"prompt": "Mia", "best": 3}]
    path = str(training._store(files.make_path(URL), rows))
    assert path == f"{URL}/prompts.jsonl"
    assert [row.fields for row in own.read_rows(path)] == inputs.to_rows(path) == rows
    with pytest.raises(UserError, match=f"there is no file {URL}/none.jsonl"):
        own.read_rows(f"{URL}/none.jsonl")


def test_shards_in_a_bucket_are_those_of_a_folder(bucket, tmp_path):
    row = dict(
        prompt_id="a", round=1, prompt_tokens=[1, 2], response_tokens=[3], switch=0, reward=1.0, finished=True,
        eta=0.5, seed=7, text="x",
    )  # fmt: skip
    rollouts = [Rollout(**row), Rollout(**row | {"prompt_id": "b"})]
    folder = files.make_path(URL) / "rollouts"
    for place in (folder / "round_1", tmp_path / "round_1"):
        write_shard(place, 0, rollouts[:1])
        write_shard(place, 1, rollouts[1:])
    assert read_rounds(folder, [1]) == read_rounds(tmp_path, [1]) == rollouts
    assert shard_path(folder / "round_1", 1).exists() and not shard_path(folder / "round_1", 2).exists()
    bucket.objects["runs/one/rollouts/round_1/shard-00001.parquet"] = b"damaged"
    with pytest.raises(UserError, match="shard-00001.parquet is damaged"):
        read_rounds(folder, [1])


def test_checkpoints_in_a_bucket(bucket):
    folder = files.make_path(URL) / "ref"
    assert not folder.exists()
    again = Checkpoints(save(folder, 5, 10, 15, final=True))
    assert again.finished() and int(again.restore(make_state(0)).step) == 15
    helpers.assert_trees_equal(again.restore_params(make_state(0).params), make_state(15).params)
    assert {name.partition("/")[0] for name in under(bucket, "ref/")} == {"10", "15"} and not bucket.moves


@pytest.mark.slow
def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(bucket, capsys):
    folder = save(files.make_path(URL) / "ref", 5, 10)
    for name in [name for name in bucket.objects if "/ref/10/params/" in name and "/d/" in name]:
        bucket.objects[name] = b"damaged"
    assert int(Checkpoints(folder).restore(make_state(0)).step) == 5
    assert f"{folder / '10'} is damaged" in capsys.readouterr().err
    assert {name.partition("/")[0] for name in under(bucket, "ref/")} == {"5", "10.damaged"} and bucket.moves


@pytest.mark.parametrize(
    ("part", "status"), [("10/params/_METADATA", 403), ("10/params/d/", 400), ("10/params/d/", 403)]
)
def test_a_checkpoint_that_a_bucket_refuses_to_read_is_not_damaged(bucket, monkeypatch, part, status):
    """As where a login has run out: the error is raised, nothing is moved, and later the checkpoint is there again."""
    monkeypatch.setattr(checkpoint, "PAUSES", (0,))
    folder = save(files.make_path(URL) / "ref", 5, 10)
    bucket.refusals[part] = status
    with pytest.raises(Exception) as caught:
        Checkpoints(folder).restore(make_state(0))
    assert not isinstance(caught.value, UserError)
    bucket.refusals.clear()
    assert not bucket.moves and int(Checkpoints(folder).restore(make_state(0)).step) == 10


def test_programs_are_kept_in_a_bucket(bucket):
    compilation_cache.reset_cache()
    cli._keep_programs(files.make_path(URL) / "programs")
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        jax.jit(lambda x: x * 12345.0)(np.float32(1)).block_until_ready()
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    assert under(bucket, "programs/")


def test_nothing_is_written_where_the_writer_fails(bucket):
    path = files.make_path(URL) / "report.md"
    files.write_atomic(path, "old")
    with pytest.raises(KeyboardInterrupt), files.writing(path) as file:
        file.write(b"half of the ne")
        raise KeyboardInterrupt
    assert files.read_text(path) == "old" and bucket.writes["runs/one/report.md"] == 1


def test_folders_that_libraries_write_get_into_the_bucket(bucket):
    with files.folder_of_this_machine(files.make_path(URL) / "tokenizer") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "vocab.json").write_text("{}")
    assert bucket.objects == {"runs/one/tokenizer/deep/vocab.json": b"{}"}


def test_a_holder_that_lives_is_left_alone(bucket, quick_locks, capsys):
    with opened() as workdir:
        with pytest.raises(UserError, match=f"{URL} is in use by process {os.getpid()} on .*give another --workdir"):
            Workdir.open(URL)
        workdir.append_metrics({"phase": "fit", "step": 1, "loss": 0.5})
    with opened():  # it was given back, so nobody waits
        pass
    workdir.close()  # twice does no harm
    assert under(bucket, "lock/") == ["000002"] and json.loads(bucket.objects["runs/one/lock/000002"])["free"]


HOLD = """
import sys, fsspec
sys.path.insert(0, {root!r})
from ml_collections import ConfigDict
from qsharp_jax.system import files, lock
lock.HEARTBEAT, lock.STALE = 0.05, 0.6
path = files.make_path({url!r})
fsspec.config.conf["gcs"]["token"] = "anon"
held = lock.take(path)
print("held", flush=True)
sys.stdin.read()
"""


def test_who_waits_for_a_lock_that_another_takes_over_is_refused(bucket, quick_locks, monkeypatch):
    """The other removes the lock that is waited for."""
    with opened():
        pass

    def removed(locked, number):
        locked._store.rm_file(locked._name(number))
        return json.loads(locked._store.cat_file(locked._name(number)))

    monkeypatch.setattr(lock._ObjectLock, "_wait_for", removed)
    with pytest.raises(UserError, match=f"{URL} is in use by another process that took the lock first"):
        opened()


def test_a_killed_holder_is_taken_over_after_a_while(bucket, quick_locks):
    code = HOLD.format(root=str(ROOT), url=URL)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {process.pid} on"):
            opened()
    finally:
        process.kill()
        process.communicate()
    began = time.monotonic()
    with opened():
        assert time.monotonic() - began > 0.6
        assert under(bucket, "lock/") == ["000002"]


def test_a_holder_that_was_taken_for_dead_stops_writing(bucket, quick_locks, monkeypatch):
    """Its network is gone for a while: another takes over, and the first writes nothing any more."""
    first = opened()
    pipe_file = first._lock._store.pipe_file
    monkeypatch.setattr(first._lock._store, "pipe_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr(first._lock, "_newest", lambda: (_ for _ in ()).throw(OSError("no network")))
    time.sleep(0.2)
    held = json.loads(bucket.objects["runs/one/lock/000001"])
    monkeypatch.setattr(first._lock._store, "pipe_file", pipe_file)
    with opened() as second:
        monkeypatch.undo()
        deadline = time.monotonic() + 20
        while not first._lock._lost and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(UserError, match="was taken over by another process"):
            first.append_metrics({"phase": "fit", "step": 1, "loss": 0.5})
        first.close()
        second.append_metrics({"phase": "fit", "step": 2, "loss": 0.5})
        assert [row["step"] for row in second.read_metrics()] == [2] and not held["free"]


def test_of_many_that_want_it_at_once_one_gets_it(bucket, quick_locks):
    path, taken, refused_ = files.make_path(URL), [], []

    def want():
        try:
            taken.append(lock.take(path))
        except UserError as error:
            refused_.append(str(error))

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(refused_) == 5 and all("is in use by" in words for words in refused_)
    taken[0].release()


def test_without_gcsfs_it_is_said_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    sentence = refused(capsys, "run", "--config", CONFIG, "--workdir", URL, *QUICK)
    assert sentence.startswith(f"qsharp: {URL} needs the package gcsfs; install it by `pip install")


def test_another_kind_of_url_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for url in ("http://host/run", "ftp://x", "g://bucket/run"):
        assert f"{url} is neither a folder nor" in refused(capsys, "report", "--workdir", url)
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_cannot_be_read_is_named(bucket, monkeypatch, capsys):
    """As without credentials: the server's words, and what to do."""

    def forbidden(self, *_):
        self._body()
        self._refuse(401, "Anonymous caller does not have storage.objects.get access")

    monkeypatch.setattr(fake_gcs._Handler, "do_GET", forbidden)
    sentence = refused(capsys, "report", "--workdir", URL)
    assert "cannot be reached (" in sentence and "Anonymous caller" in sentence and "gcloud auth" in sentence
