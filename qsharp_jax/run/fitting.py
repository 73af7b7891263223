"""Settings of a run with the user's own model that fit the model's size, the prompts and the device."""

import math
from pathlib import Path

import jax
from ml_collections import ConfigDict

from qsharp_jax.decoding import cache_size, rows_that_fit
from qsharp_jax.models import decoder, hf, memory
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.run import problems, sources
from qsharp_jax.run.config import trains_policy
from qsharp_jax.run.folders import load_tokenizer
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir

# Peak learning rates of AdamW, up to so many weights: of a guide, and of a policy, which learns from rewards instead of
# labels. The first of guides and the second of policies were measured: benchmarks/RESULTS.md.
GUIDE_LEARNING_RATES = ((0.1e9, 1e-3), (0.3e9, 3e-4), (1e9, 5e-5), (math.inf, 2e-5))
POLICY_LEARNING_RATES = ((0.1e9, 1e-4), (0.3e9, 3e-5), (1e9, 1e-5), (math.inf, 2e-6))
LEAST_PACK, PACK_STEP = 256, 64  # tokens
LEAST_LAYERS = 4  # of a guide on a CPU


def fitting(config: ConfigDict) -> dict[str, object]:
    """Return the settings that fit the reference's size, the longest prompt and the default device, by key.

    Raises:
      UserError: for prompts that cannot be read.
    """
    on_cpu = memory.default_device().platform == "cpu"
    ref = sources.folder(config, "ref")
    shape = hf.read_config(ref, "float32")
    is_policy = trains_policy(config)
    learner, layers = (shape, 0) if is_policy else _guide(config, shape, on_cpu)
    tokenizer = load_tokenizer(ref, prompt_format=None)
    session = Session(Workdir(Path(), config))
    prompts = [p.prompt for p in problems.all_train_problems(session) + problems.test_problems(session)]
    longest = max(len(tokenizer.encode_prompt(prompt)) for prompt in prompts)
    new = config.generate.max_new_tokens
    rows = rows_that_fit([shape, learner], cache_size(longest, new, config.generate.prompt_bucket))
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(decoder.abstract(learner)))
    section, rates = ("policy", POLICY_LEARNING_RATES) if is_policy else ("fit", GUIDE_LEARNING_RATES)
    packed = {
        "fit.pack_length": max(LEAST_PACK, -(-(longest + new) // PACK_STEP) * PACK_STEP),
        "fit.batch_size": 8 if on_cpu else 32,
    }
    return {
        "dtype": "float32" if on_cpu else "bfloat16",
        "prompt_format": tokenizer.prompt_format,
        "value.layers": layers,
        "collect.batch_size": rows,
        "evaluate.batch_size": rows,
        **({} if is_policy else packed),
        f"{section}.optimizer.learning_rate": next(rate for most, rate in rates if weights < most),
        "generate.top_k_candidates": 20,
    }


def _guide(config: ConfigDict, ref: DecoderConfig, on_cpu: bool) -> tuple[DecoderConfig, int]:
    """Return the shape of the guide's trunk and the setting `value.layers`; on a CPU a sixth of the reference's layers.

    A guide costs a CPU as much as it has weights; elsewhere decoding waits for the memory of the reference.
    """
    if start := sources.folder(config, "guide"):
        return hf.read_config(start, "float32"), config.value.layers
    layers = config.value.layers or (max(LEAST_LAYERS, ref.layers // 6) if on_cpu else 0)
    return (ref, 0) if layers == 0 or layers >= ref.layers else (ref.first_layers(layers), layers)
