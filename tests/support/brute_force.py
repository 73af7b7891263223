"""Guided decoding by brute force, in float64 numpy: every candidate scored by a whole pass over its row, no cache.

With the small models, prompts and settings that the tests of `decoding/` have in common.
"""

import dataclasses
import functools

import jax
import numpy as np
import numpy_decoder
import scipy.special

from qsharp_jax import decoding as module
from qsharp_jax import guidance
from qsharp_jax.decoding import RECORDED, api, generate
from qsharp_jax.models import decoder, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import Sampling

V, K, N = 19, 4, 10
STOPS = (2, 5)
ATOMS = (-0.5, 0.0, 1.0)

LLAMA = DecoderConfig(
    vocab_size=V, embed=16, layers=1, heads=4, kv_heads=2, head_dim=4, mlp=24, max_positions=26, rope_theta=100.0
)
GPT2 = DecoderConfig(
    vocab_size=V, embed=24, layers=1, heads=2, kv_heads=2, head_dim=12, mlp=32, max_positions=26, positions="learned",
    norm="layer", activation="gelu", bias=True, tied=True,
)  # fmt: skip
SHIFT = dataclasses.replace(LLAMA, token_shift=True, qkv_bias=True)
DEEP = dataclasses.replace(LLAMA, layers=2)

# What is compiled: reference, guide, mode.
CASES = {
    "v-bernoulli": (DEEP, ValueConfig(SHIFT, "v", "bernoulli"), "qsharp"),
    "v-categorical": (SHIFT, ValueConfig(GPT2, "v", "categorical", ATOMS), "qsharp"),
    "v-scalar": (GPT2, ValueConfig(LLAMA, "v", "scalar"), "qsharp"),
    "q-bernoulli": (SHIFT, ValueConfig(LLAMA, "q", "bernoulli"), "expectation"),
    "q-categorical": (LLAMA, ValueConfig(SHIFT, "q", "categorical", ATOMS), "cd"),
}
TINY = dataclasses.replace(LLAMA, vocab_size=5)
ALL = {**CASES, "tiny": (TINY, ValueConfig(dataclasses.replace(TINY, heads=2), "v", "bernoulli"), "qsharp")}

# Six rows, each with a prompt of its own length and its own settings: one batch of what a caller may mix.
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [0, 18], [11, 2, 12], [4, 4, 4, 4, 4, 4, 4], [8] * 12]
MIXED = dict(
    eta=[0.2, 0.05, np.inf, 0.5, 1.0, 0.1], temperature=[1.0, 0.7, 1.3, 0.0, 1.0, 1.0],
    top_p=[1.0, 0.8, 0.9, 1.0, 1.0, 0.5], top_k=[0, 0, 0, 0, 5, 3], budget=[N, N, N, 6, N, 1],
)  # fmt: skip
COMMON = dict(max_new_tokens=N, stop_ids=STOPS, top_k_candidates=K)


@functools.cache
def models(case):
    """A reference and a guide with random weights, the guide's head included, ready for decoding."""
    ref_config, guide_config, _ = ALL[case]
    ref = LanguageModel(numpy_decoder.random_params(0, decoder.init, ref_config), ref_config)
    guide = ValueModel(numpy_decoder.random_params(1, value.init, guide_config), guide_config)
    guide.params["head"]["kernel"] *= 6  # values all over the range
    return ref, guide


@functools.cache
def decoding_models(case):
    return tuple(map(module.for_decoding, models(case)))


def run(case="v-bernoulli", prompts=PROMPTS, *, guided=True, rng=0, samples=1, record=RECORDED, **changes):
    """`generate` with the models of a case; `changes` are of the fields of `Sampling`."""
    ref, guide = decoding_models(case)
    sampling = Sampling(**{"mode": ALL[case][2], **COMMON, **changes})
    return generate(ref, guide if guided else None, prompts, sampling, rng=rng, samples=samples, record=record)


# --- The same policy, by brute force --------------------------------------------------------------------------------


@functools.cache
def exact_params(case):
    return tuple(numpy_decoder.to_float64(model.params) for model in models(case))


def log_softmax(x):
    x = x - np.max(x)
    return x - np.log(np.sum(np.exp(x)))


def exact_kl(log_pi, log_ref):
    kept = log_pi > -np.inf  # what a policy never does adds nothing
    return np.sum(np.exp(log_pi[kept]) * (log_pi[kept] - log_ref[kept]))


def truncate(log_pi, temperature, top_k, top_p):
    order = np.argsort(-log_pi, kind="stable")
    order = order[: 1 if temperature == 0 else top_k or None]
    if top_p < 1:
        mass = np.cumsum(np.exp(log_pi[order])) / np.exp(log_pi[order]).sum()
        order = order[: np.searchsorted(mass, top_p) + 1]
    kept = np.full(log_pi.shape, -np.inf)
    kept[order] = log_pi[order]
    return log_softmax(kept)


def log_weights(mode, eta, atoms, probs):
    """The log-weights that laws [..., n] add to a logit, [...]."""
    if np.isinf(eta):
        return np.zeros(np.shape(probs)[:-1])
    mean = (probs * atoms).sum(-1)
    return {
        "qsharp": lambda: scipy.special.logsumexp(atoms / eta, b=probs, axis=-1),
        "cd": lambda: mean / eta,
        "expectation": lambda: np.log(mean),
    }[mode]()


def keeps_mass(ref_logits, weights, divisor):
    """The number that, added to all other logits, leaves these tokens with their probability under pi_ref."""
    log_sum = scipy.special.logsumexp
    return divisor * (log_sum((ref_logits + weights) / divisor) - log_sum(ref_logits / divisor))


