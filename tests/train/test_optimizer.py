"""The optimiser's groups, clipping and schedules."""

import functools
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from marks import slow

from qsharp_jax import train
from qsharp_jax.models import decoder, value
from qsharp_jax.models.value import ValueConfig

V = 11


def names_of(tree):
    """The leaves by their path, as "lm/layers/up/kernel"."""
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def all_parameters():
    """One tree with every kind of parameter that the program trains, all far from zero."""
    everything = dict(bias=True, qk_norm=True, token_shift=True, positions="learned", norm="layer", layers=2)
    config = helpers.random_model(V, **everything).config

    def init(key):
        head = value.init(key, ValueConfig(config, type="q"))["head"]
        return {"lm": decoder.init(key, config), "guide": {"head": head}, "future": train.init_future(key, 2, config)}

    shapes, rng = jax.eval_shape(init, jax.random.key(0)), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.float32(1 + rng.random(leaf.shape)), shapes)


def first_update(optimizer, gradients, params):
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(gradients, params)


@pytest.mark.parametrize("name", ["adamw", slow("adafactor"), "muon"])
def test_weight_decay_shrinks_matrices_alone(name):
    """With gradient zero, a step takes learning rate * decay of each matrix, and leaves norms and biases as they are."""
    params = all_parameters()
    config = helpers.optimizer_config(name)
    optimizer = train.make_optimizer(config)
    updates = first_update(optimizer, jax.tree.map(np.zeros_like, params), params)
    kept = set()
    for path, update in names_of(updates).items():
        if path.rpartition("/")[2] in ("bias", "scale", "token_shift"):
            assert not np.asarray(update).any(), f"{path} decays"
            kept.add(path.rpartition("/")[2])
        else:
            blocks = name == "muon" and "layers/" in path
            rate = config.learning_rate if blocks or name != "muon" else config.adam_learning_rate
            np.testing.assert_allclose(
                update, -rate * config.weight_decay * names_of(params)[path], rtol=1e-5, err_msg=path
            )
    assert kept == {"bias", "scale", "token_shift"}


def test_muon_treats_each_layers_matrix_on_its_own():
    """Three steps on a stacked tree equal optax's Muon on each layer's 2-D matrices, wide and tall ones."""
    rng = np.random.default_rng(0)
    shapes = {"query": (3, 6, 6), "up": (3, 6, 16), "down": (3, 16, 6)}

    def draw():
        return {name: {"kernel": np.float32(rng.normal(size=shape))} for name, shape in shapes.items()}

    def train_on(optimizer, params, gradients):
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    params, gradients = draw(), [draw() for _ in range(3)]
    config = helpers.optimizer_config("muon")
    stacked = jax.jit(functools.partial(train_on, train.make_optimizer(config)))(
        {"layers": params}, [{"layers": gradient} for gradient in gradients]
    )
    plain = jax.jit(
        functools.partial(train_on, optax.contrib.muon(config.learning_rate, weight_decay=config.weight_decay))
    )
    alone = [plain(*jax.tree.map(lambda leaf, i=i: leaf[i], (params, gradients))) for i in range(3)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), stacked["layers"], expected)


def test_muon_is_for_the_blocks_matrices_and_adamw_for_the_rest():
    """A step on a block's matrix has singular values near one rate; all else moves by the other, each entry alike."""
    params = all_parameters()
    config = helpers.optimizer_config("muon", weight_decay=0.0)
    optimizer = train.make_optimizer(config)
    rng = np.random.default_rng(1)
    gradients = jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape)), params)
    updates = first_update(optimizer, gradients, params)
    seen = 0
    for path, update in names_of(updates).items():
        gradient = names_of(gradients)[path]
        if "layers/" in path and path.endswith("kernel"):
            scale = config.learning_rate * math.sqrt(max(1, update.shape[2] / update.shape[1]))
            singular = np.linalg.svd(update, compute_uv=False) / scale
            assert 0.7 < np.median(singular) and singular.max() < 1.3, path
            seen += 1
        else:  # Adam's first step, Nesterov's correction included
            np.testing.assert_allclose(np.abs(update), np.abs(update).max(), rtol=1e-3, err_msg=path)
            assert config.adam_learning_rate <= np.abs(update).max() <= 1.5 * config.adam_learning_rate, path
        assert (np.sum(update * gradient)) < 0, path
    assert seen == 7  # query, key, value, output, up, gate, down


