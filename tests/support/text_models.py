"""A random reference and guide for the tokenizer of `bpe.py`, their embeddings padded to different sizes."""

import bpe
import helpers
import numpy_decoder

from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.models import decoder, value
from qsharp_jax.models.config import make
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel

SHAPE = helpers.TINY | dict(max_positions=64)
USED = Tokenizer(bpe.make()).vocab_size


def make_ref() -> LanguageModel:
    config = make("tiny", **SHAPE, vocab_size=320)
    params = numpy_decoder.random_params(1, decoder.init, config)
    padding = params["head"][:, :USED].sum(1, keepdims=True) * 100 + 50
    return LanguageModel(params | {"head": params["head"].at[:, USED:].set(padding)}, config)


def make_guide() -> ValueModel:
    config = ValueConfig(make("tiny", **SHAPE, vocab_size=304))
    return ValueModel(numpy_decoder.random_params(2, value.init, config), config)
