"""The tensors of a Hugging Face checkpoint by the paths of our leaves, from the table in `leaves.py`."""

import re
from collections.abc import Mapping

import jax

from qsharp_jax.models import leaves
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.leaves import Leaf, Place

# Buffers that old versions of `transformers`, and GGUF files, have with the weights; they are determined by the config.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|rope_freqs\.weight)$")


def prefix(family: str) -> str:
    """The base model's name, with which tensors' names begin; checkpoints of the base model alone lack it."""
    return "transformer." if family == "gpt2" else "model."


def decoder_places(family: str, config: DecoderConfig) -> dict[str, Place]:
    """Places of a language model's leaves, in stacked and CPU form, by their paths with "/" between the keys."""
    block, outer = leaves.BLOCK | leaves.TRANSPOSED_BLOCK, leaves.OUTER | leaves.TRANSPOSED_OUTER
    own = leaves.RELATIVES.get(family, {})
    own = own | {path.replace("kernel", "weight"): leaves.flipped(own[path]) for path in own if "kernel" in path}
    places = _places(outer, family) | _places(block, family, "layers/")
    places |= {f"layers/{path}": place for path, place in own.items()}
    sizes = leaves.axis_sizes(config)
    return {path: place.sized(sizes) for path, place in places.items()}


def guide_places(family: str, config: DecoderConfig, guide_type: str) -> dict[str, Place]:
    """Places of a guide's leaves: a V-type's head is a token classifier's, a Q-type's a language model's."""
    head = leaves.V_HEAD if guide_type == "v" else leaves.Q_HEAD
    trunk = {f"trunk/{path}": place for path, place in decoder_places(family, config).items()}
    return trunk | _places(head, family)


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