def policies(
    case, tokens, *, eta=np.inf, temperature=1.0, top_p=1.0, top_k=0, guided=True, k=K, threshold=0.0, others="mass"
):
    """After `tokens`: log-probabilities [V] of the policy, of it truncated, and of pi_ref, and the mean values [V]
    (nan where the guide scored no candidate: those beyond the first k, or less probable than the threshold)."""
    (ref_config, guide_config, mode), (ref, guide) = ALL[case], exact_params(case)
    ref_logits = numpy_decoder.logits(ref, ref_config, numpy_decoder.hidden(ref, ref_config, tokens)[-1])
    logits, means = ref_logits.copy(), np.full(ref_logits.shape, np.nan)
    candidates = np.argsort(-ref_logits, kind="stable")[: k if guided else 0]
    candidates = candidates[np.exp(log_softmax(ref_logits)[candidates]) >= threshold]
    divisor = temperature or 1.0  # greedy is temperature 1, cut to the most probable token
    if len(candidates):
        atoms, probs = numpy_decoder.law(
            guide_config, numpy_decoder.value_outputs(guide, guide_config, tokens, candidates)
        )
        means[candidates] = (probs * atoms).sum(-1)
        scored = log_weights(mode, eta, atoms, probs)
        if others == "mass":
            rest = keeps_mass(ref_logits[candidates], scored, divisor)
        elif others == "zero":
            rest = -np.inf if mode == "expectation" and np.isfinite(eta) else 0.0
        elif guide_config.type == "v":
            rest = log_weights(mode, eta, *law_of_last(case, tokens))[0]
        else:  # one hidden state scores every token
            every = np.arange(len(logits))
            outputs = numpy_decoder.value_outputs(guide, guide_config, tokens, every)
            rest = log_weights(mode, eta, *numpy_decoder.law(guide_config, outputs))
        logits = ref_logits + rest
        logits[candidates] = ref_logits[candidates] + scored
    policy, ref_policy = log_softmax(logits / divisor), log_softmax(ref_logits / divisor)
    return policy, truncate(policy, temperature, top_k, top_p), ref_policy, means


@jax.jit
def draw(seed, step, log_probs):
    key = jax.random.fold_in(jax.random.key(seed), step)
    return guidance.sample(log_probs[None], key[None])[0]


def law_of_last(case, tokens):
    """The guide's law at the last of the tokens: atoms, and probabilities [1, n]."""
    _, guide_config, _ = ALL[case]
    outputs = numpy_decoder.value_outputs(exact_params(case)[1], guide_config, tokens[:-1], tokens[-1:])
    return numpy_decoder.law(guide_config, outputs)


def value_of(case, tokens):
    """The guide's mean at the last of the tokens."""
    atoms, probs = law_of_last(case, tokens)
    return (probs * atoms).sum(-1)[0]


def brute_force(case, prompt, seed, *, budget=N, guided=True, stop_ids=STOPS, **controls):
    """One row of `generate`, each candidate scored by a whole pass over the row's own tokens."""
    response, finished, steps = [], False, []
    while len(response) < budget and not finished:
        so_far = [*prompt, *response]
        policy, truncated, ref_policy, means = policies(case, so_far, guided=guided, **controls)
        token = int(draw(seed, len(response), np.float32(truncated)))
        response.append(token)
        finished = token in stop_ids
        kls = exact_kl(policy, ref_policy), exact_kl(truncated, ref_policy)
        steps.append((policy[token], ref_policy[token], *kls, means[token]))
    log_probs, ref_log_probs, kl, kl_truncated, values = np.array(steps).reshape(-1, 5).T
    if guided:
        # A token that was no candidate gets its value as part of the row; the last one is never seen again, unless by a
        # Q-type, which scores the whole vocabulary from the token before.
        seen_again = len(response) - (ALL[case][1].type == "v")
        for place in np.flatnonzero(np.isnan(values[:seen_again])):
            values[place] = value_of(case, [*prompt, *response[: place + 1]])
    return response, finished, dict(
        log_probs=log_probs, ref_log_probs=ref_log_probs, kl=kl, kl_truncated=kl_truncated, values=values
    )  # fmt: skip


def assert_row_is_brute_force(got, row, want):
    response, finished, arrays = want
    assert got.response(row) == response
    assert (got.lengths[row], got.finished[row]) == (len(response), finished)
    np.testing.assert_array_equal(got.tokens[row, len(response) :], 0)
    for name, exact in arrays.items():
        past = np.nan if name == "values" else 0
        exact = np.append(exact, np.full(N - len(response), past))
        np.testing.assert_allclose(getattr(got, name)[row], exact, atol=1e-4, err_msg=f"{name} of row {row}")


def assert_is_brute_force(got, case, prompts, seeds, controls, **settings):
    for row, prompt in enumerate(prompts):
        mine = {name: np.broadcast_to(x, len(prompts))[row].item() for name, x in controls.items()}
        assert_row_is_brute_force(got, row, brute_force(case, prompt, seeds[row], **mine, **settings))


SEEDS = np.uint32([0, 1, 2, 3, 4, 2**32 - 1])


def end_states(monkeypatch):
    """The loop's last state of each call to `generate` from now on."""
    states = []
    generation = api.Run.generation

    def keep(self, state):
        states.append(jax.device_get(state.replace(ref_cache=None, guide_cache=None)))
        return generation(self, state)

    monkeypatch.setattr(api.Run, "generation", keep)
    return states
