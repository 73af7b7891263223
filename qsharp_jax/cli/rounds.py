"""Checks of `collect` and `fit`, the separate steps of a round."""

from ml_collections import ConfigDict

from qsharp_jax.run.config import trains_policy
from qsharp_jax.system.errors import UserError


def check_separate_steps(config: ConfigDict) -> None:
    """Raise a UserError if the run's algorithm trains a policy, which does not collect and fit in separate steps."""
    if trains_policy(config):
        raise UserError(
            f"{config.algorithm} trains a policy and collects as it does so; use qsharp run, which resumes where it"
            " stopped"
        )


def check_round(config: ConfigDict, number: int) -> None:
    if not 1 <= number <= config.rounds:
        raise UserError(f"round {number} is not one of this run's 1 .. {config.rounds}")
