"""The value model, or guide: a decoder's trunk with a head that gives the distribution of the reward-to-go.

A V-type guide (the default) reads M outputs at the appended token's own position; a Q-type guide reads M outputs for
each token of the vocabulary at the position before it. `values.py` maps these raw outputs to distributions.
Shapes: B batch, T length, D embed, V vocabulary, M outputs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from qsharp_jax.models import decoder, leaves, precision, quantized
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel, Params


@dataclasses.dataclass(frozen=True)
class ValueConfig:
    """The shape of a value model.

    Attributes:
      trunk: the decoder below the head.
      type: "v" or "q".
      distribution: "bernoulli", "categorical" or "scalar".
      atoms: the categorical's support, ascending rewards; empty for the others.
    """

    trunk: DecoderConfig
    type: str = "v"
    distribution: str = "bernoulli"
    atoms: tuple[float, ...] = ()

    def __post_init__(self):
        if self.type not in ("v", "q"):
            raise ValueError(f"value.type is {self.type!r}; it must be v or q")
        if self.distribution not in ("bernoulli", "categorical", "scalar"):
            raise ValueError(
                f"value.distribution is {self.distribution!r}; it must be bernoulli, categorical or scalar"
            )
        if self.distribution == "categorical" and len(self.atoms) < 2:
            raise ValueError("a categorical guide needs at least two value.atoms")

    @property
    def outputs(self) -> int:
        """M, the number of outputs that parametrize one distribution."""
        return len(self.atoms) if self.distribution == "categorical" else 1

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest reward-to-go that the distribution covers."""
        if self.distribution == "scalar":
            return -math.inf, math.inf
        return (self.atoms[0], self.atoms[-1]) if self.distribution == "categorical" else (0.0, 1.0)

    def computed_in(self, dtype: str | None) -> "ValueConfig":
        """The config of a fit: with another dtype for the trunk's computation, None leaves it; nothing is quantized."""
        trunk = dataclasses.replace(self.trunk, dtype=dtype or self.trunk.dtype, quantize="none")
        return dataclasses.replace(self, trunk=trunk)


class ValueModel(flax.struct.PyTreeNode):
    """Weights {"trunk", "head"} and their shape."""

    params: Params
    config: ValueConfig = flax.struct.field(pytree_node=False)


def trunk(model: ValueModel | LanguageModel) -> LanguageModel:
    """The decoder below a value model's head; a language model is returned unchanged."""
    return LanguageModel(model.params["trunk"], model.config.trunk) if isinstance(model, ValueModel) else model


def each(change: Callable[[Any], Any], models: Any) -> Any:
    """Apply `change` to a model, to each of a tuple of models, or to none (None)."""
    return jax.tree.map(change, models, is_leaf=lambda x: isinstance(x, ValueModel | LanguageModel))


def _head_leaves(config: ValueConfig) -> tuple[dict[str, Any], dict[str, int]]:
    """The head's part of the table of leaves, nested like the parameters, and the lengths of its axes."""
    table = leaves.V_HEAD if config.type == "v" else leaves.Q_HEAD
    outputs = config.outputs * (config.trunk.vocab_size if config.type == "q" else 1)
    return leaves.tree(table, config.trunk), {"embed": config.trunk.embed, "outputs": outputs}


def init(key: jax.Array, config: ValueConfig, trunk: Params | None = None) -> Params:
    """Parameters with a zero head: an untrained guide gives every candidate the same value, so it does not steer.

    The head's kernel is [D, M] with a bias [M] for a V-type, and [D, V * M] without a bias for a Q-type.

    Args:
      trunk: decoder parameters to start from (those of `pi_ref`); by default drawn from `key`.
    """
    table, sizes = _head_leaves(config)
    head = jax.tree.map(lambda leaf: leaf.init(key, leaf.shape(sizes), config.trunk), table)
    trunk = decoder.init(key, config.trunk) if trunk is None else trunk
    return {"trunk": _without_head(trunk)} | head


def abstract(config: ValueConfig, dtype: str = "float32") -> Params:
    """The tree of `init` as `jax.ShapeDtypeStruct` leaves of one dtype."""
    table, sizes = _head_leaves(config)
    head = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape(sizes), jnp.dtype(dtype)), table)
    return {"trunk": _without_head(decoder.abstract(config.trunk, dtype))} | head


def _without_head(trunk: Params) -> Params:
    return {name: leaf for name, leaf in trunk.items() if name != "head"}


def outputs(params: Params, config: ValueConfig, hidden: jax.Array) -> jax.Array:
    """A V-type head's float32 outputs [..., M] from the tokens' own hidden states [..., D]."""
    return quantized.product(hidden, params["head"]["kernel"], jnp.float32) + params["head"]["bias"]


def outputs_at(params: Params, config: ValueConfig, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """A Q-type head's float32 outputs [B, T, M] for some tokens, from the hidden states before them.

    Only these tokens' columns of the head are read.

    Args:
      hidden: [B, T, D], or [B, 1, D] for all the tokens of a row.
      tokens: [B, T] ids.
    """
    shape = (config.trunk.vocab_size, config.outputs)
    kernel = params["head"]["kernel"].reshape(config.trunk.embed, *shape).astype(config.trunk.compute_dtype)
    columns = kernel.transpose(1, 2, 0)[tokens]  # [B, T, M, D]
    hidden = jnp.broadcast_to(hidden, (*tokens.shape, hidden.shape[-1]))
    return jnp.einsum("btd,btmd->btm", hidden, columns, preferred_element_type=jnp.float32)


def outputs_of_all(params: Params, config: ValueConfig, hidden: jax.Array) -> jax.Array:
    """A Q-type head's float32 outputs for the whole vocabulary, [..., V, M], from hidden states [..., D]."""
    outputs = quantized.product(hidden, params["head"]["kernel"], jnp.float32)
    return outputs.reshape(*hidden.shape[:-1], config.trunk.vocab_size, config.outputs)


def forward(
    params: Params, config: ValueConfig, tokens: jax.Array, segments: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The outputs [B, T, M] for every token of whole sequences, and the hidden states [B, T, D], without a gradient.

    Arguments are as in `decoder.forward`. A Q-type's outputs are zero at a segment's first token.
    """
    with precision.of(config.trunk.dtype):
        hidden, _ = decoder.forward(params["trunk"], config.trunk, tokens, segments, positions, attend_by="chunks")
        return read(params, config, read_from(config, hidden, tokens, segments), tokens), hidden


def read_from(config: ValueConfig, hidden: jax.Array, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """The hidden states [B, T, D] that the head reads for every token: its own, or for a Q-type the one before it."""
    if config.type == "v":
        return hidden
    before = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jnp.where(decoder.previous_tokens(tokens, segments)[..., None] >= 0, before, 0)


def read(params: Params, config: ValueConfig, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """Outputs [B, T, M] of tokens, from the hidden states that `read_from` returned for them."""
    return outputs(params, config, hidden) if config.type == "v" else outputs_at(params, config, hidden, tokens)


def unstack(params: Params, *, transposed: bool = False) -> Params:
    """The decoding form, as in `decoder.unstack`; the guide's head is unchanged."""
    return params | {"trunk": decoder.unstack(params["trunk"], transposed=transposed)}
