"""The package in twenty lines: a reference, a guide, and responses that depend on eta."""

import jax
import numpy as np

from qsharp_jax import Sampling
from qsharp_jax.decoding import generate
from qsharp_jax.models import config, decoder, value


def test_a_guide_steers_a_frozen_model():
    shape = config.make("tiny", vocab_size=50)
    ref = decoder.LanguageModel(decoder.init(jax.random.key(0), shape), shape)
    guide_shape = value.ValueConfig(shape, distribution="bernoulli")
    guide = value.ValueModel(value.init(jax.random.key(1), guide_shape, ref.params), guide_shape)
    guide.params["head"]["kernel"] = jax.random.normal(jax.random.key(2), guide.params["head"]["kernel"].shape)

    sampling = Sampling(eta=np.array([0.1, np.inf]), max_new_tokens=8, stop_ids=[2])
    generation = generate(ref, guide, [[1, 5, 7], [1, 5, 7]], sampling, rng=0)

    guided, unguided = generation.kl.sum(1)  # exact KL to the reference per response, in nats
    assert guided > 0 and unguided == 0
    assert all(token < 50 for token in generation.response(0))
