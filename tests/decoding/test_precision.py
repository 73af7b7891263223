"""Decoding with a cache against teacher forcing: whole passes over every prefix with every candidate, in one dtype.

The figures of benchmarks/RESULTS.md: `python -m pytest -rP tests/decoding/test_precision.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from marks import slow
from numpy_decoder import random_params

from qsharp_jax.decoding import for_decoding, generate
from qsharp_jax.models import cpu_form, decoder, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import Sampling

V, K, N, SAMPLES = 60, 6, 12, 2
SHAPES = {
    "llama": DecoderConfig(
        vocab_size=V, embed=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=96, max_positions=64
    ),
    "gpt2": DecoderConfig(
        vocab_size=V, embed=64, layers=2, heads=4, kv_heads=4, head_dim=16, mlp=128, max_positions=64,
        positions="learned", norm="layer", activation="gelu", bias=True, tied=True,
    ),
}  # fmt: skip
PROMPTS = [[7], [*range(3, 36)], [0, 18, 5], [11, 2, 12, 59, 4, 4, 31, 8, 50, 21, 1]]
ETA = np.repeat([0.1, 0.3, 1.0, 0.1], SAMPLES)

BOUNDS = {"float32": 1e-4, "bfloat16": 0.1}  # nats; of bfloat16 0.069 was measured

forward = jax.jit(decoder.forward, static_argnames="config")
value_forward = jax.jit(value.forward, static_argnames="config")


def models(name, dtype):
    config = dataclasses.replace(SHAPES[name], dtype=dtype)
    guide_config = ValueConfig(config)
    params, guide_params = random_params(0, decoder.init, config), random_params(1, value.init, guide_config)
    params["embedding"] *= 0.5  # unsure of the next token
    guide_params["head"]["kernel"] *= 3  # sure of what comes of it

    def held(tree):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)

    return LanguageModel(held(params), config), ValueModel(held(guide_params), guide_config)


def padded(sequences):
    """Tokens, segments and positions [B, T], padded at the end."""
    tokens, segments = np.zeros((2, len(sequences), max(map(len, sequences))), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)], segments[row, : len(sequence)] = sequence, 1
    return tokens, segments, np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) * segments


def teacher_forced(ref, guide, prompts, responses):
    """Log-probabilities [R, N, V] of the policy and of pi_ref before every token of the responses [R, N]."""
    hidden, _ = forward(ref.params, ref.config, *padded([[*p, *r] for p, r in zip(prompts, responses)]))
    logits = np.asarray(jnp.float32(decoder.logits(ref.params, ref.config, hidden)), np.float64)
    logits = np.stack([row[len(prompt) - 1 :][:N] for row, prompt in zip(logits, prompts)])
    candidates = np.argsort(-logits, axis=-1, kind="stable")[..., :K]
    prefixes = [
        [*prompt, *response[:place], candidate]
        for prompt, response, row in zip(prompts, responses, candidates)
        for place in range(N)
        for candidate in row[place]
    ]
    outputs, _ = value_forward(guide.params, guide.config, *padded(prefixes))
    outputs = np.asarray([row[len(prefix) - 1, 0] for row, prefix in zip(outputs, prefixes)], np.float64)
    p = scipy.special.expit(outputs.reshape(candidates.shape))
    weights = np.log(1 - p + p * np.exp(1 / ETA[:, None, None]))
    tilted = logits.copy()
    np.put_along_axis(tilted, candidates, np.take_along_axis(logits, candidates, -1) + weights, -1)
    return scipy.special.log_softmax(tilted, -1), scipy.special.log_softmax(logits, -1)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", [slow(name) if name == "gpt2" else name for name in SHAPES])
def test_log_probabilities_and_kl_are_those_of_teacher_forcing(name, dtype):
    ref, guide = models(name, dtype)
    sampling = Sampling(eta=ETA, max_new_tokens=N, top_k_candidates=K, others="zero")
    got = generate(ref, guide, PROMPTS, sampling, samples=SAMPLES, rng=0)
    prompts = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]
    policy, ref_policy = teacher_forced(ref, guide, prompts, got.tokens)
    kl = (np.exp(policy) * (policy - ref_policy)).sum(-1)

    def drawn(log_probs):
        return np.take_along_axis(log_probs, got.tokens[..., None], -1)[..., 0]

    errors = {
        "log_probs": got.log_probs - drawn(policy),
        "ref_log_probs": got.ref_log_probs - drawn(ref_policy),
        "kl": got.kl - kl,
    }
    # Where the K-th and the next likeliest token are as good as equal, rounding decides which is a candidate.
    last, next_ = -np.sort(-ref_policy, axis=-1)[..., K - 1 : K + 1].transpose(2, 0, 1)
    clear = last - next_ > BOUNDS[dtype] / 2
    errors = {what: error[clear] for what, error in errors.items()}
    worst = {what: np.abs(error).max() for what, error in errors.items()}
    typical = {what: np.sqrt(np.mean(error**2)) for what, error in errors.items()}
    print(
        name,
        dtype,
        f"{clear.sum()} of {clear.size} tokens:",
        *(f"{what} {worst[what]:.1e} at most, {typical[what]:.1e} typically;" for what in errors),
    )
    assert clear.mean() > 0.5
    assert got.tokens.shape == (8, N) and kl.mean() > 0.1, "the guide steers in this test"
    assert max(worst.values()) <= BOUNDS[dtype]


def test_matrices_of_a_fit_are_cast_once_and_give_what_they_gave():
    """Float32 weights that are computed in bfloat16: norms and the value head stay, and no response changes."""
    ref, guide = models("llama", "float32")
    config = dataclasses.replace(ref.config, dtype="bfloat16")
    ref, guide = ref.replace(config=config), guide.replace(config=guide.config.computed_in("bfloat16"))
    cast = for_decoding(guide)
    layer = cast.params["trunk"]["layers"][0]
    assert {leaf.dtype for leaf in jax.tree.leaves(layer["down"])} == {jnp.dtype("bfloat16")}
    assert layer["mlp_norm"]["scale"].dtype == cast.params["head"]["kernel"].dtype == jnp.float32
    as_fitted = guide.replace(params=value.unstack(guide.params, transposed=cpu_form.here()))
    sampling = Sampling(eta=0.2, max_new_tokens=N, top_k_candidates=K)
    got, want = (generate(ref, model, PROMPTS, sampling, rng=0) for model in (cast, as_fitted))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-5)
