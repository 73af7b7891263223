"""CD: "Controlled Decoding from Language Models" (Mudgal et al., arXiv 2310.17022); with FUDGE (arXiv 2104.05218).

    D <- rollouts of pi_ref (x, y), with their rewards r
    fit V to D, at every token y_t:
        regression   min (V(x, y_1..t) - r)^2 / 2                                         (the paper's CD-FUDGE)
        fudge        max r log V(x, y_1..t) + (1 - r) log(1 - V(x, y_1..t))               (FUDGE itself)
        q            min (V(x, y_1..t) - v_t)^2 / 2,   v_t = r at the last token, and before it
                         v_t = E_{z ~ pi_ref}[V(x, y_1..t z)], with no gradient           (CD-Q)
    pi(y|x) ∝ pi_ref(y|x) exp(V(x, y) / eta);   for fudge: pi_ref(y|x) V(x, y)

It learns from pi_ref's rollouts alone, in as many rounds as Q#, each fit on all rollouts so far, so that both have as
many rollouts and steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from qsharp_jax.algorithms.base import Algorithm
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.settings import one_of, setting

if TYPE_CHECKING:
    from qsharp_jax import train
    from qsharp_jax.data.records import Rollouts
    from qsharp_jax.models.decoder import LanguageModel
    from qsharp_jax.models.value import ValueModel
    from qsharp_jax.run.session import Session


@dataclasses.dataclass(frozen=True)
class Settings:
    """Controlled decoding."""

    variant: str = setting(
        "regression", one_of("regression", "fudge", "q"),
        "regression of pi_ref's rewards; fudge: their likelihood, and a tilt by log p; q: Bellman targets",
    )  # fmt: skip


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
    """Fit V by the loss of `config.cd.variant`."""
    from qsharp_jax.algorithms import value_based
    from qsharp_jax.run import attention, models
    from qsharp_jax.train import targets

    fitted = functools.partial(value_based.fit, session, number, ref, data, previous)
    match session.config.cd.variant:
        case "regression":
            return fitted(error="squared")  # (V - r)^2 / 2
        case "fudge":
            return fitted(error="nll")  # -(r log V + (1 - r) log(1 - V))
    ref = session.for_fitting(models.load_ref(session) if ref is None else ref)
    settings = session.config.generate
    backups = functools.partial(  # v_t = E_{z ~ pi_ref}[V(x, y_1..t z)]
        targets.bellman,
        config=models.fit_config(session),
        ref_config=ref.config,
        sampling={name: settings[name] for name in ("temperature", "top_k", "top_p")},
        vocab_size=models.tokenizer(session).vocab_size,
        attend_by=attention.of_fit(session),
        packed=session.config.fit.pack_length > 0,
    )
    return fitted(error="squared", targets=backups, beside={"ref": ref.params}, flops=_flops(session))


def _flops(session: Session) -> train.Flops:
    """Return the FLOPs of a CD-Q step: the guide's, a third of pi_ref's (forward only), and V of all tokens."""
    from qsharp_jax import train
    from qsharp_jax.run import models

    config = models.guide_config(session)
    guide = train.guide_flops(config, session.config.fit.future_offsets)
    ref, head = train.language_model_flops(models.ref_config(session)), 2 * config.trunk.embed * config.trunk.vocab_size
    return lambda batch: guide(batch) + ref(batch) / 3 + head * config.outputs * int((batch.segments > 0).sum())


def mode(config: ConfigDict) -> str:
    """Return the mode of `guidance.MODES`: pi_ref is tilted by V / eta, or by log V."""
    return "expectation" if config.cd.variant == "fudge" else "cd"


def check(config: ConfigDict) -> None:
    """Check that the variant goes with the guide's head; raises a UserError."""
    if config.cd.variant == "fudge" and config.value.distribution != "bernoulli":
        raise UserError(
            f"config.cd.variant fudge learns a probability, but config.value.distribution is"
            f" {config.value.distribution}; give bernoulli, or the variant regression"
        )
    if config.cd.variant == "q" and config.value.type != "q":
        raise UserError(
            "config.cd.variant q needs the mean over all next tokens, which a Q-type guide gives in one pass; give"
            " config.value.type=q, or config.algorithm=vas with td_lambda 0, which uses the rollout's next token alone"
        )


CD = Algorithm(
    name="cd", label="CD", color="#c8641e", learns="guide", settings=Settings(), run=run, collect=collect, fit=fit,
    mode=mode, check=check,
)  # fmt: skip
