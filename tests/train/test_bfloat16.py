"""A fit with bfloat16 products: what stays float32, and that it learns as the float32 one does."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import train
from qsharp_jax.data.batches import Batches, Example

V, STEPS = 11, 40
GUIDE = helpers.random_guide(helpers.random_model(V, seed=5, layers=2).config)
HALF = GUIDE.config.computed_in("bfloat16")


def batches():
    """The reward is whether the first response token is the prompt's: learned in some tens of steps."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, V, 4).tolist() for _ in range(256)]
    examples = [Example(row[:1], row[1:], reward=float(row[0] < row[1])) for row in rows]
    return Batches(examples, rows=64, bucket=8, seed=0)


def curve(config):
    """Losses of a fit, and its last state."""
    optimizer = train.make_optimizer(helpers.optimizer_config(learning_rate=0.003))
    step = functools.partial(
        train.train_step, loss_fn=functools.partial(train.value_loss, config=config), optimizer=optimizer
    )
    step, state, data, losses = jax.jit(step), train.init_state(GUIDE.params, optimizer), batches(), []
    for number in range(STEPS):
        state, metrics = step(state, data[number], np.float32(1))
        losses.append(metrics["loss"])
        assert metrics["loss"].dtype == jnp.float32
    return np.asarray(losses), state


def test_weights_moments_and_gradients_are_float32_and_the_products_are_not():
    loss_fn = functools.partial(train.value_loss, config=HALF)
    gradient = jax.eval_shape(jax.grad(loss_fn, has_aux=True), GUIDE.params, batches()[0])[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    text = str(jax.make_jaxpr(jax.grad(loss_fn, has_aux=True))(GUIDE.params, batches()[0]))
    products = [line.split(" = ")[0] for line in text.splitlines() if "dot_general" in line and "=" in line]
    # The kernels' gradients come out of their products in float32: no bfloat16 [D, N] is there to be rounded.
    embed, mlp = GUIDE.config.trunk.embed, GUIDE.config.trunk.mlp
    assert any(f"f32[{embed},{mlp}]" in product for product in products)
    assert not any(f"bf16[{embed},{mlp}]" in product for product in products)
    assert any("bf16[" in product for product in products)


def test_the_loss_follows_that_of_float32():
    """Within 0.005 nats in the first ten steps, before rounding has had time to grow, and 0.02 on average over all."""
    (exact, _), (half, state) = curve(GUIDE.config), curve(HALF)
    assert exact[:4].mean() - exact[-4:].mean() > 0.3
    assert np.abs(half - exact)[:10].max() < 0.005
    assert np.abs(half - exact).mean() < 0.02
    floats = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.dtype.kind == "f"]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
