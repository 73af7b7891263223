"""How many rows a notebook decodes at once."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest
from helpers import random_model

from qsharp_jax import decoding
from qsharp_jax.decoding.checks import OF_FREE
from qsharp_jax.models import memory, quantized
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import Sizes
from qsharp_jax.notebook import generating
from qsharp_jax.sampling import Sampling

WIDTH, VOCABULARY = 64, 128
SAMPLING = Sampling(max_new_tokens=16, prompt_bucket=16, vocab_size=VOCABULARY)


@pytest.mark.parametrize("guides", [0, 1])
def test_a_cpu_s_copies_of_quantized_weights_leave_less_room_for_rows(guides, monkeypatch):
    """Four bytes a weight of the layers and of the head, of each model."""
    model = random_model(VOCABULARY, embed=WIDTH, heads=4, kv_heads=2, head_dim=16, mlp=96, layers=2, max_positions=64)
    small = quantized.model(LanguageModel(model.params, dataclasses.replace(model.config, quantize="int8")))
    copies = (1 + guides) * 4 * (2 * ((2 * WIDTH + 2 * 32) * WIDTH + 3 * WIDTH * 96) + VOCABULARY * WIDTH)
    prompts = [[1] * 10]
    size = decoding.cache_size(10, SAMPLING.max_new_tokens, SAMPLING.prompt_bucket)
    caches = decoding.caches({"reference": small.config, "guide": small.config}, Sizes(1, size))
    of_row = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))

    def rows(ref, free):
        monkeypatch.setattr(memory, "available", lambda device: free)
        return generating.rows_of(SimpleNamespace(ref=ref), ref if guides else None, prompts, SAMPLING, 1000)

    assert rows(small, copies + 4.01 * of_row / OF_FREE) == 4
    assert rows(small, copies + 3.99 * of_row / OF_FREE) == 2
    assert rows(small, 0) == 1
    assert rows(model, 0) == 64, "without copies the rows depend on the device alone"
