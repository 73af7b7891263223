"""Checks of `collect` and `fit`, the separate steps of a round."""

from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from qsharp_jax.run.config import trains_policy
from qsharp_jax.system.errors import UserError

if TYPE_CHECKING:
    from qsharp_jax.run.session import Session


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


def check_collected(session: "Session", number: int) -> None:
    """Raise a UserError if a collection that was stopped left a round's rollouts incomplete; a guide would keep them.

    Rollouts of which there are none at all are left to who reads them.
    """
    from qsharp_jax.data.records import count_rollouts
    from qsharp_jax.run.problems import train_problems

    for round in range(1, number + 1):
        count = count_rollouts(session.workdir.rollouts(round))
        whole = len(train_problems(session, round)) * session.config.collect.samples
        if 0 < count < whole:
            raise UserError(
                f"round {round} has {count} of its {whole} rollouts; run qsharp collect --workdir"
                f" {session.workdir.path} again, or fit what there is with --skip-damaged"
            )
