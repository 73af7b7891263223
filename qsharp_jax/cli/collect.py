"""`qsharp collect`: one round's rollouts."""

import argparse

from qsharp_jax.cli import rounds
from qsharp_jax.cli.arguments import CONFIG_HELP, add_config, add_processes, add_workdir, whole
from qsharp_jax.run.workdir import Workdir

SUMMARY = "collect one round's rollouts: roll in guided, finish with the reference, judge"
EPILOG = CONFIG_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    add_config(parser)
    add_processes(parser)
    parser.add_argument("--round", type=whole(1), metavar="K", help="from 1 (default: the one after the last fitted)")


def run(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax.algorithms.registry import ALGORITHMS
    from qsharp_jax.run import models, pretrain, provenance
    from qsharp_jax.run.session import Session

    session = Session(workdir)
    algorithm = ALGORITHMS[session.config.algorithm]
    rounds.check_separate_steps(session.config)
    provenance.check_problems(session)
    number = options.round or min(models.fitted_rounds(workdir) + 1, session.config.rounds)
    rounds.check_round(session.config, number)
    ref = pretrain.run(session)
    guide = models.load_guide(session, number - 1) if number > 1 else None
    statistics = algorithm.collect(session, number, ref, guide)
    print(f"round {number}: " + ", ".join(f"{name} {value:.4g}" for name, value in statistics.items()))
