"""Q#: Algorithm 1 of "Q#: Provably Optimal Distributional RL for LLM Post-Training" (arXiv 2502.20548).

    D <- {}
    for round k = 1, 2, ...:
        roll in with pi_k up to a random switch, finish with pi_ref, observe the reward   (pi_1 = pi_ref)
        D <- D + these rollouts
        fit Z by maximum likelihood on all of D
        pi_{k+1}(y|x) ∝ pi_ref(y|x) E_{z ~ Z(x,y)}[exp(z / eta)]

There is no step for the policy: it is pi_ref tilted by the guide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qsharp_jax.algorithms.base import Algorithm

if TYPE_CHECKING:
    from qsharp_jax.data.records import Rollouts
    from qsharp_jax.models.decoder import LanguageModel
    from qsharp_jax.models.value import ValueModel
    from qsharp_jax.run.session import Session


def run(session: Session, ref: LanguageModel, after_round: Callable[[int, ValueModel], None]) -> ValueModel:
    """Run Algorithm 1; `after_round` is called with each round's number and guide."""
    from qsharp_jax.algorithms.value_based import aggregate

    guide = None
    for number in range(1, session.config.rounds + 1):
        collect(session, number, ref, guide)
        data = aggregate(session, number)
        guide = session.for_decoding(fit(session, number, ref, data, guide))
        after_round(number, guide)
    return guide


def collect(session: Session, number: int, ref: LanguageModel, guide: ValueModel | None) -> dict[str, float]:
    """Roll in with the guide up to a random switch, finish with pi_ref."""
    from qsharp_jax.algorithms import value_based

    return value_based.collect(session, number, ref, guide)


def fit(
    session: Session, number: int, ref: LanguageModel | None, data: Rollouts, previous: ValueModel | None
) -> ValueModel:
    """Fit Z by maximum likelihood."""
    from qsharp_jax.algorithms import value_based

    return value_based.fit(session, number, ref, data, previous, error="nll")


QSHARP = Algorithm(
    name="qsharp", label="Q#", color="#1f5fa8", learns="guide", rolls_in=True, run=run, collect=collect, fit=fit,
    mode=lambda config: "qsharp", extra_modes=("cd",),
)  # fmt: skip
