"""`qsharp run`: the reference, the config's algorithm, an evaluation after each round, the report."""

import argparse

from qsharp_jax.cli.arguments import CONFIG_HELP, add_config, add_processes, add_profile, add_workdir
from qsharp_jax.run import schema
from qsharp_jax.run.workdir import Workdir

# The arguments that stand for a recipe, where --config is not given.
OWN = ("ref", "guide", "prompts", "task", "reward", "prompt_format")

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
    add_config(parser)
    add_own(parser)
    add_processes(parser)
    add_profile(parser)


def add_own(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a model, prompts and a reward of your own", "in place of --config; see docs/tasks.md"
    )
    group.add_argument(
        "--ref", metavar="MODEL", help="the reference: a folder, a GGUF file, or ID or ID@REVISION on the hub"
    )
    group.add_argument("--guide", metavar="MODEL", help="what the guide starts from (default: the reference)")
    group.add_argument(
        "--prompts", metavar="FILE",
        help="JSON lines or Parquet with a column prompt, or a data set on the hub; other columns go to the reward",
    )  # fmt: skip
    group.add_argument(
        "--reward", metavar="FILE:NAME", action="append",
        help="a function reward(prompts, completions, **columns) -> list[float], as TRL calls it; repeated: their sum",
    )  # fmt: skip
    group.add_argument("--task", metavar="FILE", help="a Python file with problems(split) and reward, in place of both")
    group.add_argument(
        "--prompt-format", choices=("plain", "chat"),
        help="the prompt as it is, or in the tokenizer's chat template (default: chat, if there is a template)",
    )  # fmt: skip


def run(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax import report
    from qsharp_jax.experiments import pipeline
    from qsharp_jax.run.session import Session

    session = Session(workdir, options.profile)
    pipeline.run(session)
    if workdir.writes:
        print("\n" + report.write(session.workdir))
