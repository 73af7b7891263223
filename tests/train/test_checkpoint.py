"""Checkpoints: bit-equal round trips, and what becomes of half-written and foreign ones."""

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
import pytest
from checkpoints import make_state, save
from helpers import assert_trees_equal

from qsharp_jax.system.errors import UserError
from qsharp_jax.train.checkpoint import Best, Checkpoints


def test_a_state_comes_back_bit_for_bit(tmp_path):
    """In a new object, as after a restart: parameters, moments, step; nan, -0, denormals and bfloat16 among them."""
    save(tmp_path, 7)
    restored = Checkpoints(tmp_path).restore(make_state(0))
    assert_trees_equal(restored, make_state(7))
    assert restored.opt_state[0].mu["half"].dtype == jnp.bfloat16 and int(restored.opt_state[0].count) == 1
    assert np.signbit(restored.params["scale"][2])


def test_without_a_checkpoint_the_state_stays_and_parameters_are_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    state = make_state(0)
    assert checkpoints.restore(state) is state and not checkpoints.finished()
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path / 'new'}"):
        checkpoints.restore_params(state.params)


def test_parameters_alone_need_shapes_only(tmp_path):
    save(tmp_path, 4)
    shapes = jax.eval_shape(lambda: make_state(0).params)
    assert_trees_equal(Checkpoints(tmp_path).restore_params(shapes), make_state(4).params)


def killed():
    raise KeyboardInterrupt


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


@pytest.mark.parametrize("checkpoint_before", [0, 5, 7])
@pytest.mark.parametrize("half_written", [False, True])
def test_best_parameters_that_a_kill_left_are_saved_again(tmp_path, monkeypatch, checkpoint_before, half_written):
    """Killed while or after the best parameters of step 7 were written, and before a checkpoint that refers to them.

    The evaluation of a step comes after its checkpoint.
    """
    checkpoints = Checkpoints(tmp_path)
    if checkpoint_before:
        checkpoints.save(make_state(checkpoint_before))
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        checkpoints.wait()
        if half_written:
            block_renames(patch, killed)
        checkpoints.save_best(make_state(3).params, Best(7, 0.5))
        checkpoints.wait()
    assert len(list((tmp_path / "best").iterdir())) == 1
    again = Checkpoints(tmp_path)
    assert int(again.restore(make_state(0)).step) == checkpoint_before
    again.save_best(make_state(7).params, Best(7, 0.5))
    again.save(make_state(8), best=Best(7, 0.5))
    again.wait()
    assert saved_best(tmp_path) == [7]
    assert_trees_equal(Checkpoints(tmp_path).restore_best(Best(7, 0.5), make_state(0).params), make_state(7).params)


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


def test_the_last_two_are_kept_and_the_last_says_whether_it_is_finished(tmp_path):
    assert not Checkpoints(save(tmp_path, 1, 2, 3)).finished()
    assert Checkpoints(save(tmp_path, 10, final=True)).finished()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 10]
    assert int(Checkpoints(tmp_path).restore(make_state(0)).step) == 10  # a later step, not a later name


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


@pytest.mark.parametrize("code", [errno.EFBIG, errno.ENOSPC])
def test_an_error_of_the_writer_is_told_with_the_folder_and_the_checkpoint_before_stays(tmp_path, monkeypatch, code):
    """While the files are written in the background, which may not grow as large; and where the disk has no room."""
    save(tmp_path, 1)
    checkpoints, state = Checkpoints(tmp_path), make_state(2, shape=(300, 500))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if code == errno.ENOSPC:
        usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            checkpoints.save(state)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == code and caught.value.filename == str(tmp_path)
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(1))


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
    block_renames(monkeypatch, killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 9, final=True)
    monkeypatch.undo()
    assert not (tmp_path / "9").exists() and len(list(tmp_path.iterdir())) > 1  # something half-written lies there
    again = Checkpoints(tmp_path)
    assert not again.finished()
    assert_trees_equal(again.restore(make_state(0)), make_state(5))
    assert Checkpoints(save(tmp_path, 9, final=True)).finished()
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(9))
