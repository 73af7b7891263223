"""Heads taken a few labelled positions at a time, against the same heads on the whole batch at once."""

import functools

import helpers
import jax
import numpy as np
import pytest

from qsharp_jax import train
from qsharp_jax.data.batches import Example, make_packed_batch
from qsharp_jax.train import chunked

V = 11
LM = helpers.random_model(V, seed=5, max_positions=64)


def batch():
    """Rows with many labels, with few, with none, and one of padding; two of them share a row."""
    rng = np.random.default_rng(3)

    def example(prompt, response, **more):
        return Example(rng.integers(1, V, prompt).tolist(), rng.integers(1, V, response).tolist(), **more)

    groups = [
        [example(2, 13, reward=1.0)], [example(9, 4), example(1, 5, reward=1.0, first_label=3)],
        [example(7, 0)], [example(3, 6, reward=1.0, first_label=5)],
    ]  # fmt: skip
    return make_packed_batch(groups, rows=5, width=20)


def guide(**kind):
    made = helpers.random_guide(LM.config, **kind)
    return made.params | {"future": train.init_future(jax.random.key(0), 1, LM.config)}, made.config


CATEGORICAL = dict(distribution="categorical", atoms=(0.0, 0.5, 1.0))
LOSSES = {
    "language model": lambda: (LM.params, functools.partial(train.language_model_loss, config=LM.config)),
    **{
        f"{type} {kind.get('distribution', 'bernoulli')}": lambda type=type, kind=kind: (
            lambda params, config: (
                params, functools.partial(train.value_loss, config=config, future_weight=0.7)
            )
        )(*guide(type=type, **kind))
        for type, kind in [("v", {}), ("q", {}), ("q", CATEGORICAL)]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_loss_metrics_and_gradient_do_not_depend_on_the_parts(name, monkeypatch):
    """One position of each row at a time, with a V-type's narrow head eight; also where no gradient is asked for."""
    params, loss_fn = LOSSES[name]()
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, metrics), gradient = jax.jit(grad_fn)(params, batch())
    monkeypatch.setattr(chunked, "NUMBERS", 40)
    grad_fn = jax.value_and_grad(lambda *arguments: loss_fn(*arguments), has_aux=True)  # a fresh trace
    (in_parts, metrics_in_parts), gradient_in_parts = jax.jit(grad_fn)(params, batch())
    alone, _ = jax.jit(lambda *arguments: loss_fn(*arguments))(params, batch())
    np.testing.assert_allclose([in_parts, alone], [loss] * 2, rtol=1e-6)
    assert set(metrics) == set(metrics_in_parts)
    for key, value in metrics.items():
        np.testing.assert_allclose(metrics_in_parts[key], value, rtol=1e-5, err_msg=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient_in_parts, gradient)


@pytest.mark.parametrize("numbers", [1, 60])
def test_numbers_at_labelled_positions_do_not_depend_on_the_parts(numbers, monkeypatch):
    """One position of each row at a time, or three: the same numbers in their places, the same gradient through them."""
    rng = np.random.default_rng(1)
    hidden, weights = np.float32(rng.normal(size=(4, 17, 6))), np.float32(rng.normal(size=(6,)))
    mask, scale = rng.random((4, 17)) < 0.4, np.float32(rng.normal(size=(4, 17)))
    mask[2] = False

    def loss(weights, hidden):
        def head(weights, hidden, scale):
            return jax.nn.softplus(hidden @ weights) * scale

        found = chunked.at_labeled(head, weights, hidden, scale, mask, width=5)
        return (found * np.arange(17)).sum() ** 2, found

    want = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, hidden)
    np.testing.assert_array_equal(np.asarray(want[0][1])[~mask], 0)
    monkeypatch.setattr(chunked, "NUMBERS", numbers)
    got = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, want)


def test_parts_without_a_label_are_not_computed(monkeypatch):
    """Rows have 3 and 5 labels of 64: five parts of one position are computed, whatever the masked positions hold."""
    monkeypatch.setattr(chunked, "NUMBERS", 1)
    computed = []

    def head(params, hidden, others, mask):
        jax.debug.callback(lambda mask: computed.append(np.asarray(mask)), mask)
        return (hidden.sum(-1) * params * mask).sum(), ()

    rng = np.random.default_rng(0)
    mask = np.zeros((2, 64), bool)
    mask[0, [5, 9, 40]] = mask[1, [0, 7, 8, 62, 63]] = True
    hidden = np.float32(rng.normal(size=(2, 64, 4)))
    total, _ = chunked.labeled_sum(head, 2.0, hidden, (), mask, width=1)
    jax.effects_barrier()
    assert len(computed) == 5 and sum(m.sum() for m in computed) == 8
    np.testing.assert_allclose(total, 2 * hidden[mask].sum(), rtol=1e-5)


def test_a_head_over_a_large_vocabulary_is_never_whole_in_memory(monkeypatch):
    """The step's temporaries are below one array of logits, where they were several."""
    params, config = guide()
    params = params | {"future": jax.ShapeDtypeStruct((1, LM.config.embed, 8192), np.float32)}
    big = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((16, 512), leaf.dtype), batch())
    logits = 4 * 16 * 512 * 8192

    def temporaries():
        loss = functools.partial(train.value_loss, config=config, future_weight=1.0, attend_by="blocks")
        return jax.jit(jax.grad(loss, has_aux=True)).lower(params, big).compile().memory_analysis().temp_size_in_bytes

    assert temporaries() > logits
    monkeypatch.setattr(chunked, "NUMBERS", 1 << 20)
    assert temporaries() < logits / 2
