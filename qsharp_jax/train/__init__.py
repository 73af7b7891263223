"""Training: one state, one jitted step, one loop, for language models, guides and policies."""

from qsharp_jax.models.decoder import Params
from qsharp_jax.train.loop import AGREE_EVERY, Loop, Trainer, fit, told_to_stop, training
from qsharp_jax.train.losses import (
    Error,
    Targets,
    check_rewards,
    future_token_loss,
    init_future,
    language_model_loss,
    value_loss,
)
from qsharp_jax.train.optimizer import Schedule, make_optimizer, make_schedule
from qsharp_jax.train.step import LossFn, TrainState, init_state, state_shardings, train_step
from qsharp_jax.train.throughput import Flops, guide_flops, language_model_flops

__all__ = [
    "AGREE_EVERY",
    "Error",
    "Flops",
    "Loop",
    "LossFn",
    "Params",
    "Schedule",
    "Targets",
    "TrainState",
    "Trainer",
    "check_rewards",
    "fit",
    "future_token_loss",
    "guide_flops",
    "init_future",
    "init_state",
    "language_model_flops",
    "language_model_loss",
    "make_optimizer",
    "make_schedule",
    "state_shardings",
    "told_to_stop",
    "train_step",
    "training",
    "value_loss",
]
