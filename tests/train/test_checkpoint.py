"""Checkpoints: bit-equal round trips, and what becomes of damaged, half-written and foreign ones."""

import contextlib
import errno
import os
import pathlib
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from gcsfs.retry import HttpError
from helpers import (
    assert_trees_equal,
    quick_compilation,  # noqa: F401
)

from qsharp_jax.system.errors import UserError
from qsharp_jax.train import TrainState, checkpoint
from qsharp_jax.train.checkpoint import Best, Checkpoints, DamagedError


def make_state(step, shape=(30, 50)):
    """Every leaf tells the step it was made at. The kernel has a file of its own; small leaves have not."""
    key = jax.random.key(step)
    params = {
        "layers": {"kernel": jax.random.normal(key, (2, *shape))},
        "scale": jnp.asarray([np.nan, np.inf, -0.0, 1e-45, step], jnp.float32),
        "half": jax.random.normal(key, (7,)).astype(jnp.bfloat16),
    }
    adam = optax.adamw(1e-3)
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, step), params)
    return TrainState(params, adam.update(gradients, adam.init(params), params)[1], jnp.asarray(step, jnp.int32))


def save(folder, *steps, final=False):
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(make_state(step), final=final and step == steps[-1])
    checkpoints.wait()
    return folder


def test_a_state_comes_back_bit_for_bit(tmp_path):
    """In a new object, as after a restart: parameters, moments, step; nan, -0, denormals and bfloat16 among them."""
    save(tmp_path, 7)
    restored = Checkpoints(tmp_path).restore(make_state(0))
    assert_trees_equal(restored, make_state(7))
    assert restored.opt_state[0].mu["half"].dtype == jnp.bfloat16 and int(restored.opt_state[0].count) == 1
    assert np.signbit(restored.params["scale"][2])


def test_without_a_checkpoint_the_state_stays_and_parameters_are_an_error(tmp_path):
    """Training starts from its own state; whoever needs a trained model hears that there is none."""
    checkpoints = Checkpoints(tmp_path / "new")
    state = make_state(0)
    assert checkpoints.restore(state) is state and not checkpoints.finished()
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path / 'new'}"):
        checkpoints.restore_params(state.params)


def test_parameters_alone_need_shapes_only(tmp_path):
    """No optimiser and no arrays: what a model is loaded by."""
    save(tmp_path, 4)
    shapes = jax.eval_shape(lambda: make_state(0).params)
    assert_trees_equal(Checkpoints(tmp_path).restore_params(shapes), make_state(4).params)


def saved_best(folder):
    return sorted(int(path.name) for path in (folder / "best").iterdir())


def test_the_best_parameters_lie_beside_the_last(tmp_path):
    """Bit for bit, in a new object, with their step and figure; a checkpoint that refers to none has none."""
    best, params = Best(3, 0.1 + 0.2), make_state(3).params
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.best() is None
    checkpoints.save_best(params, best)
    checkpoints.save(make_state(7), best=best)
    checkpoints.wait()
    found = Checkpoints(tmp_path).best()
    assert found == best
    assert_trees_equal(Checkpoints(tmp_path).restore_best(found, make_state(0).params), params)
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(7))
    checkpoints.save(make_state(9), final=True)
    checkpoints.wait()
    assert Checkpoints(tmp_path).best() is None


def test_the_best_that_a_checkpoint_refers_to_are_kept_and_no_others(tmp_path):
    """Each is written once, however many checkpoints refer to it; what came after a restored step is forgotten."""
    checkpoints, best = Checkpoints(tmp_path), None
    for step in range(1, 9):
        if step in (2, 5, 6, 7):
            best = Best(step, 1 / step)
            checkpoints.save_best(make_state(step).params, best)
        if step in (4, 8):
            checkpoints.save(make_state(step), best=best)
    checkpoints.wait()
    assert saved_best(tmp_path) == [2, 7]
    checkpoints.save(make_state(9), best=best)  # of 4 and 8 the second stays, of 2 and 7 too
    checkpoints.save_best(make_state(10).params, Best(10, 0.01))
    checkpoints.wait()
    assert saved_best(tmp_path) == [7, 10]
    again = Checkpoints(tmp_path)
    assert int(again.restore(make_state(0)).step) == 9 and again.best() == best
    assert saved_best(tmp_path) == [7]


