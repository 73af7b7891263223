"""Memory is counted before it is taken."""

import jax
import numpy as np
import pytest

from qsharp_jax.models import memory
from qsharp_jax.system.errors import UserError

MODEL = {"kernel": jax.ShapeDtypeStruct((1000, 500), "float32"), "bias": jax.ShapeDtypeStruct((500,), "bfloat16")}
CACHE = [jax.ShapeDtypeStruct((250, 1000), "bfloat16")] * 2
NEEDED = 2_001_000 + 1_000_000


def test_all_parts_together_must_fit_where_a_device_says_what_it_has(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: None)
    memory.check_memory({"the weights": [jax.ShapeDtypeStruct((10**9, 10**9), "float32")]})
    monkeypatch.setattr(memory, "available", lambda device: NEEDED)
    memory.check_memory({"the weights": MODEL, "the cache": CACHE})
    monkeypatch.setattr(memory, "available", lambda device: NEEDED - 1)
    monkeypatch.setattr(memory, "GB", 1e6)
    words = "has 3.00 GB of memory free, and the weights 2.00 GB and the cache 1.00 GB are needed on it; use bfloat16"
    with pytest.raises(UserError, match=words):
        memory.check_memory({"the weights": MODEL, "the cache": CACHE})


def test_a_sharded_array_takes_its_share_of_each_device(monkeypatch):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))
    monkeypatch.setattr(memory, "available", lambda device: 4000)
    memory.check_memory({"the weights": jax.ShapeDtypeStruct((1000,), "float32", sharding=sharding)})
    with pytest.raises(UserError, match="0.00 GB of memory free"):
        memory.check_memory({"the weights": jax.ShapeDtypeStruct((1001,), "float32", sharding=sharding)})


def test_this_machine_says_what_it_has():
    free = memory.available(jax.devices()[0])
    assert free is None or 2**20 < free < 2**50
