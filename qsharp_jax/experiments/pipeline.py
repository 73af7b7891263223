"""A whole run: pi_ref, the config's algorithm, and an evaluation after each of its rounds."""

from qsharp_jax import algorithms
from qsharp_jax.evaluation import measure
from qsharp_jax.generate import Guide
from qsharp_jax.run import checks, pretrain, provenance
from qsharp_jax.run import config as configs
from qsharp_jax.run.session import Session


def run(session: Session) -> None:
    """Everything but the report; what lies in the workdir is not done again.

    Raises:
      UserError: for devices, problems or settings that cannot be, and as the algorithm does.
    """
    algorithm = algorithms.get(session.config.algorithm)
    algorithms.check(session.config)
    checks.check_devices(session)
    provenance.check_problems(session)
    ref = pretrain.run(session)
    guides: dict[int, Guide] = {}

    def after_round(number: int, guide: Guide) -> None:
        guides[number] = guide
        mode = None if configs.trains_policy(session.config) else algorithm.mode(session.config)
        measure.evaluate(session, ref, guides, full=number == session.config.rounds, mode=mode)

    algorithm.run(session, ref, after_round)
