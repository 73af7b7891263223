"""A training that goes on with another number of devices: every leaf bit for bit, and the data from where it was.

The devices are made by a process of its own, which is this file run as a script: XLA reads their number when it starts.
"""

import functools
import hashlib
import json
import sys
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest
from processes import printed_on_fake_devices

from qsharp_jax import cli, train
from qsharp_jax.data.batches import Batches
from qsharp_jax.models import hf, meshes, sharding
from qsharp_jax.models.sharding import FIT
from qsharp_jax.run import models
from qsharp_jax.train.checkpoint import Best, Checkpoints

MESHES = {1: {}, 4: {"fsdp": 2, "tensor": 2}, 8: {"data": 2, "fsdp": 2, "tensor": 2}}


# --- In the other process -------------------------------------------------------------------------------------------


def model():
    return helpers.random_model(40)


def mesh_of(devices: int) -> jax.sharding.Mesh:
    """To be set; an empty one for one device."""
    sizes = MESHES[devices]
    return meshes.make_mesh(sizes, FIT, jax.devices()[:devices]) if sizes else jax.sharding.get_mesh()


def placed(made, devices: int):
    """A model's parameters, as a fit on so many devices has them."""
    return (
        sharding.place(made.params, sharding.of_model(made, mesh_of(devices), FIT).params)
        if devices > 1
        else made.params
    )


class Counted:
    """Batches that note which steps were asked for, and end a training at one, as a kill would."""

    def __init__(self, ending: int | None):
        examples = helpers.random_examples(np.random.default_rng(0), vocab_size=40, count=24)
        self.batches = Batches(examples, rows=8, bucket=10, seed=0)
        self.asked, self.ending = [], ending

    def __getitem__(self, step: int):
        if step == self.ending:
            raise KeyboardInterrupt
        self.asked.append(step)
        return self.batches[step]


def fit(folder: Path, devices: int, steps: int, ending: int | None = None):
    """A training that saves after every step: its state, unless it was ended, and the steps that it asked for."""
    batches, optimizer, state = Counted(ending), train.make_optimizer(helpers.optimizer_config()), None
    with jax.set_mesh(mesh_of(devices)):
        try:
            state = train.fit(
                train.init_state(placed(model(), devices), optimizer), batches, optimizer=optimizer,
                loss_fn=functools.partial(train.language_model_loss, config=model().config),
                checkpoints=Checkpoints(folder),
                loop=train.Loop(name="fit", total_steps=steps, log_every=1, save_every=1, log=lambda line: None),
            )  # fmt: skip
        except KeyboardInterrupt:
            pass
    return state, batches.asked


def digest(tree) -> str:
    """A hash of every leaf's bits."""
    return hashlib.sha256(b"".join(sharding.to_host(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()


def same(restored, saved, asked) -> dict[str, bool]:
    """Names of what came back bit for bit, and where it lies."""
    parts = {"params": "params", "moments": "opt_state", "position": "step"}
    found = {name: digest(getattr(restored, part)) == digest(getattr(saved, part)) for name, part in parts.items()}
    at = [leaf.sharding for leaf in jax.tree.leaves(restored)] == [leaf.sharding for leaf in jax.tree.leaves(asked)]
    return found | {"placed": at}


def filled(state):
    """The state with other numbers in every leaf, where they were."""
    rng = np.random.default_rng(1)

    def fill(leaf):
        return jax.device_put((1000 * rng.normal(size=leaf.shape)).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, state)


def matrix(folder: Path) -> dict[str, dict[str, bool]]:
    """Results by the devices before and after."""
    found, optimizer = {}, train.make_optimizer(helpers.optimizer_config())
    for before in MESHES:
        kept = folder / str(before)
        saved, best = filled(train.init_state(placed(model(), before), optimizer)), Best(2, 0.5)
        checkpoints = Checkpoints(kept)
        checkpoints.save_best(saved.params, best)
        checkpoints.save(saved, best=best)
        checkpoints.wait()
        for after in MESHES:
            asked = train.init_state(placed(model(), after), optimizer)
            found[f"{before} -> {after}"] = same(Checkpoints(kept).restore(asked), saved, asked) | {
                "best": digest(Checkpoints(kept).restore_best(best, asked.params)) == digest(saved.params),
            }
    return found


def moved(folder: Path) -> dict:
    """A training of six steps on 4, then 8, then 1 device, beside one that stayed on 1."""
    asked = [fit(folder / "moved", devices, 6, ending)[1] for devices, ending in ((4, 2), (8, 4))]
    state, last = fit(folder / "moved", 1, 6)
    stayed, _ = fit(folder / "stayed", 1, 6)
    leaves = zip(jax.tree.leaves(state.params), jax.tree.leaves(stayed.params), strict=True)
    return {"asked": [*asked, last], "difference": max(float(np.abs(a - b).max()) for a, b in leaves)}


def slice_of_a_run(workdir: Path, out: Path) -> None:
    """Saves a run's reference from eight devices, and exports it from there."""
    session = helpers.session(workdir)
    ref = helpers.random_model(models.tokenizer(session).vocab_size)
    params = placed(ref, 8)
    checkpoints = Checkpoints(session.workdir.ref)
    checkpoints.save(train.init_state(params, train.make_optimizer(helpers.optimizer_config())), final=True)
    checkpoints.wait()
    hf.export_ref(ref.replace(params=params), out)


def main(folder: Path) -> None:
    found = {"matrix": matrix(folder / "matrix"), "moved": moved(folder)}
    slice_of_a_run(folder / "run", folder / "from_the_slice")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))


# --- Here -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resharded")


@pytest.fixture(scope="module")
def found(folder) -> dict:
    return printed_on_fake_devices(__file__, folder)[0]


@pytest.mark.slow
def test_a_state_comes_back_on_every_number_of_devices_from_every_other(found):
    """Parameters, moments, position and best parameters bit for bit, each leaf where a new state would have it."""
    print("\n".join(f"{pair}: {what}" for pair, what in found["matrix"].items()))
    assert len(found["matrix"]) == len(MESHES) ** 2
    for pair, what in found["matrix"].items():
        assert all(what.values()), f"{pair}: {what}"


@pytest.mark.slow
def test_a_training_goes_on_with_the_next_batch_and_ends_where_one_device_would(found):
    assert found["moved"]["asked"] == [[0, 1], [2, 3], [4, 5]]
    assert found["moved"]["difference"] < 1e-3  # sums in another order, six steps of them


@pytest.mark.slow
def test_a_slice_s_checkpoint_is_exported_on_one_device(found, folder):
    """The same files, but for what the run's own command adds, and the weights that the slice had."""
    out = folder / "here"
    assert len(jax.devices()) == 1
    assert cli.main(["export", "--workdir", str(folder / "run"), "--what", "ref", "--out", str(out)]) == 0
    files = [path / "model.safetensors" for path in (out, folder / "from_the_slice")]
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded = hf.load_ref(out, dtype="float32", unstacked=False)
    helpers.assert_trees_equal(loaded.params, helpers.random_model(loaded.config.vocab_size).params)
