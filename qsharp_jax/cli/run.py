"""`qsharp run`: the reference, the config's algorithm, an evaluation after each round, the report."""

import argparse

from qsharp_jax.cli.arguments import CONFIG_HELP, add_config, add_processes, add_profile, add_workdir
from qsharp_jax.run import schema
from qsharp_jax.run.workdir import Workdir

SUMMARY = "everything: reference, the config's algorithm, evaluation, report; resumes when repeated"


def _settings() -> str:
    """Return one line per setting: its key, its default, and what it means."""
    lines = []
    for prefix, section in schema.sections().items():
        for name, field in schema.settings(section).items():
            key, default = f"{prefix}.{name}".lstrip("."), str(getattr(section, name))
            lines.append(f"  {key:33} {default:12} {field.metadata['help']}")
    return "\n".join(lines)


EPILOG = f"{CONFIG_HELP}\n\nSettings and their defaults, which recipes change:\n\n{_settings()}"


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
