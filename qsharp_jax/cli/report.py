"""`qsharp report`: the report of a run, from its files alone."""

import argparse

from qsharp_jax.cli.arguments import CONFIG_HELP, add_config, add_workdir
from qsharp_jax.run.workdir import Workdir

SUMMARY = "write report.md, the plots and examples.html from what was measured"
EPILOG = CONFIG_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    add_config(parser)


def run(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax import report

    print(report.write(workdir))
