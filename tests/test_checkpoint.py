"""Checkpoints: bit-equal round trips, and what becomes of damaged, half-written and foreign ones."""

import errno
import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_equal

from qsharp_jax.checkpoint import Best, Checkpoints
from qsharp_jax.errors import UserError
from qsharp_jax.train import TrainState

# A read that fails leaves coroutines of Orbax behind, which complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
)


@pytest.fixture(autouse=True, scope="module")
def collect_what_failed_reads_left():
    yield
    gc.collect()


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


def test_the_best_parameters_lie_beside_the_last(tmp_path):
    """Bit for bit, with their step and figure, in a new object; a checkpoint without them has none."""
    best = Best(jax.tree.map(np.array, make_state(3).params), 3, 0.1 + 0.2)
    assert Checkpoints(tmp_path).restore_best(best.params) is None
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(7), best=best)
    found = Checkpoints(tmp_path).restore_best(make_state(0).params)
    assert (found.step, found.loss) == (3, 0.1 + 0.2)
    assert_trees_equal(found.params, best.params)
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(7))
    checkpoints.save(make_state(9), final=True)
    assert Checkpoints(tmp_path).restore_best(best.params) is None


def test_finished_is_said_by_the_last_checkpoint(tmp_path):
    assert not Checkpoints(save(tmp_path, 1, 2)).finished()
    assert Checkpoints(save(tmp_path, 3, final=True)).finished()


def test_the_last_two_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 10)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 10]
    assert int(Checkpoints(tmp_path).restore(make_state(0)).step) == 10  # a later step, not a later name


# --- Damage ---------------------------------------------------------------------------------------------------------


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


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
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_doing_as_told_mends_it(tmp_path, how):
    """The message names the folder to delete; without it, training goes on from the one before."""
    save(tmp_path, 5, 9)
    DAMAGES[how](tmp_path / "9")
    with pytest.raises(UserError) as caught:
        Checkpoints(tmp_path).restore(make_state(0))
    assert str(tmp_path / "9") in str(caught.value)
    assert "delete that folder and run again" in str(caught.value)
    if "moments" not in how:
        with pytest.raises(UserError, match="damaged"):
            Checkpoints(tmp_path).restore_params(make_state(0).params)

    shutil.rmtree(tmp_path / "9")
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(5))


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
        with pytest.raises(UserError, match=f"{tmp_path / '2'} is damaged or of another model"):
            restore(Checkpoints(tmp_path))


def test_a_half_written_checkpoint_is_not_there(tmp_path, monkeypatch):
    """A kill while step 9 is written leaves step 5 the last, and does not stand in the way of step 9 later."""
    save(tmp_path, 5)
    checkpoints = Checkpoints(tmp_path)

    def killed(source, target, *arguments, **options):
        raise KeyboardInterrupt

    for name in ("rename", "replace"):  # what makes the temporary folder the step's
        monkeypatch.setattr(f"os.{name}", killed)
        monkeypatch.setattr(f"pathlib.Path.{name}", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(make_state(9), final=True)
    monkeypatch.undo()

    assert not (tmp_path / "9").exists() and len(list(tmp_path.iterdir())) > 1  # something half-written lies there
    again = Checkpoints(tmp_path)
    assert not again.finished()
    assert_trees_equal(again.restore(make_state(0)), make_state(5))
    again.save(make_state(9), final=True)
    assert Checkpoints(tmp_path).finished()
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(9))


def test_a_disk_too_full_for_the_state_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints, usage = Checkpoints(tmp_path), shutil.disk_usage(tmp_path)
    checkpoints.save(make_state(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))  # a kernel alone has 12,000
    with pytest.raises(OSError) as caught:
        checkpoints.save(make_state(2))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)
    assert_trees_equal(Checkpoints(tmp_path).restore(make_state(0)), make_state(1))
