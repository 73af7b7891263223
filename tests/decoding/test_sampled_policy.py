"""A policy of its own in the guide's place: its logits are sampled, and what the reference makes of them is exact."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
from brute_force import (
    COMMON,
    DEEP,
    MIXED,
    PROMPTS,
    SEEDS,
    STOPS,
    N,
    V,
    decoding_models,
    draw,
    exact_kl,
    log_softmax,
    models,
    run,
    truncate,
)

from qsharp_jax import decoding as module
from qsharp_jax.decoding import ContinuousBatch, generate
from qsharp_jax.models import decoder
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.sampling import Sampling
from qsharp_jax.system.errors import UserError

CONTROLS = {name: x for name, x in MIXED.items() if name != "eta"}


def policy(seed=5) -> LanguageModel:
    """A policy of the reference's shape with other weights."""
    return LanguageModel(numpy_decoder.random_params(seed, decoder.init, DEEP), DEEP)


def sample(model, prompts=PROMPTS, **changes):
    ref, _ = decoding_models("v-bernoulli")
    return generate(ref, model, prompts, Sampling(**{**COMMON, **CONTROLS, **changes}), rng=SEEDS)


def log_probs(model, tokens, temperature):
    """[V] after `tokens`, by a whole pass in float64 numpy."""
    params = numpy_decoder.to_float64(model.params)
    hidden = numpy_decoder.hidden(params, model.config, tokens)
    return log_softmax(numpy_decoder.logits(params, model.config, hidden[-1]) / (temperature or 1.0))


def test_tokens_log_probabilities_and_kl_are_those_of_whole_passes_of_both_models():
    ref, made = models("v-bernoulli")[0], policy()
    got = sample(made)
    assert np.isnan(got.values).all()
    for row, prompt in enumerate(PROMPTS):
        temperature, top_p, top_k, budget = (CONTROLS[n][row] for n in ("temperature", "top_p", "top_k", "budget"))
        response = []
        while len(response) < budget and not set(response) & set(STOPS):
            place = len(response)
            own, theirs = (log_probs(model, [*prompt, *response], temperature) for model in (made, ref))
            kept = truncate(own, temperature, top_k, top_p)
            token = int(draw(SEEDS[row], place, np.float32(kept)))
            exact = own[token], theirs[token], exact_kl(own, theirs), exact_kl(kept, theirs)
            arrays = (got.log_probs, got.ref_log_probs, got.kl, got.kl_truncated)
            np.testing.assert_allclose([array[row, place] for array in arrays], exact, atol=1e-4)
            response.append(token)
        assert got.response(row) == response
        for array in (got.log_probs, got.ref_log_probs, got.kl, got.kl_truncated):
            np.testing.assert_array_equal(array[row, len(response) :], 0)
    assert got.kl.sum() > 1


def test_the_reference_as_its_own_policy_is_the_reference():
    ref, _ = decoding_models("v-bernoulli")
    got, want = sample(ref), run(guided=False, rng=SEEDS, **CONTROLS)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.log_probs, got.ref_log_probs)
    np.testing.assert_allclose(got.kl, 0, atol=1e-6)


def test_changing_weights_recompile_nothing():
    """Weights are arguments, as stacked arrays of a training or in the form for decoding; eta has no meaning."""
    first = sample(policy(0))
    programs = module.decode._cache_size(), module.prefill._cache_size()
    others = [sample(policy(seed)) for seed in (1, 2)]
    others.append(sample(module.for_decoding(policy(0)), eta=0.1))
    assert (module.decode._cache_size(), module.prefill._cache_size()) == programs
    assert all((first.tokens != other.tokens).any() for other in others[:2])
    np.testing.assert_array_equal(others[2].tokens, first.tokens)


def test_ids_that_pad_the_embedding_are_never_drawn():
    made = policy()
    made = made.replace(params=made.params | {"head": jnp.asarray(made.params["head"]).at[:, -3:].set(1.0)})
    got = sample(made, [[7]] * len(PROMPTS), vocab_size=V - 3)
    assert got.tokens.max() < V - 3 and np.isfinite(got.kl).all()


def test_a_policy_of_another_vocabulary_or_a_shorter_context_is_refused():
    short = policy().replace(config=dataclasses.replace(DEEP, max_positions=20))
    with pytest.raises(UserError, match="prompt 1 has 16 tokens, .* is more than the guide's 20 positions"):
        sample(short, budget=N)
    padded = dataclasses.replace(DEEP, vocab_size=V + 3)
    with pytest.raises(UserError, match=f"the policy has {V + 3} tokens in its embedding, the reference {V}"):
        sample(policy().replace(config=padded))


def test_rows_that_are_refilled_sample_it_alike():
    want, ref = sample(policy()), decoding_models("v-bernoulli")[0]
    for places, part in ContinuousBatch(ref, policy(), PROMPTS, Sampling(**COMMON, **CONTROLS), rows=2, rng=SEEDS):
        np.testing.assert_array_equal(part.tokens, want.tokens[places])
        np.testing.assert_allclose(part.kl_truncated, want.kl_truncated[places], atol=1e-4)
        assert np.isnan(part.values).all()
