"""Damaged checkpoints, and which errors say so: those of Orbax and TensorStore, in their own words."""

import errno
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import files_of, flip, largest, make_state, save
from gcsfs.retry import HttpError
from helpers import assert_trees_equal, refusal, wrapped_error

from qsharp_jax.system.errors import UserError
from qsharp_jax.train import checkpoint
from qsharp_jax.train.checkpoint import Best, Checkpoints
from qsharp_jax.train.damage import DamagedError, is_damage, root_cause


@pytest.mark.parametrize(
    "error",
    [
        DamagedError("is damaged (its numbers are not those that were written)"),
        FileNotFoundError("Metadata file (named _METADATA) does not exist at /9/params."),
        NotADirectoryError(errno.ENOTDIR, "Not a directory"),
        json.JSONDecodeError("Expecting value", "", 0),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        ValueError("DATA_LOSS: Error decoding manifest: CRC-32C checksum verification failed"),
        ValueError("OUT_OF_RANGE: Requested byte range [0, 11131) is not valid for value of size 5"),
        ValueError('NOT_FOUND: Error opening "zarr" driver: Metadata at "x/.zarray" in OCDBT database does not exist'),
        ValueError("NOT_FOUND: Error reading gs://b/9/params/d/ab: [http_response_code='404']"),
        ValueError('FAILED_PRECONDITION: Error reading "x": ZSTD_decompressStream() failed: Data corruption detected'),
        ValueError('FAILED_PRECONDITION: Error reading local file "/9/params/_sharding": Invalid JSON'),
        ValueError('Error opening "zarr" driver: Error decoding b-tree node: ZSTD_decompressStream() failed'),
        wrapped_error(ValueError("DATA_LOSS: Error decoding chunk")),
    ],
    ids=repr,
)
def test_damage(error):
    assert is_damage(error)


@pytest.mark.parametrize(
    "error",
    [
        wrapped_error(ValueError("UNAVAILABLE: Error reading local file")),
        wrapped_error(MemoryError()),
        wrapped_error(ValueError("DEADLINE_EXCEEDED: Error reading local file")),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ESTALE, "Stale file handle", "/9/params"),
        PermissionError(errno.EACCES, "Permission denied", "/9/params"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError(),
        MemoryError(),
        RuntimeError("what nobody has seen"),
        ValueError("NOT_FOUND"),
        ValueError("Error reading gs://b/9/params/d/ab: invalid grant [http_response_code='400']"),
        ValueError("FAILED_PRECONDITION: Error reading gs://b/9/d/ab: [http_response_code='412']"),
        ValueError("RESOURCE_EXHAUSTED: Error reading local file: No space left on device [os_error_code='28']"),
        ValueError("FAILED_PRECONDITION: Error reading local file: Device busy [os_error_code='16']"),
        ValueError("INTERNAL: Error reading local file"),
        RuntimeError("NOT_FOUND: a kernel of XLA"),
        Exception("DATA_LOSS: of no known type"),
        KeyError("tree_metadata"),
        TypeError("a mistake in a program"),
    ],
    ids=repr,
)
def test_no_damage(error):
    assert not is_damage(error)


def test_the_root_cause_of_an_error_that_was_wrapped():
    error = ValueError("DATA_LOSS: bits")
    assert root_cause(wrapped_error(wrapped_error(error))) is error and root_cause(error) is error


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def truncate(step, larger_than=0):
    for path in files_of(step / "params"):
        if path.stat().st_size > larger_than:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_file_instead(folder):
    shutil.rmtree(folder)
    folder.write_text("")


ARRAYS = "array_metadatas/process_0"


