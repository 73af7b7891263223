"""`qsharp export`: one of a run's models as a folder that `transformers` loads."""

import argparse

from qsharp_jax.cli.arguments import CONFIG_HELP, add_config, add_workdir
from qsharp_jax.run.workdir import Workdir

SUMMARY = "write one of a run's models as a folder that `transformers` loads"
EPILOG = CONFIG_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    add_config(parser)
    parser.add_argument(
        "--what", choices=("ref", "guide", "adapter"), required=True,
        help="the reference; the last guide or policy; or what a fit with LoRA learned, as an adapter of PEFT",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder: new or empty")


def run(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax.experiments import export
    from qsharp_jax.run.session import Session

    export.write(Session(workdir), options.what, options.out)
    print(f"the {'reference' if options.what == 'ref' else options.what} is in {options.out}")
