"""The optimizer and the learning rate schedule, from the config."""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib

from qsharp_jax.models import leaves
from qsharp_jax.models.decoder import Params

Schedule = Callable[[int], float]  # step -> learning rate, relative to its peak


def make_schedule(config: Any, total_steps: int) -> Schedule:
    """The learning rate relative to its peak: linear warm-up, then constant or cosine to `end_fraction`.

    A line is printed if the training ends before its warm-up does.

    Args:
      config: learning_rate, warmup_steps, schedule, end_fraction.
      total_steps: of the whole training, where a cosine ends.
    """
    if config.warmup_steps >= total_steps > 0:
        print(
            f"the learning rate never reaches {config.learning_rate:g}: warmup_steps is {config.warmup_steps} and the"
            f" training has {total_steps} steps"
        )
    rest = max(total_steps - config.warmup_steps, 1)

    def rate(step: int) -> float:
        if step < config.warmup_steps:
            return step / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        done = min((step - config.warmup_steps) / rest, 1)
        return config.end_fraction + (1 - config.end_fraction) * (1 + math.cos(math.pi * done)) / 2

    return rate


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW, Adafactor, or Muon on the blocks' matrices (AdamW elsewhere), at the peak rate.

    Only matrices have weight decay, not norms, biases and the like. Adafactor (Shazeer and Stern, arXiv 1804.04235)
    stores a row and a column of second moments per matrix instead of AdamW's two numbers per weight.

    Args:
      config: name, learning_rate, adam_learning_rate (Muon's AdamW), weight_decay, b2 (of AdamW), clip.
    """
    if config.name == "adamw":
        rule = optax.adamw(config.learning_rate, b2=config.b2, weight_decay=config.weight_decay, mask=_is_matrix)
    elif config.name == "adafactor":
        # A rate relative to a parameter's size would never change the guide's head, which starts at zero.
        rule = optax.adafactor(
            config.learning_rate,
            multiply_by_parameter_scale=False,
            weight_decay_rate=config.learning_rate * config.weight_decay,
            weight_decay_mask=_is_matrix,
        )
    else:
        # Muon's own AdamW for the rest would decay every leaf, since it has no mask.
        muon = optax.contrib.muon(
            config.learning_rate, weight_decay=config.weight_decay, muon_weight_dimension_numbers=_muon_matrices
        )
        adam = optax.adamw(
            config.adam_learning_rate, b2=config.b2, weight_decay=config.weight_decay, mask=_is_matrix, nesterov=True
        )
        rule = optax.partition({True: muon, False: adam}, _is_block_matrix)
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def _is_matrix(params: Params) -> Params:
    return jax.tree.map_with_path(lambda path, _: leaves.find(path).decays, params)


def _is_block_matrix(params: Params) -> Params:
    def which(path: Any, _: Any) -> bool:
        keys = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return "layers" in keys and keys[-1] == "kernel"

    return jax.tree.map_with_path(which, params)


def _muon_matrices(params: Params) -> Params:
    """Kernels inside the blocks are [L, in, out]: each layer's matrix is orthogonalized separately."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), params)
