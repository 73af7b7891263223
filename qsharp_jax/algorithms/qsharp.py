"""Q#: Algorithm 1 of "Q#: Provably Optimal Distributional RL for LLM Post-Training" (arXiv 2502.20548).

    D <- {}
    for round k = 1, 2, ...:
        roll in with pi_k up to a random switch, finish with pi_ref, observe the reward   (pi_1 = pi_ref)
        D <- D + these
        fit Z by maximum likelihood on all of D
        pi_{k+1}(y|x) ∝ pi_ref(y|x) E_{z ~ Z(x,y)}[exp(z / eta)]

There is no step for the policy: it is pi_ref with the guide beside it. It knows nothing about evaluation.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from qsharp_jax.algorithms.value_based import aggregate, collect, fit
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueModel
from qsharp_jax.run.session import Session

__all__ = ["aggregate", "collect", "fit", "mode", "run"]


def run(session: Session, ref: LanguageModel, after_round: Callable[[int, ValueModel], None]) -> ValueModel:
    """Algorithm 1; `after_round` is told each round's number and guide."""
    guide = None
    for number in range(1, session.config.rounds + 1):
        collect(session, number, ref, guide)
        data = aggregate(session, number)
        guide = session.for_decoding(fit(session, number, ref, data, guide))
        after_round(number, guide)
    return guide


def mode(config: ConfigDict) -> str:
    """How the guide tilts pi_ref, of `guidance.MODES`."""
    return "qsharp"
