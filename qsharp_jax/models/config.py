"""The shape of a decoder as data, with named sizes.

One config class covers GPT-2 (learned positions, LayerNorm, GELU) and Llama's relatives (rotary positions, RMSNorm,
grouped queries, gated feed-forward), whose layers may differ in their window and their rotary positions.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp


class LayerKind(NamedTuple):
    """The part of a layer that may differ from other layers of the same decoder."""

    window: int  # tokens that attention sees, its own included; 0: all
    rope: str  # "main", "window" (its own base, unscaled) or "none"


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
    mlp: int  # hidden width of the feed-forward part, or of each expert
    max_positions: int  # longest sequence, in tokens
    positions: str = "rope"  # "rope" or "learned"
    norm: str = "rms"  # "rms", "rms_plus_one" (its scale is stored minus 1, Gemma) or "layer"
    post_norms: bool = False  # a norm also after attention and after the feed-forward part (Gemma)
    activation: str = "swiglu"  # "swiglu", "geglu" (Gemma) or "gelu"
    bias: bool = False  # biases on every projection (GPT-2)
    qkv_bias: bool = False  # biases on the query, key and value projections (Qwen 2)
    qk_norm: bool = False  # RMSNorm on the heads' queries and keys (Qwen 3)
    query_scalar: float = 0.0  # attention scores are divided by its square root; 0: head_dim (Gemma)
    scaled_embedding: bool = False  # embeddings are multiplied by the square root of their width (Gemma)
    experts: int = 0  # feed-forward networks, of which a router chooses some for each token; 0: no router (Qwen 3 MoE)
    experts_per_token: int = 0  # how many of them the router chooses
    normalized_router: bool = False  # the weights of a token's experts are divided by their sum
    fused: bool = False  # checkpoints have query, key and value, and gate and up, in one matrix each (Phi-3)
    tied: bool = False  # the output head is the embedding's transpose
    # add a learned share of the previous token's embedding to every position's input. With it, a small model learns to
    # follow a graph's edges in tens of steps instead of thousands.
    token_shift: bool = False
    window: int = 0  # tokens that attention sees in the layers of window_layers, its own included; 0: no window
    window_layers: tuple[int, ...] = ()  # indices of layers with the window, from 0
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    window_rope_theta: float = 0.0  # base in the layers of window_layers, without scaling; 0: as the others (Gemma)
    no_rope_layers: tuple[int, ...] = ()  # indices of layers without rotary positions (SmolLM3)
    rope_dims: int = 0  # the first numbers of a head, which are rotated; 0: all of them
    rope_scaling: str = "llama3"  # which wavelengths rope_factor stretches: "llama3" long ones, "linear" all
    rope_factor: float = 1.0  # the factor by which wavelengths are stretched; 1 is no scaling
    # rope_low_freq, rope_high_freq: wavelengths above rope_original_positions / rope_low_freq are stretched by the
    # whole factor, those below rope_original_positions / rope_high_freq not at all, those between partly
    rope_low_freq: float = 1.0
    rope_high_freq: float = 4.0
    rope_original_positions: int = 8192  # the context, in tokens, before the scaling
    norm_eps: float = 1e-5  # added to the variance in the norms
    dtype: str = "float32"  # dtype of the computation, "float32" or "bfloat16"; parameters keep their own
    # weights of decoding, see `quantized.py`: "none", "int8" or "int4"; with the latter keys and values have 8 bits
    quantize: str = "none"

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
        rotated = "rope_dims" if self.rope_dims else "head_dim"
        if self.positions == "rope" and getattr(self, rotated) % 2:
            raise ValueError(f"model.{rotated} is {getattr(self, rotated)}; rotary positions need an even one")
        if not min(self.experts, 1) <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"model.experts_per_token is {self.experts_per_token}; it must be from 1 to model.experts"
                f" ({self.experts}), or 0 without experts"
            )
        if self.experts and (self.activation != "swiglu" or self.bias):
            raise ValueError("model.experts needs model.activation swiglu, and model.bias false")
        if not 0 <= self.rope_dims <= self.head_dim:
            raise ValueError(f"model.rope_dims is {self.rope_dims}; it must be from 0 to model.head_dim")
        if self.window < 0 or self.window == 1 or (self.window == 0) != (not self.window_layers):
            raise ValueError(
                f"model.window is {self.window}; it must be 0 with no model.window_layers, or at least 2 with some"
            )
        if not 0 < self.rope_low_freq < self.rope_high_freq:
            raise ValueError(
                f"model.rope_low_freq ({self.rope_low_freq}) must be above 0 and below model.rope_high_freq"
                f" ({self.rope_high_freq})"
            )

    @property
    def gated(self) -> bool:
        """True if the feed-forward part is gated."""
        return self.activation != "gelu"

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return tuple(self._kind(layer) for layer in range(self.layers))

    def _kind(self, layer: int) -> LayerKind:
        window = self.window if layer in self.window_layers else 0
        if self.positions != "rope" or layer in self.no_rope_layers:
            return LayerKind(window, "none")
        return LayerKind(window, "window" if window and self.window_rope_theta else "main")

    def first_layers(self, count: int) -> "DecoderConfig":
        """Return the config of the decoder that ends after its first `count` layers."""
        windows, no_rope = (tuple(i for i in of if i < count) for of in (self.window_layers, self.no_rope_layers))
        window = self.window if windows else 0
        return dataclasses.replace(self, layers=count, window=window, window_layers=windows, no_rope_layers=no_rope)

    @property
    def compute_dtype(self) -> Any:
        return jnp.dtype(self.dtype)


_AT_LEAST_ONE = (
    "vocab_size", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp", "max_positions", "rope_factor",
    "rope_original_positions",
)  # fmt: skip
_CHOICES = {
    "positions": ("rope", "learned"),
    "norm": ("rms", "rms_plus_one", "layer"),
    "activation": ("swiglu", "geglu", "gelu"),
    "rope_scaling": ("llama3", "linear"),
    "dtype": ("float32", "bfloat16"),
    "quantize": ("none", "int8", "int4"),
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


def _qwen3_moe(embed: int, layers: int, heads: int, kv_heads: int, mlp: int) -> dict:
    moe = dict(kv_heads=kv_heads, experts=128, experts_per_token=8, normalized_router=True)
    return _qwen3(embed, layers, heads, mlp, tied=False) | moe


def _gemma3(embed: int, layers: int, heads: int, mlp: int) -> dict:
    return dict(
        vocab_size=262_144, embed=embed, layers=layers, heads=heads, kv_heads=1, head_dim=256, mlp=mlp,
        max_positions=32_768, norm="rms_plus_one", norm_eps=1e-6, post_norms=True, activation="geglu", qk_norm=True,
        scaled_embedding=True, tied=True, rope_theta=1e6, window=512, window_rope_theta=1e4,
        window_layers=tuple(i for i in range(layers) if (i + 1) % 6),
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
    "qwen3-30b-a3b": _qwen3_moe(2048, 48, 32, 4, 768),
    "qwen3-235b-a22b": _qwen3_moe(4096, 94, 64, 4, 1536),
    "gemma3-270m": _gemma3(640, 18, 4, 2048),
    "gemma3-1b": _gemma3(1152, 26, 4, 6912),
}


def make(size: str, **changes) -> DecoderConfig:
    """The named size with some fields changed; raises a ValueError for an unknown size or field, or a bad value."""
    if size not in SIZES:
        raise ValueError(f"model.size is {size!r}; the named sizes are {', '.join(SIZES)}")
    known = {field.name for field in dataclasses.fields(DecoderConfig)}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"unknown model fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return DecoderConfig(**{**SIZES[size], **changes})