def test_adafactor_by_hand():
    """Two steps on a stack of matrices: each step's second moments are the outer product of a row's and a column's
    means over the rows' mean; a first step forgets what was before, the second weighs by 1 - 2^-0.8; the update's RMS
    is at most 1. And next to nothing is kept of a matrix."""
    rng = np.random.default_rng(0)
    params = {"layers": {"up": {"kernel": jnp.ones((2, 128, 160))}}}
    gradients = [np.float32(rng.normal(size=(2, 128, 160)) * rng.random((2, 128, 1)) * scale) for scale in (1, 3)]
    config = helpers.optimizer_config("adafactor", weight_decay=0.0)
    optimizer = train.make_optimizer(config)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 0.02 * 2 * 128 * 160
    rows, columns = 0.0, 0.0
    for step, gradient in enumerate(np.float64(gradients)):
        keep = 1 - (step + 1.0) ** -0.8
        rows = keep * rows + (1 - keep) * (gradient**2).mean(axis=2)
        columns = keep * columns + (1 - keep) * (gradient**2).mean(axis=1)
        moments = rows[:, :, None] * columns[:, None, :] / rows.mean(axis=1)[:, None, None]
        expected = gradient / np.sqrt(moments)
        expected /= max(1.0, np.sqrt((expected**2).mean()))
        updates, state = update({"layers": {"up": {"kernel": gradients[step]}}}, state, params)
        np.testing.assert_allclose(updates["layers"]["up"]["kernel"], -config.learning_rate * expected, rtol=2e-4)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_the_gradient_is_clipped_by_its_global_norm(name):
    """Scaled as one vector: with clip 1, a gradient of norm 1000 is the same as one of norm 1."""
    params = {"layers": {"up": {"kernel": jnp.ones((1, 3, 4))}}, "embedding": jnp.ones((2, 3))}
    gradient = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape), params)
    unit = jax.tree.map(lambda leaf: leaf / optax.tree.norm(gradient), gradient)
    optimizer = train.make_optimizer(helpers.optimizer_config(name, clip=1.0))
    state_after = jax.jit(lambda g: optimizer.update(g, optimizer.init(params), params)[1])
    big, small = state_after(jax.tree.map(lambda leaf: 1000 * leaf, unit)), state_after(unit)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-12), big, small)


def test_schedules_by_closed_form():
    """Linear warm-up from 0; then 1, or half a cosine that ends at `end_fraction` at the last step and stays there."""
    total, warmup, end = 100, 20, 0.05

    def course(**changes):
        config = helpers.optimizer_config(**{"warmup_steps": warmup, "end_fraction": end} | changes)
        return np.asarray([train.make_schedule(config, total)(step) for step in range(total + 10)])

    steps = np.arange(total + 10)
    constant = np.minimum(steps / warmup, 1)
    share = np.clip((steps - warmup) / (total - warmup), 0, 1)
    cosine = np.where(steps < warmup, constant, end + (1 - end) * (1 + np.cos(np.pi * share)) / 2)
    np.testing.assert_allclose(course(schedule="constant"), constant, atol=1e-6)
    np.testing.assert_allclose(course(schedule="cosine"), cosine, atol=1e-6)
    np.testing.assert_allclose(course(schedule="constant", warmup_steps=0), 1)
    without = course(schedule="cosine", warmup_steps=0)
    np.testing.assert_allclose(without[[0, total // 2, total]], [1, (1 + end) / 2, end], atol=1e-6)
    assert np.isfinite(course(schedule="cosine", warmup_steps=2 * total)).all()  # never past the warm-up


@pytest.mark.parametrize(("warmup", "total"), [(50, 38), (38, 38), (37, 38), (0, 38), (0, 0), (50, 0)])
def test_a_training_that_never_leaves_its_warm_up_says_so(capsys, warmup, total):
    rate = train.make_schedule(helpers.optimizer_config(warmup_steps=warmup, schedule="constant"), total)
    reaches = total == 0 or max(rate(step) for step in range(total)) == 1
    words = f"the learning rate never reaches 0.02: warmup_steps is {warmup} and the training has 38 steps\n"
    assert capsys.readouterr().out == ("" if reaches else words)
