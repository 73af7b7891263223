"""Guided decoding against PyTorch's `transformers`, which scores every candidate by a pass over the whole sequence."""

import numpy as np
import pytest
import transformers
from numpy_decoder import random_params

from qsharp_jax.decoding import generate
from qsharp_jax.models import decoder, hf, value
from qsharp_jax.models.config import make
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import Sampling

torch = pytest.importorskip("torch", reason="parity is judged by PyTorch, which the test extra installs")

V, K, N = 40, 5, 6
SHAPE = dict(vocab_size=V, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, max_positions=64)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [11, 12, 13]]
ETA = (0.1, 0.5, 2.0)


@pytest.fixture(scope="module")
def models():
    ref_config, guide_config = make("tiny", **SHAPE, tied=True), ValueConfig(make("tiny", **SHAPE, qkv_bias=True))
    params = random_params(0, decoder.init, ref_config)
    ref = LanguageModel(params | {"embedding": 0.3 * params["embedding"]}, ref_config)  # unsure of the next token
    guide = ValueModel(random_params(1, value.init, guide_config), guide_config)
    return ref, guide


@pytest.fixture(scope="module")
def in_torch(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    hf.export_ref(models[0], folder / "ref")
    hf.export_guide(models[1], folder / "guide")
    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "ref").eval(),
        transformers.AutoModelForTokenClassification.from_pretrained(folder / "guide").eval(),
    )


@torch.inference_mode()
def step(ref, guide, tokens, eta):
    """Log-probabilities [V] of the guided policy and of pi_ref after `tokens`, and the values of the candidates."""
    logits = ref(torch.tensor([tokens])).logits[0, -1].double()
    candidates = logits.topk(K).indices
    outputs = guide(torch.tensor([[*tokens, candidate] for candidate in candidates.tolist()])).logits[:, -1, 0].double()
    p = torch.sigmoid(outputs)
    tilted = logits.clone()
    tilted[candidates] += torch.log(1 - p + p * torch.exp(torch.tensor(1 / eta, dtype=torch.float64)))
    return tilted.log_softmax(-1), logits.log_softmax(-1), dict(zip(candidates.tolist(), p.tolist()))


def test_every_step_is_that_of_two_full_passes_in_pytorch(models, in_torch):
    """The policy's and pi_ref's log-probability of every token that was drawn, the KL, and the guide's values."""
    rows, samples = len(PROMPTS), 4
    eta = np.repeat(ETA, samples)
    sampling = Sampling(eta=eta, max_new_tokens=N, top_k_candidates=K, others="zero")
    got = generate(*models, PROMPTS, sampling, samples=samples, rng=0)
    for row in range(rows * samples):
        response = got.response(row)
        for place, token in enumerate(response):
            tokens = [*PROMPTS[row // samples], *response[:place]]
            policy, ref, values = step(*in_torch, tokens, float(eta[row]))
            np.testing.assert_allclose(got.log_probs[row, place], policy[token], atol=1e-4)
            np.testing.assert_allclose(got.ref_log_probs[row, place], ref[token], atol=1e-4)
            np.testing.assert_allclose(got.kl[row, place], (policy.exp() * (policy - ref)).sum(), atol=1e-4)
            if token in values:
                np.testing.assert_allclose(got.values[row, place], values[token], atol=1e-4)
    assert len({tuple(got.response(row)) for row in range(rows * samples)}) > 6
