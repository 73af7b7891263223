"""The `qsharp` command: reads arguments, opens the workdir, calls the library, prints. Exit code 2: the user's to mend.

It holds no algorithm: what a command does stands in the module that it calls.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qsharp_jax import config as configs
from qsharp_jax.cli import arguments, texts
from qsharp_jax.errors import UserError
from qsharp_jax.workdir import Workdir, explain_os_error

# JAX and the models are imported by the commands that need them, so that `--help` answers at once.


# For a plan: of a machine's accelerators nothing is taken, and libtpu does not look for the TPU that it compiles for.
_NO_DEVICES = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def main(given: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; by default the process's own arguments."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises to install PyTorch, which is not needed
    try:
        options, rest = arguments.parser().parse_known_args(given)
        if options.name == "plan":
            os.environ.update(_NO_DEVICES)
        with _open_workdir(options, rest) as workdir:
            if workdir is not None:
                _keep_programs(workdir.path / "programs")
            options.command(workdir, options)
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # whoever read our output has gone, as in `qsharp generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if (sentence := explain_os_error(error)) is None:
            raise
        return _refuse(sentence)
    except KeyboardInterrupt:
        print("\nqsharp: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _keep_programs(folder: Path) -> None:
    """Compiled programs are kept on disk, for the next round and for the same command typed again."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))


def _refuse(sentence: str) -> int:
    print(f"qsharp: {sentence}", file=sys.stderr)
    return 2


def _open_workdir(options: argparse.Namespace, rest: list[str]) -> Workdir | contextlib.AbstractContextManager[None]:
    """The run's workdir, with its lock; None for a command that works on folders instead."""
    if options.config is None and rest and not rest[0].startswith("--config."):
        raise UserError(f"unknown argument {rest[0]!r}; see qsharp {options.name} --help")
    if options.name == "plan":
        from qsharp_jax import session

        options.settings = configs.load(options.config, rest)
        session.check_settings(options.settings)
        return contextlib.nullcontext()
    if options.workdir is None and (options.config is not None or rest):
        raise UserError("--config goes with --workdir; a model's folder has no settings to change")
    if hasattr(options, "ref"):  # before a workdir is opened, or made
        texts.check_source(options)
    if options.workdir is None:
        return contextlib.nullcontext()
    if options.config is None and rest:
        raise UserError(f"{rest[0]} changes the settings of a run that is there; give the --config it was made with")

    from qsharp_jax import session, sources

    if options.config is not None:
        config = configs.load(options.config, rest)
        session.check(config)
        sources.make_absolute(config)
        if not (Path(options.workdir) / "config.json").exists():
            session.check_problems(config)
        return Workdir.open(options.workdir, config)
    workdir = Workdir.open(options.workdir)
    try:
        session.check(workdir.config)  # it may be of an older version, or edited
    except UserError as error:
        workdir.close()
        raise UserError(f"{workdir.path / 'config.json'}: {error}") from None
    return workdir
