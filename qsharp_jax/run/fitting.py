"""Settings of a run with the user's own model that fit the model's size and the device."""

import jax
import numpy as np
from ml_collections import ConfigDict

from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.decoding import cache_size, rows_that_fit
from qsharp_jax.models import decoder, hf, memory
from qsharp_jax.run import models

PROMPT = 256  # tokens of a prompt for which the rows are counted
LEARNING_RATES = ((0.3e9, 1e-4), (1e9, 5e-5), (np.inf, 2e-5))  # of AdamW, up to so many weights


def fitting(config: ConfigDict) -> dict[str, object]:
    """Return the settings that fit the reference's size and the default device, by key."""
    ref = models.folder(config, "ref")
    shape = hf.read_config(ref, "float32")
    on_cpu = memory.default_device().platform == "cpu"
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(decoder.abstract(shape)))
    rows = rows_that_fit([shape, shape], cache_size(PROMPT, config.generate.max_new_tokens, 32))
    chat = Tokenizer.load(ref).hf_tokenizer.chat_template
    return {
        "dtype": "float32" if on_cpu else "bfloat16",
        "prompt_format": "chat" if chat else "plain",
        "collect.batch_size": rows,
        "evaluate.batch_size": rows,
        "fit.accumulate": 4 if on_cpu else 1,
        "fit.optimizer.learning_rate": next(rate for most, rate in LEARNING_RATES if count < most),
        "generate.top_k_candidates": 20,
    }
