"""The table of leaves: a leaf that is added to it is everywhere."""

import jax
import numpy as np
import pytest
from hf_folders import LLAMA
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from qsharp_jax.models import decoder, hf, leaves, sharding
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.leaves import Leaf, Place


@pytest.mark.parametrize("axes, spec, decays", [(("width",), P(None), False), (("embed", "mlp"), P("fsdp", "tensor"), True)])
def test_one_entry_adds_a_leaf(axes, spec, decays, tmp_path, monkeypatch):
    """Its shape, initial value, sharding, weight decay, and tensor in folders."""
    name = "model.layers.{}.extra.weight"
    entry = Leaf(axes, lambda key, shape, config: jax.numpy.full(shape, 3.0), llama=Place(name))
    monkeypatch.setitem(leaves.BLOCK, "extra/leaf", entry)

    model = LanguageModel(decoder.init(jax.random.key(0), LLAMA), LLAMA)
    leaf = model.params["layers"]["extra"]["leaf"]
    assert leaf.shape == decoder.abstract(LLAMA)["layers"]["extra"]["leaf"].shape
    np.testing.assert_array_equal(leaf, 3.0)

    shardings = sharding.of_model(model, AbstractMesh((2, 1), ("fsdp", "tensor")), sharding.FIT)
    assert shardings.params["layers"]["extra"]["leaf"].spec == P(None, *spec)

    path = next(path for path, _ in jax.tree.leaves_with_path(model) if "extra" in jax.tree_util.keystr(path))
    assert leaves.find(path).decays == decays

    hf.export_ref(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors")[name.format(1)].shape == leaf.shape[1:]
    loaded = hf.load_ref(tmp_path, dtype="float32", unstacked=False)
    np.testing.assert_array_equal(loaded.params["layers"]["extra"]["leaf"], leaf)


def test_a_leaf_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="parameter layers.surprise has no entry in the table; add one to models/leaves.py"):
        jax.tree.map_with_path(lambda path, _: leaves.find(path), {"layers": {"surprise": 1}})
