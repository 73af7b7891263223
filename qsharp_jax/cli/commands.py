"""The parser of all commands. A command is one file (SUMMARY, EPILOG, `add_arguments`, `run`), and its name here."""

import argparse
import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from qsharp_jax import __version__
from qsharp_jax.system.errors import UserError

DESCRIPTION = """\
Guides a frozen language model by a learned distribution of the reward-to-go (Q#, arXiv 2502.20548).

  qsharp run --config arithmetic --workdir runs/arithmetic

does everything: it pre-trains or loads the reference model, collects rollouts, fits the guide, evaluates, and writes a
report. Repeated with the same workdir it resumes where it stopped. The other commands are its single steps. With
models of your own, each a folder of `transformers`, a GGUF file, or an id on the Hugging Face hub:

  qsharp generate --ref MODEL --guide MODEL "a prompt"
  qsharp score --ref MODEL --guide MODEL --input FILE --output FILE
  qsharp serve --ref MODEL --guide NAME=MODEL"""

_NAMES = (
    "run", "compare", "collect", "fit", "generate", "score", "serve", "judge", "evaluate", "report", "plan", "export"
)  # fmt: skip
COMMANDS: dict[str, ModuleType] = {name: importlib.import_module(f"qsharp_jax.cli.{name}") for name in _NAMES}

# Options with a path; --guide may be a list.
_PATHS = ("workdir", "of", "config", "ref", "input", "output", "out", "data", "api_key_file")
_PATHS_IN_CONFIG = ("--config.ref", "--config.guide", "--config.task.data")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """Build the parser; its result has `command`, the command's module, and `name`, `workdir` and `config`."""
    raw = argparse.RawDescriptionHelpFormatter
    main = _Parser(prog="qsharp", description=DESCRIPTION, formatter_class=raw, allow_abbrev=False)
    main.add_argument("--version", action="version", version=f"qsharp_jax {__version__}")
    commands = main.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        description = f"{module.SUMMARY[0].upper()}{module.SUMMARY[1:]}."
        sub = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=description,
            epilog=module.EPILOG,
            formatter_class=raw,
            allow_abbrev=False,
        )
        sub.set_defaults(command=module, name=name, config=None)
        module.add_arguments(sub)
    return main


def paths(options: argparse.Namespace, rest: Sequence[str]) -> list[tuple[str, str]]:
    """List the files and folders that the user named, in options or config changes (`rest`), as (option, path)."""
    named = [(f"--{name.replace('_', '-')}", getattr(options, name, None)) for name in _PATHS]
    if options.name == "run":  # prompts of `generate` are texts
        named += [("--prompts", options.prompts), ("--task", options.task)]
    guides = getattr(options, "guide", None)
    named += [("--guide", guide) for guide in ([guides] if isinstance(guides, str) else guides or [])]
    changes = [word.split("=", 1) for word in rest if "=" in word]
    named += [(name, path) for name, path in changes if name in _PATHS_IN_CONFIG]
    named.append(("QSHARP_DATA", os.environ.get("QSHARP_DATA")))
    return [(name, path) for name, path in named if path]
