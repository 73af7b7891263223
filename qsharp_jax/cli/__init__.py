"""The `qsharp` command: read the arguments, open the workdir, run the command's file, turn errors into exit codes.

Exit codes: 0 done or stopped by SIGTERM, 2 an error the user can fix, 130 interrupted.
"""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qsharp_jax.cli import commands, run
from qsharp_jax.run import config as configs
from qsharp_jax.run.workdir import MEASURING, Workdir, check_is_workdir
from qsharp_jax.system import children, files, sigterm
from qsharp_jax.system.errors import Stopped, UserError, explain_os_error

STOPPED = "stopped by SIGTERM; run the same command again to resume"
INTERRUPTED = "interrupted; run the same command again to resume"
TRAINING = ("run", "compare", "collect", "fit")
LOGGING = ("run", "collect", "fit")  # `compare` starts those of the workdirs of its runs
RESUMING = ("run", "compare", "collect", "fit", "evaluate", "score")  # and generate, with an output file

# `plan` uses no accelerator; libtpu must not look for the TPU that it compiles for.
_NO_DEVICES = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

# The commands import JAX and the models where needed, so that `--help` answers at once.


def console() -> int:
    """Run `main` as a process.

    After an error or a signal it does not wait for threads: one that writes a checkpoint may wait forever for an
    interrupted one, and one that judges answers for all that are queued.
    """
    code = main()
    if code or sigterm.requested():
        sys.stdout.flush()
        children.exit_now(code)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; the arguments are by default the process's own."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises installing PyTorch, which is not needed
    paths: list[tuple[str, str]] = []
    try:
        options, rest = commands.parser().parse_known_args(arguments)
        paths += commands.paths(options, rest)
        if options.name == "plan":
            os.environ.update(_NO_DEVICES)
        if getattr(options, "rejudge", False):
            _check_rejudge(options, rest)
        with _joined(options, paths) as peers, _on_sigterm(options, peers), _open_workdir(options, rest) as workdir:
            if workdir is not None:
                paths += _paths_of(workdir.config)
                _keep_programs(workdir.path / "programs")
            options.command.run(workdir, options)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of the output is gone, as in `qsharp generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if (explained := _explain(error, paths)) is None:
            raise
        code, sentence = explained
        print(f"qsharp: {sentence}", file=sys.stderr)
        return code


def _explain(error: BaseException, paths: Sequence[tuple[str, str]]) -> tuple[int, str] | None:
    """The exit code and the message for an error on one of the user's `paths`; None if only a traceback explains it."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, Stopped):
        return (130, INTERRUPTED) if sigterm.by_ctrl_c() else (0, STOPPED)
    if isinstance(error, KeyboardInterrupt):
        return 130, INTERRUPTED
    sentence = explain_os_error(error, paths)
    return sentence and (2, sentence)


def _paths_of(config: ConfigDict) -> list[tuple[str, str]]:
    """The paths in a run's settings, as pairs of option and path."""
    named = [
        ("--config.ref", config.get("ref")),
        ("--config.guide", config.get("guide")),
        ("--config.task.data", config.task.get("data")),
    ]
    return [(option, word) for option, word in named if word and os.sep in word]


def _joined(
    options: argparse.Namespace, paths: Sequence[tuple[str, str]]
) -> contextlib.AbstractContextManager[sigterm.Peers]:
    """Wait for the other processes of the run, if any. All but the first print only errors."""
    if getattr(options, "coordinator", None) is None:
        for name in ("processes", "process"):
            if getattr(options, name, None) is not None:
                raise UserError(f"--{name} goes with --coordinator HOST:PORT; give it, or leave --{name} out")
        return contextlib.nullcontext(sigterm.Peers())

    from qsharp_jax.system import multihost

    def explain(error: BaseException) -> tuple[int, str]:
        if (explained := _explain(error, paths)) is None:
            traceback.print_exception(error)
            explained = 1, f"{type(error).__name__}, see the traceback above"
        return explained

    place = multihost.find_place(options.coordinator, options.processes, options.process)
    if place.index:
        sys.stdout = open(os.devnull, "w")
        os.environ["TQDM_DISABLE"] = "1"
    return multihost.joined(place, options.coordinator_timeout, explain)


def _on_sigterm(options: argparse.Namespace, peers: sigterm.Peers) -> contextlib.AbstractContextManager[None]:
    resumes = options.name in RESUMING or (options.name == "generate" and options.output is not None)
    if not resumes:
        return contextlib.nullcontext()
    return sigterm.sigterm_ends(lambda: peers.end(0, STOPPED), peers)


def _keep_programs(folder: Path) -> None:
    """Keep compiled programs on disk, for later rounds and for repeated commands."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(files.absolute(folder)))


def _open_workdir(options: argparse.Namespace, rest: list[str]) -> Workdir | contextlib.AbstractContextManager[None]:
    """Open the run's workdir with its lock; None for a command that works on folders."""
    if options.config is None and rest and not rest[0].startswith("--config."):
        raise UserError(f"unknown argument {rest[0]!r}; see qsharp {options.name} --help")
    if options.name == "plan":
        from qsharp_jax.run import checks

        options.settings = configs.load(options.config, rest)
        configs.check_known(options.settings, options.config)
        checks.check_settings(options.settings)
        return contextlib.nullcontext()
    if options.workdir is None and getattr(options, "mesh", None) is not None:
        options.mesh, rest = configs.mesh_section(options.mesh, rest), []
    if options.workdir is None and (options.config is not None or rest):
        raise UserError("--config goes with --workdir; a model's folder has no settings to change")
    if hasattr(options.command, "check_arguments"):  # before a workdir is opened or created
        options.command.check_arguments(options)
    if options.workdir is None:
        return contextlib.nullcontext()
    if (own := _own_run(options)) is not None:
        from qsharp_jax.run import own as own_runs

        config = own_runs.load(own_runs.OwnRun(**own), options.workdir, rest)
    elif options.config is not None:
        config = configs.load(options.config, rest)
        configs.check_known(config, options.config)
    elif (of := _measured(options)) is not None:
        config = _settings_of(of, rest)
    else:
        if others := [word for word in rest if not word.startswith("--config.mesh")]:
            raise UserError(f"{others[0]} changes the settings of an existing run; give the --config it was made with")
        config = None
        check_stored = check_is_workdir if options.name == "compare" else _check_is_run
        check_stored(files.make_path(options.workdir))  # before JAX is imported

    from qsharp_jax.experiments import opening
    from qsharp_jax.run import checks, provenance

    if config is not None:
        opening.check(config, files.make_path(options.workdir), options.config or "own")
    workdir = _opened(options.workdir, config, _measured(options))
    rejudges = getattr(options, "rejudge", False)
    try:
        if workdir.of is not None:
            _check_measured(workdir, options)
        if config is None:
            configs.override_stored(workdir.config, rest)
            _check_stored(workdir, checks.check_settings if rejudges else checks.check)
        if not rejudges:  # which reads no model, and the folders may be on another machine
            provenance.check_folders(workdir)
        if options.name in LOGGING:
            checks.check_loggers(workdir)
    except BaseException:
        workdir.close()
        raise
    return workdir


def _check_is_run(path: Path) -> None:
    """Raise a UserError for what is no workdir, or that of `qsharp compare`, whose runs have folders of their own."""
    check_is_workdir(path)
    if runs := sorted(run.parent for run in path.glob("seed_*/*/config.json")):
        raise UserError(
            f"{path} holds a comparison of several runs; give the workdir of one of them, as {runs[0]}, or repeat"
            " qsharp compare for its table"
        )


def _own_run(options: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of `qsharp run` that name a model, prompts and a reward; None if there are none of them."""
    if options.name != "run":
        return None
    given = {name: getattr(options, name) for name in run.OWN if getattr(options, name) is not None}
    if given and options.config is not None:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} is given in place of --config; leave one of them out")
    if not given and options.config is None and not files.is_file(files.make_path(options.workdir) / "config.json"):
        raise UserError("give --config RECIPE, or --ref, --prompts and --reward; see qsharp run --help")
    return {"rewards" if name == "reward" else name: value for name, value in given.items()} or None


def _measured(options: argparse.Namespace) -> Path | None:
    """Return the workdir of the run that `qsharp evaluate --of` measures."""
    of = getattr(options, "of", None)
    return None if of is None else files.make_path(of)


def _settings_of(of: Path, changes: list[str]) -> ConfigDict:
    """Return the settings of a run that is measured again, changed where that concerns no training."""
    _check_is_run(of)
    if (run := Workdir.attach(of)).of is not None:
        raise UserError(f"{of} holds measurements of {run.of}; give --of {run.of}")
    config = Workdir.attach(of).config
    configs.override_stored(config, changes)
    if others := configs.differences(run.config, config, but=MEASURING):
        raise UserError(f"--config.{others[0]} would be another run; with --of only {', '.join(MEASURING)} may change")
    return config


def _check_measured(workdir: Workdir, options: argparse.Namespace) -> None:
    """Check that a command is one for a measurement's workdir, and that the run is still where it was."""
    if options.name in TRAINING:
        raise UserError(f"{workdir.path} holds measurements of {workdir.of}; {options.name} there")
    needs_models = options.name != "report" and not getattr(options, "rejudge", False)
    if needs_models and not files.is_file(workdir.of / "config.json"):
        raise UserError(f"{workdir.path} measures the models of {workdir.of}, where there is no run; put it back")


def _opened(path: str, config: ConfigDict | None, of: Path | None) -> Workdir:
    from qsharp_jax.system import multihost

    if multihost.is_first():
        workdir = Workdir.open(path, config, of=of)
    multihost.wait_for_all("the workdir is open")
    if multihost.is_first():
        return workdir
    files.wait_for(files.make_path(path) / "config.json")
    return Workdir.attach(path, config)


def _check_rejudge(options: argparse.Namespace, rest: list[str]) -> None:
    """Check that --rejudge is used with an existing run and one process."""
    if options.config is not None or rest:
        raise UserError("--rejudge judges the stored samples of a run; give --workdir alone")
    if options.coordinator is not None:
        raise UserError("--rejudge runs in one process; leave --coordinator out")


def _check_stored(workdir: Workdir, check: Callable[[ConfigDict], None]) -> None:
    """Check stored settings, which may have been edited."""
    try:
        check(workdir.config)
    except UserError as error:
        raise UserError(f"{workdir.path / 'config.json'}: {error}") from None
