"""`qsharp run`: the reference, the config's algorithm, an evaluation after each round, the report."""

import argparse

from qsharp_jax.cli.arguments import CONFIG_HELP, add_config, add_processes, add_profile, add_workdir
from qsharp_jax.run.workdir import Workdir

SUMMARY = "everything: reference, the config's algorithm, evaluation, report; resumes when repeated"
EPILOG = CONFIG_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    add_config(parser, required=True)
    add_processes(parser)
    add_profile(parser)


def run(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax import report
    from qsharp_jax.experiments import pipeline
    from qsharp_jax.run.session import Session

    session = Session(workdir, options.profile)
    pipeline.run(session)
    if workdir.writes:
        print("\n" + report.write(session.workdir))
