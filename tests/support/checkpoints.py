"""A training state, checkpoints of it, and their files."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qsharp_jax.train import TrainState
from qsharp_jax.train.checkpoint import Checkpoints


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


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, place, bit=1):
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def largest(folder):
    return max(files_of(folder), key=lambda path: path.stat().st_size)
