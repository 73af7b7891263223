"""The shape of a decoder as data, with named sizes.

One config class covers GPT-2 (learned positions, LayerNorm, GELU) and Llama/Qwen (rotary positions, RMSNorm, grouped
queries, SwiGLU).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; hashable, so that it can be a static argument of a jitted function."""

    vocab_size: int  # rows of the embedding
    embed: int  # width of the residual stream
    layers: int  # number of blocks
    # heads, kv_heads: query heads, and key/value heads, which divide them
    heads: int
    kv_heads: int
    head_dim: int  # width of one head
    mlp: int  # hidden width of the feed-forward part
    max_positions: int  # longest sequence, in tokens
    positions: str = "rope"  # "rope" or "learned"
    norm: str = "rms"  # "rms" or "layer"
    activation: str = "swiglu"  # "swiglu" or "gelu"
    bias: bool = False  # biases on every projection (GPT-2)
    qkv_bias: bool = False  # biases on the query, key and value projections (Qwen 2)
    qk_norm: bool = False  # RMSNorm on the heads' queries and keys (Qwen 3)
    tied: bool = False  # the output head is the embedding's transpose
    # add a learned share of the previous token's embedding to every position's input. With it, a small model learns to
    # follow a graph's edges in tens of steps instead of thousands.
    token_shift: bool = False
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    # Llama 3.1's rotary scaling: the factor by which long wavelengths are stretched; 1 is no scaling
    rope_factor: float = 1.0
    # rope_low_freq, rope_high_freq: wavelengths above rope_original_positions / rope_low_freq are stretched by the
    # whole factor, those below rope_original_positions / rope_high_freq not at all, those between partly
    rope_low_freq: float = 1.0
    rope_high_freq: float = 4.0
    rope_original_positions: int = 8192  # the context, in tokens, before the scaling
    norm_eps: float = 1e-5  # added to the variance in the norms
    dtype: str = "float32"  # dtype of the computation, "float32" or "bfloat16"; parameters keep their own

    def __post_init__(self):
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"model.{field} is {value!r}; it must be one of {', '.join(allowed)}")
        for field in _AT_LEAST_ONE:
            if not getattr(self, field) >= 1:
                raise ValueError(f"model.{field} is {getattr(self, field)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.heads ({self.heads}) must be a multiple of model.kv_heads ({self.kv_heads})")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; rotary positions need an even one")
        if not 0 < self.rope_low_freq < self.rope_high_freq:
            raise ValueError(
                f"model.rope_low_freq ({self.rope_low_freq}) must be above 0 and below model.rope_high_freq"
                f" ({self.rope_high_freq})"
            )

    @property
    def compute_dtype(self) -> Any:
        return jnp.dtype(self.dtype)


_AT_LEAST_ONE = (
    "vocab_size", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp", "max_positions", "rope_factor",
    "rope_original_positions",
)  # fmt: skip
_CHOICES = {
    "positions": ("rope", "learned"),
    "norm": ("rms", "layer"),
    "activation": ("swiglu", "gelu"),
    "dtype": ("float32", "bfloat16"),
}


def _gpt2(embed: int, layers: int, heads: int) -> dict:
    return dict(
        vocab_size=50_257, embed=embed, layers=layers, heads=heads, kv_heads=heads, head_dim=embed // heads,
        mlp=4 * embed, max_positions=1024, positions="learned", norm="layer", activation="gelu", bias=True, tied=True,
    )  # fmt: skip


def _llama3(embed: int, layers: int, heads: int, head_dim: int, mlp: int, tied: bool = False) -> dict:
    return dict(
        vocab_size=128_256, embed=embed, layers=layers, heads=heads, kv_heads=8, head_dim=head_dim, mlp=mlp,
        max_positions=8192, rope_theta=500_000.0, tied=tied,
    )  # fmt: skip


def _llama31(shape: dict, factor: float) -> dict:
    return shape | dict(max_positions=131_072, rope_factor=factor)


def _qwen25(vocab_size: int, embed: int, layers: int, heads: int, kv_heads: int, mlp: int, tied: bool) -> dict:
    return dict(
        vocab_size=vocab_size, embed=embed, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=128, mlp=mlp,
        max_positions=32_768, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, tied=tied,
    )  # fmt: skip


def _qwen3(embed: int, layers: int, heads: int, mlp: int, tied: bool) -> dict:
    return dict(
        vocab_size=151_936, embed=embed, layers=layers, heads=heads, kv_heads=8, head_dim=128, mlp=mlp,
        max_positions=40_960, rope_theta=1e6, norm_eps=1e-6, qk_norm=True, tied=tied,
    )  # fmt: skip


# Published sizes; "tiny" is the model that the small tasks pre-train.
SIZES = {
    "tiny": dict(vocab_size=128, embed=96, layers=3, heads=4, kv_heads=4, head_dim=24, mlp=128, max_positions=512),
    "gpt2-small": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "llama3-1b": _llama3(2048, 16, 32, 64, 8192, tied=True),
    "llama3-3b": _llama3(3072, 28, 24, 128, 8192, tied=True),
    "llama3-8b": _llama3(4096, 32, 32, 128, 14_336),
    "llama3-70b": _llama3(8192, 80, 64, 128, 28_672),
    "llama3.1-8b": _llama31(_llama3(4096, 32, 32, 128, 14_336), factor=8.0),
    "llama3.1-70b": _llama31(_llama3(8192, 80, 64, 128, 28_672), factor=8.0),
    "llama3.2-1b": _llama31(_llama3(2048, 16, 32, 64, 8192, tied=True), factor=32.0),
    "llama3.2-3b": _llama31(_llama3(3072, 28, 24, 128, 8192, tied=True), factor=32.0),
    "qwen2.5-1.5b": _qwen25(151_936, 1536, 28, 12, 2, 8960, tied=True),
    "qwen2.5-7b": _qwen25(152_064, 3584, 28, 28, 4, 18_944, tied=False),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288, tied=False),
}


def make(size: str, **changes) -> DecoderConfig:
    """The named size with some fields changed; raises a ValueError for an unknown size or field, or a bad value."""
    if size not in SIZES:
        raise ValueError(f"model.size is {size!r}; the named sizes are {', '.join(SIZES)}")
    known = {field.name for field in dataclasses.fields(DecoderConfig)}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"unknown model fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return DecoderConfig(**{**SIZES[size], **changes})
