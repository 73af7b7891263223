"""The value model: what its heads read and where, against float64 numpy."""

import jax
import numpy as np
import numpy_decoder
import pytest

from qsharp_jax.models import decoder, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.value import ValueConfig

TRUNK = DecoderConfig(
    vocab_size=11, embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=24, max_positions=32, token_shift=True
)
ATOMS = (-0.5, 0.0, 2.0)
BERNOULLI, CATEGORICAL = dict(distribution="bernoulli"), dict(distribution="categorical", atoms=ATOMS)
HEADS = {
    "v-bernoulli": ValueConfig(TRUNK, "v", **BERNOULLI),
    "v-categorical": ValueConfig(TRUNK, "v", **CATEGORICAL),
    "q-bernoulli": ValueConfig(TRUNK, "q", **BERNOULLI),
    "q-categorical": ValueConfig(TRUNK, "q", **CATEGORICAL),
}
# Behind padding, and alone.
SEGMENTS = np.array([[0] * 3 + [1] * 4, [1] * 7])
POSITIONS = np.array([[0] * 3 + [*range(4)], [*range(7)]])
TOKENS = np.random.default_rng(0).integers(0, 11, SEGMENTS.shape)

forward = jax.jit(value.forward, static_argnames="config")


every_head = pytest.mark.parametrize("config", HEADS.values(), ids=HEADS.keys())


@every_head
def test_every_token_gets_the_outputs_for_it_given_the_tokens_before_it(config):
    params = numpy_decoder.random_params(0, value.init, config)
    outputs, hidden = forward(params, config, TOKENS, SEGMENTS, POSITIONS)
    assert outputs.shape == (*TOKENS.shape, config.outputs) and hidden.shape == (*TOKENS.shape, TRUNK.embed)
    exact = numpy_decoder.to_float64(params)
    for row in range(len(TOKENS)):
        tokens = TOKENS[row][SEGMENTS[row] > 0]
        first = TOKENS.shape[1] - len(tokens)
        np.testing.assert_allclose(hidden[row, first:], numpy_decoder.hidden(exact["trunk"], TRUNK, tokens), atol=1e-4)
        for place in range(1, len(tokens)):  # before a sequence's first token a Q-type has nothing to read
            want = numpy_decoder.value_outputs(exact, config, tokens[:place], tokens[place : place + 1])
            np.testing.assert_allclose(outputs[row, first + place], want[0], atol=1e-4)


@every_head
def test_an_untrained_guide_gives_zeros_whatever_its_trunk(config):
    trunk = numpy_decoder.random_params(0, decoder.init, TRUNK)
    params = value.init(jax.random.key(0), config, trunk)
    np.testing.assert_array_equal(forward(params, config, TOKENS, SEGMENTS, POSITIONS)[0], 0)
    width = config.outputs * (TRUNK.vocab_size if config.type == "q" else 1)
    assert params["head"]["kernel"].shape == (TRUNK.embed, width)


def test_a_guide_from_pi_ref_takes_all_its_weights_but_the_output_head():
    ref = numpy_decoder.random_params(0, decoder.init, TRUNK)
    params = value.init(jax.random.key(0), HEADS["v-bernoulli"], ref)
    assert set(ref) - set(params["trunk"]) == {"head"} and set(params["trunk"]) <= set(ref)
    for name, tree in params["trunk"].items():
        jax.tree.map(np.testing.assert_array_equal, tree, ref[name])
    assert "head" in ref, "the reference itself is left as it was"


@every_head
def test_a_guide_from_scratch_has_the_tree_of_one_from_pi_ref_and_the_abstract_one(config):
    ref = decoder.abstract(TRUNK)
    scratch = jax.eval_shape(lambda key: value.init(key, config), jax.random.key(0))
    from_ref = jax.eval_shape(lambda key, trunk: value.init(key, config, trunk), jax.random.key(0), ref)
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (scratch, from_ref, value.abstract(config))]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("name", ["q-bernoulli", "q-categorical"])
def test_some_tokens_of_a_q_type_are_columns_of_the_full_product(name):
    config = HEADS[name]
    params = numpy_decoder.random_params(0, value.init, config)
    hidden = np.float32(np.random.default_rng(1).normal(size=(2, 5, TRUNK.embed)))
    assert set(params["head"]) == {"kernel"}, "a causal language model's head has no bias"
    full = hidden @ np.asarray(params["head"]["kernel"])
    full = full.reshape(2, 5, TRUNK.vocab_size, config.outputs)

    tokens = np.random.default_rng(2).integers(0, TRUNK.vocab_size, (2, 5))
    got = value.outputs_at(params, config, hidden, tokens)
    np.testing.assert_allclose(got, np.take_along_axis(full, tokens[..., None, None], 2)[:, :, 0], atol=1e-5)

    many = np.stack([np.random.default_rng(row).permutation(TRUNK.vocab_size)[:4] for row in range(2)])
    got = value.outputs_at(params, config, hidden[:, :1], many)  # one hidden state for all the tokens of a row
    np.testing.assert_allclose(got, [full[row, 0, many[row]] for row in range(2)], atol=1e-5)
