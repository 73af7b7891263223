"""`qsharp compare`: algorithms side by side at equal budgets."""

import argparse

from qsharp_jax.cli.arguments import CONFIG_HELP, add_config, add_workdir
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError

SUMMARY = "algorithms side by side at equal budgets, each in a workdir below; resumes when repeated"
EPILOG = CONFIG_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    add_config(parser, required=True)


def run(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax.experiments import compare

    text, failures = compare.run(workdir)
    print("\n" + text)
    if failures:
        raise UserError(
            f"{len(failures)} of the runs have no result, see above; mend what they name and run the command again"
        )
