"""LoRA on a guide: what it computes, what it learns, what it leaves alone, and what comes out of it."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import train
from qsharp_jax.algorithms import qsharp
from qsharp_jax.data.batches import make_batch
from qsharp_jax.data.records import Rollout, Rollouts
from qsharp_jax.models import lora
from qsharp_jax.run import models

V, RANK, ALPHA = 11, 3, 6.0
GUIDE = helpers.random_guide(helpers.random_model(V, seed=5, layers=2, qkv_bias=True).config)
BATCH = make_batch(helpers.random_examples(np.random.default_rng(1)), rows=5, width=10)


@functools.cache
def loss_and_gradient(remat="dots"):
    loss = functools.partial(train.value_loss, config=GUIDE.config, batch=BATCH, remat=remat)
    return jax.jit(jax.value_and_grad(lambda params: loss(params)[0]))


def with_lora(learned=True):
    """A guide with a LoRA; `learned`: B is not zero any more."""
    params = lora.add(jax.random.key(0), GUIDE.params, RANK, ALPHA)

    def draw(path, leaf):
        if learned and path[-1].key == "lora_b":
            return jax.random.normal(jax.random.key(len(str(path))), leaf.shape) * 0.2
        return leaf

    return jax.tree.map_with_path(draw, params)


def test_at_first_the_guide_is_the_one_below_and_merged_it_is_the_same():
    first = with_lora(learned=False)
    np.testing.assert_array_equal(loss_and_gradient()(first)[0], loss_and_gradient()(GUIDE.params)[0])
    helpers.assert_trees_equal(lora.merged(first), GUIDE.params)
    loss, _ = loss_and_gradient()(with_lora())
    merged = lora.merged(with_lora())
    assert jax.tree.structure(merged) == jax.tree.structure(GUIDE.params)
    np.testing.assert_allclose(loss_and_gradient()(merged)[0], loss, rtol=1e-6)
    assert abs(loss - loss_and_gradient()(GUIDE.params)[0]) > 1e-3


def test_it_is_merged_in_float32_on_every_device():
    products = str(jax.make_jaxpr(lora.merged)(with_lora()))
    assert products.count("dot_general") == products.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


@pytest.mark.parametrize("remat", ["dots", "none"])
def test_the_gradient_is_that_of_the_whole_kernel_projected(remat):
    """dA = scale * dW B^T and dB = scale * A^T dW, with dW of the merged guide."""
    params = with_lora()
    _, gradient = loss_and_gradient(remat)(params)
    _, dense = loss_and_gradient(remat)(lora.merged(params))
    for name in ("query", "value", "output", "gate", "down"):
        layers, of_lora = params["trunk"]["layers"][name], gradient["trunk"]["layers"][name]
        whole = np.float64(dense["trunk"]["layers"][name]["kernel"]) * ALPHA / RANK
        of_a = np.einsum("ldn,lrn->ldr", whole, np.float64(layers["lora_b"]))
        of_b = np.einsum("ldr,ldn->lrn", np.float64(layers["lora_a"]), whole)
        np.testing.assert_allclose(of_lora["lora_a"], of_a, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(of_lora["lora_b"], of_b, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(gradient["head"]["kernel"], dense["head"]["kernel"], atol=1e-6)


def test_split_and_join_are_inverse():
    params = with_lora()
    learned, frozen = lora.split(params)
    names = {path[-1].key for path, _ in jax.tree.leaves_with_path(learned["trunk"])}
    assert names == {"lora_a", "lora_b"} and set(learned) == {"trunk", "head"} and set(frozen) == {"trunk"}
    helpers.assert_trees_equal(lora.join(learned, frozen), params)


def test_steps_change_what_is_learned_alone_and_moments_are_of_it_alone():
    learned, frozen = lora.split(lora.add(jax.random.key(0), GUIDE.params, RANK, ALPHA))
    optimizer = train.make_optimizer(helpers.optimizer_config())
    state = train.init_state(learned, optimizer, frozen)
    loss_fn = functools.partial(train.value_loss, config=GUIDE.config)
    step = jax.jit(functools.partial(train.train_step, loss_fn=loss_fn, optimizer=optimizer))
    first = None
    for _ in range(3):
        state, metrics = step(state, BATCH, np.float32(1))
        first = first or float(metrics["loss"])
    assert metrics["loss"] < first
    helpers.assert_trees_equal(state.frozen, frozen)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, learned)
    assert min(jax.tree.leaves(moved)) > 0
    size = sum(leaf.size for leaf in jax.tree.leaves(learned))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * size


def test_no_gradient_of_a_kernel_s_size_is_made():
    """The compiled gradient's temporaries: of wide kernels, far less than those kernels."""
    guide = helpers.random_guide(helpers.random_model(V, layers=2, mlp=2048).config)
    learned, frozen = lora.split(lora.add(jax.random.key(0), guide.params, 1, 1.0))
    # With more rows, or activations kept, these would be most of it.
    batch = jax.tree.map(lambda x: x[:2], BATCH)
    loss_fn = functools.partial(train.value_loss, config=guide.config, batch=batch, remat="full")
    gradient = jax.jit(jax.grad(lambda learned, frozen: loss_fn(lora.join(learned, frozen))[0]))
    whole = jax.jit(jax.grad(lambda params: loss_fn(params)[0]))

    def bytes_of(compiled):
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    kernels = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    assert bytes_of(whole.lower(guide.params).compile()) > kernels
    assert bytes_of(gradient.lower(learned, frozen).compile()) < 0.8 * bytes_of(whole.lower(guide.params).compile())


def test_a_fit_with_lora_ends_in_an_ordinary_guide_and_resumes(tmp_path):
    """Two rounds: the second starts from the first's merged guide; typed again, nothing is fitted anew."""
    session = helpers.session(tmp_path, "fit.lora_rank=2", "fit.epochs=3", "fit.holdout=0", "rounds=2")
    ref = helpers.random_model(models.tokenizer(session).vocab_size)
    rng = np.random.default_rng(0)
    data = Rollouts.of(
        Rollout(f"{i}", 1, rng.integers(5, 9, 4).tolist(), rng.integers(5, 9, 3).tolist(), 0, i % 2, True, 1.0, 0, "")
        for i in range(16)
    )  # fmt: skip
    guide = qsharp.fit(session, 1, ref, data, None)
    loaded = models.load_guide(session, 1)
    helpers.assert_trees_equal(loaded.params, guide.params)
    started = models.first_guide(session, ref)
    assert jax.tree.structure(guide.params) == jax.tree.structure(started)
    assert not np.array_equal(
        guide.params["trunk"]["layers"]["up"]["kernel"], started["trunk"]["layers"]["up"]["kernel"]
    )
    helpers.assert_trees_equal(guide.params["trunk"]["embedding"], started["trunk"]["embedding"])
    second = qsharp.fit(session, 2, ref, data, guide)
    helpers.assert_trees_equal(qsharp.fit(session, 2, ref, data, guide).params, second.params)
    helpers.assert_trees_equal(second.params["trunk"]["embedding"], guide.params["trunk"]["embedding"])
