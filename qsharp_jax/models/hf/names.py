"""The tensors of a Hugging Face checkpoint by the paths of our leaves, from the table in `leaves.py`."""

import re
from collections.abc import Mapping

import jax

from qsharp_jax.models import leaves
from qsharp_jax.models.leaves import Leaf, Place

# The base model's name, a prefix that checkpoints of the base model alone lack.
PREFIX = {"gpt2": "transformer.", "llama": "model.", "qwen2": "model.", "qwen3": "model."}

# Buffers that old versions of `transformers`, and GGUF files, have with the weights; they are determined by the config.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|rope_freqs\.weight)$")


def decoder_places(family: str) -> dict[str, Place]:
    """Places of a language model's leaves, in stacked and CPU form, by their paths with "/" between the keys."""
    block, outer = leaves.BLOCK | leaves.TRANSPOSED_BLOCK, leaves.OUTER | leaves.TRANSPOSED_OUTER
    return _places(outer, family) | _places(block, family, "layers/")


def guide_places(family: str, guide_type: str) -> dict[str, Place]:
    """Places of a guide's leaves: a V-type's head is a token classifier's, a Q-type's a language model's."""
    head = leaves.V_HEAD if guide_type == "v" else leaves.Q_HEAD
    return {f"trunk/{path}": place for path, place in decoder_places(family).items()} | _places(head, family)


def _places(table: Mapping[str, Leaf], family: str, prefix: str = "") -> dict[str, Place]:
    places = {path: leaf.gpt2 if family == "gpt2" else leaf.llama for path, leaf in table.items()}
    return {prefix + path: place for path, place in places.items() if place is not None}


def is_buffer(name: str) -> bool:
    """Return true for a tensor known to hold nothing learned."""
    return bool(_BUFFERS.search(name))


def split_layer(path: tuple) -> tuple[str, int | None]:
    """A leaf's path in the tables from its path in a tree, and its layer where the layers are a list."""
    layer = next((key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)), None)
    return "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey)), layer
