"""A training that goes on with another number of devices: every leaf bit for bit, and the next batch the next.

The devices are made by a process of its own, which is this file run as a script: XLA reads their number when it starts.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest

from qsharp_jax import sharding, train
from qsharp_jax.checkpoint import Best, Checkpoints
from qsharp_jax.models import config, hf
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.sharding import FIT

MESHES = {1: {}, 2: {"tensor": 2}, 4: {"fsdp": 2, "tensor": 2}, 8: {"data": 2, "fsdp": 2, "tensor": 2}}
STEPS = 3  # of the training on every mesh


# --- In the other process: save on every mesh, restore on every mesh ------------------------------------------------


def model():
    return helpers.random_model(40, layers=2, heads=4, kv_heads=2, head_dim=8)


def batches():
    return helpers.random_examples(np.random.default_rng(0), vocab_size=40, count=48)


def placed_state(devices):
    """A state before the first step, on a mesh."""
    optimizer = train.make_optimizer(helpers.optimizer_config())
    sizes = MESHES[devices]
    ref = model()
    if not sizes:
        return train.init_state(jax.device_put(ref.params, jax.devices()[0]), optimizer)
    mesh = sharding.make_mesh(sizes, FIT, jax.devices()[:devices])
    params = jax.device_put(ref, sharding.of_model(ref, mesh, FIT)).params
    return jax.device_put(train.init_state(params, optimizer), train.state_shardings(params, optimizer))


def digests(tree):
    """Of every leaf's bits, by its path."""
    return {
        jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
