"""VAS, "Value Augmented Sampling for Language Model Alignment and Personalization" (Han et al., arXiv 2405.06639).

    D <- rollouts of pi_ref (x, y), with their rewards r
    fit V to D by TD(lambda): at every token y_t
        min (V(x, y_1..t) - G_t)^2 / 2,   G_t = r at the last token, and before it
            G_t = (1 - lambda) V(x, y_1..t+1) + lambda G_t+1, with no gradient
    pi(y|x) ∝ pi_ref(y|x) exp(V(x, y) / eta) on the likeliest tokens under pi_ref

With lambda 1 this is a regression of the reward. It learns from pi_ref's rollouts alone, in as many rounds as Q#, each
fit on all rollouts so far. Guides of different rewards can be composed when decoding, see `generate`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from qsharp_jax.algorithms.base import Algorithm
from qsharp_jax.system.settings import UNIT, setting

if TYPE_CHECKING:
    from qsharp_jax.data.records import Rollouts
    from qsharp_jax.models.decoder import LanguageModel
    from qsharp_jax.models.value import ValueModel
    from qsharp_jax.run.session import Session


@dataclasses.dataclass(frozen=True)
class Settings:
    """Value augmented sampling."""

    td_lambda: float = setting(0.95, UNIT, "of the fitted returns; 1: the reward itself, 0: the next token's value")


def run(session: Session, ref: LanguageModel, after_round: Callable[[int, ValueModel], None]) -> ValueModel:
    """Fit a guide per round; `after_round` is called with each round's number and guide."""
    from qsharp_jax.algorithms.value_based import aggregate

    guide = None
    for number in range(1, session.config.rounds + 1):
        collect(session, number, ref)
        data = aggregate(session, number)
        guide = session.for_decoding(fit(session, number, ref, data, guide))
        after_round(number, guide)
    return guide


def collect(session: Session, number: int, ref: LanguageModel, guide: ValueModel | None = None) -> dict[str, float]:
    """Collect pi_ref's rollouts; the guide is not used."""
    from qsharp_jax.algorithms import value_based

    return value_based.collect(session, number, ref, None)


def fit(
    session: Session, number: int, ref: LanguageModel | None, data: Rollouts, previous: ValueModel | None
) -> ValueModel:
    """Fit V to the lambda-returns of `config.vas.td_lambda`."""
    from qsharp_jax.algorithms import value_based
    from qsharp_jax.run import models
    from qsharp_jax.train import targets

    returns = functools.partial(
        targets.td_lambda, config=models.fit_config(session), decay=session.config.vas.td_lambda
    )  # G_t
    return value_based.fit(session, number, ref, data, previous, error="squared", targets=returns)  # (V - G)^2 / 2


VAS = Algorithm(
    name="vas", label="VAS", color="#b58a00", learns="guide", settings=Settings(), run=run, collect=collect, fit=fit,
    mode=lambda config: "cd",
)  # fmt: skip
