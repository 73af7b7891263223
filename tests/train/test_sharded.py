"""Fits on meshes of fake devices against one device, and what the compiled step has of collectives.

The devices are made by a process of its own, which is this file run as a script: XLA reads their number when it starts.
"""

import functools
import json
import math
import re
import sys

import helpers
import jax
import numpy as np
import pytest
from processes import printed_on_fake_devices

from qsharp_jax import train
from qsharp_jax.data.batches import make_batch
from qsharp_jax.models import meshes, sharding
from qsharp_jax.models.sharding import FIT
from qsharp_jax.system.errors import UserError

MESHES = {
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 8": {"fsdp": 8},
    "data 4, fsdp 1, tensor 2": {"data": 4, "fsdp": 1, "tensor": 2},
    "fsdp 1, tensor 4, more than kv heads": {"fsdp": 1, "tensor": 4},
}
CASES = [
    ("value", "adamw", "data 2, fsdp 2, tensor 2"),
    ("value", "adamw", "fsdp 8"),
    ("q", "adamw", "data 4, fsdp 1, tensor 2"),
    ("value in 2 parts", "adafactor", "fsdp 1, tensor 4, more than kv heads"),
    ("language model", "muon", "data 2, fsdp 2, tensor 2"),
]
B, T, D, V, MLP, LAYERS = 16, 24, 32, 96, 128, 2  # all different, so that a shape says what an array is


# --- In the other process -------------------------------------------------------------------------------------------


def model(of: str):
    shape = dict(embed=D, layers=LAYERS, heads=4, kv_heads=2, head_dim=8, mlp=MLP, max_positions=T)
    ref = helpers.random_model(V, **shape)
    if of == "language model":
        return ref, functools.partial(train.language_model_loss, config=ref.config)
    guide = helpers.random_guide(ref.config, type="q" if of == "q" else "v")
    return guide, functools.partial(train.value_loss, config=guide.config)


def batches():
    rng = np.random.default_rng(0)
    return [
        make_batch(helpers.random_examples(rng, vocab_size=V, count=B, longest=T // 2 - 1), rows=B, width=T)
        for _ in range(4)
    ]


def fitted(of: str, optimizer: str, sizes: dict[str, int] | None) -> dict:
    """Losses and the last parameters, whole, with what the compiled step's collectives carry."""
    made, loss_fn = model(of)
    rule = train.make_optimizer(helpers.optimizer_config(optimizer, clip=1.0))
    step_fn = functools.partial(train.train_step, loss_fn=loss_fn, optimizer=rule, accumulate=2 if "parts" in of else 1)
    if sizes is None:
        state, step_fn, mesh = train.init_state(made.params, rule), jax.jit(step_fn), jax.sharding.get_mesh()
    else:
        mesh = meshes.make_mesh(sizes, FIT, jax.devices()[: math.prod(sizes.values())])
        params = sharding.place(made.params, sharding.of_model(made, mesh, FIT).params)
        state = train.init_state(params, rule)
        places = train.state_shardings(params, rule)
        step_fn = jax.jit(step_fn, out_shardings=(places, None))
    losses, found = [], {}
    with jax.set_mesh(mesh):
        if sizes is not None:
            compiled = step_fn.lower(state, sharding.place_rows(batches()[0]), np.float32(1)).compile()
            found["gathers"] = gathers(compiled.as_text())
            found["held"] = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.opt_state))
        for batch in batches():
            state, metrics = step_fn(state, sharding.place_rows(batch), np.float32(1))
            losses.append(float(metrics["loss"]))
    found["programs"] = step_fn._cache_size()
    params = [sharding.to_host(leaf).ravel()[:200].tolist() for leaf in jax.tree.leaves(state.params)]
    return found | {
        "losses": losses,
        "params": params,
        "kept": sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)),
    }


def gathers(program: str) -> list[list[int]]:
    """Shapes of what all-gathers give, axes of length 1 left out."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", program)
    return sorted([int(n) for n in shape.split(",") if n not in ("", "1")] for shape in shapes)


def main():
    """Prints a JSON list: for each case, what one device gives and what the mesh does."""
    cases = [CASES[int(number)] for number in sys.argv[1:]] or CASES
    print(json.dumps([[fitted(*case[:2], None), fitted(*case[:2], MESHES[case[2]])] for case in cases]))


if __name__ == "__main__":
    main()


# --- Here -----------------------------------------------------------------------------------------------------------


def run(*cases: int) -> list:
    """Results of `main` on eight fake devices."""
    found, errors = printed_on_fake_devices(__file__, *cases)
    # XLA says so where it can change a layout only by making the whole array on every device.
    assert "Involuntary full rematerialization" not in errors
    return found


@pytest.fixture(scope="module")
def found() -> list:
    return run(0, 1, 2, 3)


def check(alone: dict, on_mesh: dict) -> None:
    """The same losses and parameters, by one program for all steps."""
    np.testing.assert_allclose(on_mesh["losses"], alone["losses"], atol=1e-5)
    for got, expected in zip(on_mesh["params"], alone["params"], strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)
    assert on_mesh["programs"] == 1


@pytest.mark.parametrize("number", range(4), ids=lambda number: " / ".join(CASES[number]))
def test_a_fit_on_a_mesh_is_that_on_one_device(found, number):
    check(*found[number])


def test_every_device_holds_its_part_of_the_moments(found):
    """With fsdp 8 an eighth of all but the norms' (two of D a layer, and the last) and the counts."""
    _, on_mesh = found[1]
    norms = 2 * (2 * LAYERS + 1) * D
    assert on_mesh["held"] <= (on_mesh["kept"] - norms) / 8 + norms + 20


def test_what_is_gathered_is_one_layer_over_fsdp(found):
    """Each weight as one layer's, still cut over tensor: a stack of layers, or activations, has another shape."""
    assert found[2][1]["gathers"] == []  # fsdp 1
    for case, rows, fsdp, tensor in ((0, B // 4, 2, 2), (1, B // 8, 8, 1)):
        heads, kv, mlp = 32 // tensor, 16 // tensor, MLP // tensor
        weights = [[D, heads], [heads, D], [D, kv], [D, mlp], [mlp, D], [D]]
        # Of the embedding: the tokens, at most a device's width of the table, a device's rows of what was looked up.
        looked_up = [[rows * fsdp, T], [V, D // fsdp], [rows, T, D]]
        assert found[case][1]["gathers"], "the weights were never divided"
        # Either order: the compiler may transpose.
        allowed = weights + [shape[::-1] for shape in weights] + looked_up
        assert [shape for shape in found[case][1]["gathers"] if shape not in allowed] == []


@pytest.mark.slow
def test_the_language_model_on_a_mesh():
    """Its logits, [B, T, V] cut by rows and vocabulary, are gathered along neither."""
    [[alone, on_mesh]] = run(4)
    check(alone, on_mesh)
    logits = [shape for shape in on_mesh["gathers"] if T - 1 in shape and (V in shape or V // 2 in shape)]
    assert logits == []


def test_a_mesh_that_does_not_divide_the_rows_is_refused():
    mesh = jax.sharding.AbstractMesh((3,), ("fsdp",))
    with pytest.raises(UserError, match="16 rows of the batch cannot be divided by the mesh's fsdp 3; use a size that divides them: 1, 2"):
        sharding.of_rows(make_batch([], rows=16, width=8), mesh, FIT)
