"""`qsharp fit`: fit the guide to all rollouts up to a round."""

import argparse

from qsharp_jax.cli import rounds
from qsharp_jax.cli.arguments import CONFIG_HELP, add_config, add_processes, add_profile, add_workdir, whole
from qsharp_jax.run.workdir import Workdir

SUMMARY = "fit the guide to all rollouts up to a round"
EPILOG = CONFIG_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    add_config(parser)
    add_processes(parser)
    parser.add_argument("--round", type=whole(1), metavar="K", help="from 1 (default: the last collected)")
    parser.add_argument("--skip-damaged", action="store_true", help="leave out damaged and missing shards")
    add_profile(parser)


def run(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax.algorithms import value_based
    from qsharp_jax.algorithms.registry import ALGORITHMS
    from qsharp_jax.evaluation import forecast
    from qsharp_jax.run import checks, models, sources
    from qsharp_jax.run.session import Session

    session = Session(workdir, options.profile)
    algorithm = ALGORITHMS[session.config.algorithm]
    rounds.check_separate_steps(session.config)
    checks.check_devices(session)
    number = options.round or max(workdir.collected_rounds(), 1)
    rounds.check_round(session.config, number)
    if not options.skip_damaged:
        rounds.check_collected(session, number)
    data = value_based.aggregate(session, number, skip_damaged=options.skip_damaged)
    previous = models.load_guide(session, number - 1) if session.config.fit.warm_start and number > 1 else None
    ref = None if sources.folder(session.config, "ref") else models.load_ref(session)
    guide = session.for_decoding(algorithm.fit(session, number, ref, data, previous))
    print(f"round {number}: the guide fitted to {len(data)} rollouts is in {workdir.guide_folder(number)}")
    with session.decoding():
        forecast.run(session, number, guide, skip_damaged=options.skip_damaged)
