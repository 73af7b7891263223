"""Small configs of every family, random models of them, and the messages of refusals."""

import dataclasses

from helpers import refusal
from numpy_decoder import random_params

from qsharp_jax.models import decoder, hf, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel

LLAMA = DecoderConfig(
    vocab_size=23, embed=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp=20, max_positions=32, rope_theta=100.0
)
TIED = dataclasses.replace(LLAMA, tied=True)
GPT2 = DecoderConfig(
    vocab_size=23, embed=16, layers=2, heads=4, kv_heads=4, head_dim=4, mlp=20, max_positions=32, positions="learned",
    norm="layer", activation="gelu", bias=True, tied=True,
)  # fmt: skip
UNTIED_GPT2 = dataclasses.replace(GPT2, tied=False)
QWEN2 = dataclasses.replace(LLAMA, qkv_bias=True)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True)
GEMMA = dataclasses.replace(
    LLAMA, norm="rms_plus_one", activation="geglu", qk_norm=True, post_norms=True, scaled_embedding=True, window=8,
    window_layers=(0,), window_rope_theta=10.0, query_scalar=5.0,
)  # fmt: skip
QWEN3_MOE = dataclasses.replace(QWEN3, experts=6, experts_per_token=2, normalized_router=True)
PHI3 = dataclasses.replace(LLAMA, fused=True, rope_dims=4)
CONFIGS = {
    "llama": LLAMA, "llama-tied": TIED, "gpt2": UNTIED_GPT2, "gpt2-tied": GPT2, "qwen2": QWEN2, "qwen3": QWEN3,
    "mistral": dataclasses.replace(LLAMA, heads=3, kv_heads=3), "gemma3_text": GEMMA, "phi3": PHI3,
    "qwen3_moe": QWEN3_MOE,
}  # fmt: skip


def ref(config=LLAMA):
    return LanguageModel(random_params(0, decoder.init, config), config)


def guide(trunk=LLAMA, **changes):
    config = ValueConfig(trunk, **changes)
    return ValueModel(random_params(0, value.init, config), config)


def load_refusal(folder, load=hf.load_ref):
    message = refusal(load, folder, dtype="float32")
    assert str(folder) in message
    assert message.count(". ") == 0 and "\n" not in message, "one sentence"
    return message