@pytest.mark.parametrize("checkpoint_before", [False, True])
@pytest.mark.parametrize("half_written", [False, True])
def test_best_parameters_that_a_kill_left_are_saved_again(tmp_path, monkeypatch, checkpoint_before, half_written):
    """Killed while or after the best parameters of step 7 were written, and before a checkpoint of that step."""

    def killed():
        raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path)
    if checkpoint_before:
        checkpoints.save(make_state(5))
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        checkpoints.wait()
        if half_written:
            block_renames(patch, killed)
        checkpoints.save_best(make_state(3).params, Best(7, 0.5))
        checkpoints.wait()
    assert len(list((tmp_path / "best").iterdir())) == 1
    again = Checkpoints(tmp_path)
    assert int(again.restore(make_state(0)).step) == (5 if checkpoint_before else 0)
    again.save_best(make_state(7).params, Best(7, 0.5))
    again.save(make_state(8), best=Best(7, 0.5))
    again.wait()
    assert saved_best(tmp_path) == [7]
    assert_trees_equal(Checkpoints(tmp_path).restore_best(Best(7, 0.5), make_state(0).params), make_state(7).params)


def test_finished_is_said_by_the_last_checkpoint(tmp_path):
    assert not Checkpoints(save(tmp_path, 1, 2)).finished()
    assert Checkpoints(save(tmp_path, 3, final=True)).finished()


def test_a_finished_training_may_be_saved_at_a_step_that_is_there(tmp_path):
    """A stop at the last step: the best parameters in its place, and never a moment without either."""
    save(tmp_path, 1, 5)
    other = make_state(5).replace(params=make_state(3).params)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(5))  # it is there
    assert not checkpoints.finished()
    checkpoints.save(other, final=True)
    checkpoints.wait()
    assert Checkpoints(tmp_path).finished()
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), other)


def test_the_last_two_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 10)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 10]
    assert int(Checkpoints(tmp_path).restore(make_state(0)).step) == 10  # a later step, not a later name


# --- Writing while training goes on ---------------------------------------------------------------------------------


def block_renames(monkeypatch, blocked):
    """Whatever makes a temporary folder the step's calls `blocked` first."""
    for owner, name in ((os, "rename"), (os, "replace"), (pathlib.Path, "rename"), (pathlib.Path, "replace")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, original=original, **options: (blocked(), original(*args, **options))[1]
        )


def test_files_are_written_while_training_goes_on(tmp_path, monkeypatch):
    """`save` returns with nothing on disk; donating the state then does not change what is saved; another save waits."""
    allowed = threading.Event()
    block_renames(monkeypatch, allowed.wait)
    checkpoints, state = Checkpoints(tmp_path), make_state(5)
    expected = jax.tree.map(np.array, state)
    checkpoints.save(state)
    donated = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 + 1, state), donate_argnums=0)(state)
    jax.block_until_ready(donated)
    assert not (tmp_path / "5").exists()
    threading.Timer(0.5, allowed.set).start()
    checkpoints.save(make_state(6))
    assert (tmp_path / "5").exists()
    assert_trees_equal(jax.tree.map(np.array, Checkpoints(tmp_path).restore(make_state(0))), expected)
    checkpoints.wait()
    assert int(Checkpoints(tmp_path).restore(make_state(0)).step) == 6


def test_an_error_of_the_writer_is_told_with_the_folder_and_the_checkpoint_before_stays(tmp_path):
    """Met while the files are written, in the background: here, none of this process's files may grow as large."""
    save(tmp_path, 1)
    checkpoints, state = Checkpoints(tmp_path), make_state(2, shape=(300, 500))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            checkpoints.save(state)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path)
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(1))


# --- Damage ---------------------------------------------------------------------------------------------------------


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, place, bit=1):
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def largest(folder):
    return max(files_of(folder), key=lambda path: path.stat().st_size)


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