DAMAGES = {
    "parameters emptied": lambda step: [path.write_bytes(b"") for path in files_of(step / "params")],
    "parameters truncated": truncate,
    "array data truncated": lambda step: truncate(step, larger_than=5000),
    "array data deleted": lambda step: shutil.rmtree(step / "params" / "d"),
    "manifest deleted": lambda step: (step / "params" / "manifest.ocdbt").unlink(),
    "metadata garbled": lambda step: (step / "params" / "_METADATA").write_text("{"),
    "parameters deleted": lambda step: shutil.rmtree(step / "params"),
    "moments deleted": lambda step: shutil.rmtree(step / "training"),
    "parameters a file": lambda step: a_file_instead(step / "params"),
    "array data a file": lambda step: a_file_instead(step / "params" / "d"),
    "a key of the metadata garbled": lambda step: replace(step / "params" / "_METADATA", "key_type", "kez_type"),
    "a type of the metadata garbled": lambda step: replace(step / "params" / "_METADATA", "jax.Array", "jax.Brray"),
    "array metadata garbled": lambda step: replace(step / "params" / ARRAYS, "write_shape", "write_shaqe"),
    "shardings truncated": lambda step: (step / "params" / "_sharding").write_text("{"),
    "a bit of the numbers": lambda step: flip(largest(step / "params"), 5000),
    "a bit of the compression": lambda step: flip(largest(step / "params"), 0),
    "a bit of the manifest": lambda step: flip(step / "params" / "manifest.ocdbt", -1),
    "a bit of the index": lambda step: flip(largest(step / "params" / "d"), 14),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_named_kept_and_the_one_before_is_used(tmp_path, capfd, how):
    save(tmp_path, 5, 9)
    DAMAGES[how](tmp_path / "9")
    before = {path.name: path.read_bytes() for path in files_of(tmp_path / "9")}
    if "moments" not in how:
        with pytest.raises(DamagedError, match=f"{tmp_path / '9'} is damaged .*; run its training again"):
            Checkpoints(tmp_path).restore_params(make_state(0).params)
    capfd.readouterr()
    checkpoints = Checkpoints(tmp_path)
    assert_trees_equal(checkpoints.restore(make_state(0)), make_state(5))
    (line,) = capfd.readouterr().err.splitlines()
    aside = tmp_path / "9.damaged"
    assert line.startswith(f"the checkpoint {tmp_path / '9'} is damaged (")
    assert line.endswith(f"; it is kept as {aside}, and training resumes from step 5")
    assert {path.name: path.read_bytes() for path in files_of(aside)} == before
    save(tmp_path, 9)
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(9))
    shutil.rmtree(tmp_path / "9" / "params")
    assert int(Checkpoints(tmp_path).restore(make_state(0)).step) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"5", "9.damaged", "9.damaged-2"}


def test_a_checkpoint_without_the_best_that_it_refers_to_is_damaged(tmp_path):
    save(tmp_path, 5)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_best(make_state(7).params, Best(7, 0.5))
    checkpoints.save(make_state(9), best=Best(7, 0.5))
    checkpoints.wait()
    shutil.rmtree(tmp_path / "best" / "7")
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(5))


PASSING = {  # one of each library; test_no_damage has more kinds
    "503": HttpError({"code": 503, "message": "Service Unavailable"}),
    "503 of TensorStore": ValueError("UNAVAILABLE: Error reading gs://b/9/params/d/ab: [http_response_code='503']"),
    "a disk that fails": OSError(errno.EIO, "Input/output error", "/9/params"),
    "memory of a device": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."),
}


