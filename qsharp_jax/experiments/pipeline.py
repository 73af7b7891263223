"""A whole run: pi_ref, the config's algorithm, and an evaluation after each of its rounds."""

from qsharp_jax.algorithms.registry import ALGORITHMS
from qsharp_jax.decoding import Guide
from qsharp_jax.evaluation import forecast, measure
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueModel
from qsharp_jax.run import checks, pretrain, provenance
from qsharp_jax.run.session import Session


def run(session: Session, ref: LanguageModel | None = None, *, evaluate: bool = True) -> Guide:
    """Run everything except the report and what the workdir already has, and return what the last round learned.

    Args:
      ref: the reference, where it is in memory already.
      evaluate: measure it and what is learned on the test problems.

    Raises:
      UserError: for devices or problems that do not match the config, and as the algorithm does.
    """
    checks.check_devices(session)
    provenance.check_problems(session)
    ref = pretrain.run(session) if ref is None else ref
    guides: dict[int, Guide] = {}

    def after_round(number: int, guide: Guide) -> None:
        guides[number] = guide
        if isinstance(guide, ValueModel):
            with session.decoding():
                forecast.run(session, number, guide)
        if evaluate:
            measure.evaluate(session, ref, guides, full=number == session.config.rounds)

    return ALGORITHMS[session.config.algorithm].run(session, ref, after_round)