DAMAGES = {
    "parameters emptied": lambda step: [path.write_bytes(b"") for path in files_of(step / "params")],
    "parameters truncated": lambda step: [
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) for path in files_of(step / "params")
    ],
    "array data truncated": lambda step: [
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        for path in files_of(step / "params")
        if path.stat().st_size > 5000
    ],
    "array data deleted": lambda step: shutil.rmtree(step / "params" / "d"),
    "manifest deleted": lambda step: (step / "params" / "manifest.ocdbt").unlink(),
    "metadata garbled": lambda step: (step / "params" / "_METADATA").write_text("{"),
    "parameters deleted": lambda step: shutil.rmtree(step / "params"),
    "moments deleted": lambda step: shutil.rmtree(step / "training"),
    "parameters a file": lambda step: [shutil.rmtree(step / "params"), (step / "params").write_text("")],
    "array data a file": lambda step: [shutil.rmtree(step / "params" / "d"), (step / "params" / "d").write_text("")],
    "a key of the metadata garbled": lambda step: replace(step / "params" / "_METADATA", "key_type", "kez_type"),
    "a type of the metadata garbled": lambda step: replace(step / "params" / "_METADATA", "jax.Array", "jax.Brray"),
    "array metadata garbled": lambda step: replace(
        step / "params" / "array_metadatas" / "process_0", "write_shape", "write_shaqe"
    ),
    "shardings truncated": lambda step: (step / "params" / "_sharding").write_text("{"),
    "a bit of the numbers": lambda step: flip(largest(step / "params"), 5000),
    "a bit of the compression": lambda step: flip(largest(step / "params"), 0),
    "a bit of the manifest": lambda step: flip(step / "params" / "manifest.ocdbt", -1),
    "a bit of the index": lambda step: flip(largest(step / "params" / "d"), 14),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_named_kept_and_the_one_before_is_used(tmp_path, capfd, how):
    """In one sentence. Training comes by the same step again, and saves it again."""
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
    checkpoints.save(make_state(9))
    checkpoints.wait()
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(9))


def test_damage_again_at_the_same_step_is_kept_beside_the_first(tmp_path):
    for _ in range(2):
        save(tmp_path, 5, 9) if not (tmp_path / "5").exists() else save(tmp_path, 9)
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


# --- Errors that pass -----------------------------------------------------------------------------------------------


def wrapped(error):
    """The form in which Orbax wraps what TensorStore raises for one array."""
    outer = Exception("Encountered error while reading array index: (slice(0, 2, 1),)")
    outer.__cause__ = error
    return outer