def fail_reads(monkeypatch, error, times=1000):
    """The next reads through Orbax raise the error; gives the list of those that did."""
    restore, failed = ocp.CheckpointManager.restore, []

    def failing(self, *args, **options):
        if len(failed) < times:
            failed.append(error)
            raise error
        return restore(self, *args, **options)

    monkeypatch.setattr(checkpoint, "PAUSES", (0,))
    monkeypatch.setattr(ocp.CheckpointManager, "restore", failing)
    return failed


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A folder with steps 5 and 9, for tests that change nothing there."""
    return save(tmp_path_factory.mktemp("healthy"), 5, 9)


@pytest.mark.parametrize("what", PASSING)
def test_an_error_that_passes_condemns_nothing_and_one_that_stays_is_raised(healthy, monkeypatch, capfd, what):
    """It is raised unchanged by every reader, after every pause; no other step is used and nothing is renamed."""
    with monkeypatch.context() as patch:
        checkpoints, failed = Checkpoints(healthy), fail_reads(patch, PASSING[what], times=1)
        assert_trees_equal(checkpoints.restore(make_state(0)), make_state(9))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{healthy / '9'} could not be read (") and line.endswith("; trying again in 0 s")
    assert len(failed) == 1
    failed, pauses, params = fail_reads(monkeypatch, PASSING[what]), [], make_state(0).params
    monkeypatch.setattr(checkpoint, "PAUSES", (0, 1, 4))
    monkeypatch.setattr(checkpoint.time, "sleep", pauses.append)
    reads = (
        lambda c: c.restore(make_state(0)),
        Checkpoints.finished,
        Checkpoints.best,
        lambda c: c.restore_params(params),
    )
    for count, read in enumerate(reads, start=1):
        with pytest.raises(type(PASSING[what])) as caught:
            read(Checkpoints(healthy))
        assert caught.value is PASSING[what] and pauses == [0, 1, 4] * count and len(failed) == 4 * count
    assert {path.name for path in healthy.iterdir()} == {"5", "9"}


def test_damage_that_a_second_read_does_not_meet_is_none(healthy, monkeypatch, capfd):
    """An error such as of bits that the network flipped, or a listing that was behind."""
    for error in (ValueError("DATA_LOSS: CRC-32C checksum verification failed"), FileNotFoundError(errno.ENOENT, "")):
        with monkeypatch.context() as patch:
            failed = fail_reads(patch, error, times=1)
            assert_trees_equal(Checkpoints(healthy).restore(make_state(0)), make_state(9))
            assert len(failed) == 1
    assert {path.name for path in healthy.iterdir()} == {"5", "9"} and capfd.readouterr().err == ""


def test_damage_met_after_an_error_that_passed_is_damage(tmp_path, monkeypatch):
    save(tmp_path, 5, 9)
    flip(largest(tmp_path / "9" / "params"), 5000)
    fail_reads(monkeypatch, PASSING["503"], times=1)
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(5))
    assert {path.name for path in tmp_path.iterdir()} == {"5", "9.damaged"}


@pytest.mark.slow
def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """In any file: what is restored is what was saved, or the checkpoint is damaged."""
    expected, random, noticed = make_state(9), np.random.default_rng(0), 0
    for _ in range(30):
        save(tmp_path, 9)
        path = random.choice(files_of(tmp_path / "9"))
        flip(path, random.integers(path.stat().st_size), 1 << random.integers(8))
        try:
            assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), expected)
        except UserError:
            noticed += 1
        shutil.rmtree(tmp_path / "9")
    assert noticed > 5


def test_when_none_can_be_read_nothing_is_touched_and_the_newest_is_named(tmp_path):
    save(tmp_path, 5, 9)
    for step in ("5", "9"):
        shutil.rmtree(tmp_path / step / "params")
    message = refusal(Checkpoints(tmp_path).restore, make_state(0))
    assert message.startswith(f"the checkpoint {tmp_path / '9'} is damaged")
    assert message.endswith(f"and none of those before it can be read; delete {tmp_path} to train anew")
    assert {path.name for path in tmp_path.iterdir()} == {"5", "9"}


@pytest.mark.parametrize("content", ["", "{", None])
def test_a_damaged_finished_mark_is_named(tmp_path, content):
    save(tmp_path, 5, final=True)
    (mark,) = (path for path in files_of(tmp_path / "5" / "progress") if path.name == "metadata")
    mark.unlink() if content is None else mark.write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "5")):
        Checkpoints(tmp_path).finished()
