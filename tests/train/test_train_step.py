"""One step on a batch that is taken in parts, against the step on the whole of it."""

import functools

import helpers
import jax
import numpy as np
import optax
import pytest

from qsharp_jax import train
from qsharp_jax.data.batches import Example, make_batch

V = 11
LM = helpers.random_model(V, seed=5, max_positions=64)
GUIDE = helpers.random_guide(LM.config)
SGD = optax.sgd(1.0)  # the parameters move by the gradient


def uneven_batch():
    """Eight rows: every other has a long response, most of them right; those between have a label or two, or none."""
    rng = np.random.default_rng(3)
    long = [Example([1, 2], rng.integers(3, V, 12).tolist(), reward=float(i != 2)) for i in range(4)]
    short = [Example([4] * 9, rng.integers(3, V, 2).tolist(), reward=float(i == 0), first_label=i) for i in range(2)]
    short += [Example([5, 6], [], reward=1.0), Example([5], [7, 2], reward=1.0)]
    return make_batch([example for pair in zip(long, short) for example in pair], rows=8, width=16)


LOSSES = {
    "language model": (LM.params, functools.partial(train.language_model_loss, config=LM.config)),
    "value": (GUIDE.params, functools.partial(train.value_loss, config=GUIDE.config)),
    "value and future": (
        GUIDE.params | {"future": train.init_future(jax.random.key(0), 3, LM.config)},
        functools.partial(train.value_loss, config=GUIDE.config, future_weight=0.7),
    ),
}


def step_of(params, loss_fn, batch, accumulate):
    step = functools.partial(train.train_step, loss_fn=loss_fn, optimizer=SGD, accumulate=accumulate)
    return jax.jit(step)(train.init_state(params, SGD), batch, np.float32(1))


@pytest.mark.parametrize("name", LOSSES)
def test_the_step_on_parts_is_that_of_the_whole_batch(name):
    """Parameters, loss and metrics, however the labels lie over the parts; the mean of the parts' means is another."""
    params, loss_fn = LOSSES[name]
    batch = uneven_batch()
    whole, expected = step_of(params, loss_fn, batch, 1)
    for accumulate in (2, 4):
        state, metrics = step_of(params, loss_fn, batch, accumulate)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, whole.params)
        assert set(metrics) == set(expected)
        for key, value in expected.items():
            np.testing.assert_allclose(metrics[key], value, rtol=1e-6, atol=1e-6, err_msg=key)
    halves = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    naive = np.mean([loss[0] for loss in map(functools.partial(jax.jit(loss_fn), params), halves)])
    assert abs(naive - expected["loss"]) > 0.01


def test_the_activations_of_one_part_exist_at_a_time():
    params, loss_fn = LOSSES["language model"]
    batch = make_batch([Example([1, 2], [3] * 62)] * 64, rows=64, width=64)

    def temporary_bytes(accumulate):
        step = functools.partial(train.train_step, loss_fn=loss_fn, optimizer=SGD, accumulate=accumulate)
        lowered = jax.jit(step).lower(train.init_state(params, SGD), batch, np.float32(1))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < 0.3 * temporary_bytes(1)