PASSING = {
    "503": HttpError({"code": 503, "message": "Service Unavailable"}),
    "503 of TensorStore": ValueError("UNAVAILABLE: Error reading gs://b/9/params/d/ab: [http_response_code='503']"),
    "400": ValueError("Error reading gs://b/9/params/d/ab: invalid grant [http_response_code='400']"),
    "412": ValueError("FAILED_PRECONDITION: Error reading gs://b/9/params/d/ab: [http_response_code='412']"),
    "no space": OSError(errno.ENOSPC, "No space left on device"),
    "no space, of TensorStore": ValueError(
        "RESOURCE_EXHAUSTED: Error reading local file: No space left on device [os_error_code='28']"
    ),
    "busy": ValueError("FAILED_PRECONDITION: Error reading local file: Device busy [os_error_code='16']"),
    "a disk that fails": OSError(errno.EIO, "Input/output error", "/9/params"),
    "a stale handle": OSError(errno.ESTALE, "Stale file handle", "/9/params"),
    "not permitted": PermissionError(errno.EACCES, "Permission denied", "/9/params"),
    "memory of the host": MemoryError(),
    "memory of a device": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."),
    "timeout": TimeoutError(),
    "timeout of one array": wrapped(ValueError("DEADLINE_EXCEEDED: Error reading local file")),
    "connection": ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    "unknown": RuntimeError("what nobody has seen"),
    "a mistake in a program": KeyError("tree_metadata"),
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
def test_an_error_that_passes_condemns_nothing(healthy, monkeypatch, capfd, what):
    checkpoints, failed = Checkpoints(healthy), fail_reads(monkeypatch, PASSING[what], times=1)
    assert_trees_equal(checkpoints.restore(make_state(0)), make_state(9))
    assert len(failed) == 1 and {path.name for path in healthy.iterdir()} == {"5", "9"}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{healthy / '9'} could not be read (") and line.endswith("; trying again in 0 s")


@pytest.mark.parametrize("what", PASSING)
def test_an_error_that_stays_is_raised_as_it_is(healthy, monkeypatch, what):
    """No other step is used in its place, and nothing is renamed."""
    checkpoints, failed = Checkpoints(healthy), fail_reads(monkeypatch, PASSING[what])
    with pytest.raises(type(PASSING[what])) as caught:
        checkpoints.restore(make_state(0))
    assert caught.value is PASSING[what] and len(failed) == 2
    assert {path.name for path in healthy.iterdir()} == {"5", "9"}


def test_all_that_read_raise_it(healthy, monkeypatch):
    """After as many pauses as there are."""
    fail_reads(monkeypatch, PASSING["503"])
    pauses = []
    monkeypatch.setattr(checkpoint, "PAUSES", (0, 1, 4))
    monkeypatch.setattr(checkpoint.time, "sleep", pauses.append)
    checkpoints, params = Checkpoints(healthy), make_state(0).params
    for read in (checkpoints.finished, checkpoints.best, lambda: checkpoints.restore_params(params)):
        pauses.clear()
        with pytest.raises(HttpError):
            read()
        assert pauses == [0, 1, 4]


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
    expected, random = make_state(9), np.random.default_rng(0)
    noticed = 0
    for _ in range(30):
        save(tmp_path, 9)
        path = random.choice(files_of(tmp_path / "9"))
        content = bytearray(path.read_bytes())
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        path.write_bytes(content)
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
    with pytest.raises(UserError) as caught:
        Checkpoints(tmp_path).restore(make_state(0))
    assert str(caught.value).startswith(f"the checkpoint {tmp_path / '9'} is damaged")
    assert str(caught.value).endswith(f"and none of those before it can be read; delete {tmp_path} to train anew")
    assert {path.name for path in tmp_path.iterdir()} == {"5", "9"}


@pytest.mark.parametrize("content", ["", "{", None])
def test_a_damaged_finished_mark_is_named(tmp_path, content):
    save(tmp_path, 5, final=True)
    (mark,) = (path for path in files_of(tmp_path / "5" / "progress") if path.name == "metadata")
    mark.unlink() if content is None else mark.write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "5")):
        Checkpoints(tmp_path).finished()


def other_models():
    smaller, more, fewer = make_state(0, shape=(30, 40)), make_state(0), make_state(0)
    more.params["bias"] = jnp.zeros(3)
    del fewer.params["scale"]
    return {"smaller": smaller, "more": more, "fewer": fewer, "larger": make_state(0, shape=(30, 60))}


@pytest.mark.parametrize("name", other_models())
def test_a_checkpoint_of_another_model_is_refused(tmp_path, name):
    """Never cut, padded or partly filled: smaller and larger arrays, more of them and fewer."""
    save(tmp_path, 2)
    state = other_models()[name]
    for restore in (lambda c: c.restore(state), lambda c: c.restore_params(state.params)):
        with pytest.raises(UserError, match=rf"{tmp_path / '2'} is of another model \(.* there, .* here\)"):
            restore(Checkpoints(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"2"}


def test_a_half_written_checkpoint_is_not_there(tmp_path, monkeypatch):
    """A kill while step 9 is written leaves step 5 the last, and does not stand in the way of step 9 later."""
    save(tmp_path, 5)
    checkpoints = Checkpoints(tmp_path)

    def killed():
        raise KeyboardInterrupt

    block_renames(monkeypatch, killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(make_state(9), final=True)
        checkpoints.wait()
    monkeypatch.undo()

    assert not (tmp_path / "9").exists() and len(list(tmp_path.iterdir())) > 1  # something half-written lies there
    again = Checkpoints(tmp_path)
    assert not again.finished()
    assert_trees_equal(again.restore(make_state(0)), make_state(5))
    again.save(make_state(9), final=True)
    again.wait()
    assert Checkpoints(tmp_path).finished()
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(9))


def test_a_disk_too_full_for_the_state_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints, usage = Checkpoints(tmp_path), shutil.disk_usage(tmp_path)
    checkpoints.save(make_state(1))
    checkpoints.wait()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))  # a kernel alone has 12,000
    with pytest.raises(OSError) as caught:
        checkpoints.save(make_state(2))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(1))
