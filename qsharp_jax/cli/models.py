"""The models that `generate` and `score` use: those of a run, or those in folders."""

import argparse
import contextlib
import datetime
import sys
from typing import Any

from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError


def check_source(options: argparse.Namespace) -> None:
    """Raise a UserError unless the arguments name either a run or folders."""
    folders = [f"--{name}" for name in ("ref", "guide") if getattr(options, name) is not None]
    for name in ("ref", "guide"):
        given = getattr(options, name)
        if "" in ([given] if isinstance(given, str) else given or []):
            raise UserError(f"--{name} is empty; give a folder, a GGUF file, or an id on the Hugging Face hub")
    if options.workdir is not None and folders:
        raise UserError(f"give a run by --workdir, or models' folders by {' and '.join(folders)}, not both")
    if options.workdir is None and not folders:
        raise UserError("there are no models; give a run by --workdir, or models' folders by --ref and --guide")
    for name in ("mesh", "dtype", "quantize", "prompt_format", "stop_ids", "date"):
        if options.workdir is not None and getattr(options, name, None) is not None:
            raise UserError(f"--{name.replace('_', '-')} goes with --ref; a run's models keep their own")


def is_first(options: argparse.Namespace) -> bool:
    """Return True in the process that reads and writes files: the only one, or the first of several."""
    if getattr(options, "coordinator", None) is None:
        return True
    from qsharp_jax.system import multihost

    return multihost.is_first()


def of_first(item: Any, options: argparse.Namespace) -> Any:
    """Return the first process's JSON value; all of them must call this."""
    if getattr(options, "coordinator", None) is None:
        return item
    import jax

    from qsharp_jax.system import multihost

    return multihost.gather([item], jax.process_count())[0]


def on_mesh(models: Any) -> contextlib.AbstractContextManager:
    """Return a context in which the models' mesh, if any, is set.

    Raises:
      UserError: if there are several processes, and the mesh does not cover the devices of all.
    """
    import jax

    devices = 1 if models.mesh is None else models.mesh.size
    if jax.process_count() > 1 and devices < jax.device_count():
        raise UserError(
            f"{jax.process_count()} processes have {jax.device_count()} devices, and the mesh for decoding {devices};"
            " give --mesh, with --config.mesh.decode.data, .attention_data and .tensor that multiply to"
            f" {jax.device_count()}"
        )
    return contextlib.nullcontext() if models.mesh is None else jax.set_mesh(models.mesh)


def open_models(workdir: Workdir | None, options: argparse.Namespace) -> Any:
    """Return `RunModels` or `Folders`.

    Both have `mesh`, `tokenizer`, `configs`, `weights`, `load_ref` and `load_guide`.
    """
    if workdir is not None:
        from qsharp_jax.run.of_run import RunModels
        from qsharp_jax.run.session import Session

        return RunModels(Session(workdir))
    from qsharp_jax.models import meshes
    from qsharp_jax.models.hf import hub
    from qsharp_jax.run.folders import Folders

    guides = [options.guide] if isinstance(options.guide, str) else options.guide or []
    folders = Folders(
        options.ref and hub.find(options.ref),
        [hub.find(guide) for guide in guides],
        dtype=options.dtype,
        quantize=options.quantize or "none",
        prompt_format=options.prompt_format,
        stop_ids=getattr(options, "stop_ids", None),
        date=options.date or datetime.date.fromisoformat(of_first(datetime.date.today().isoformat(), options)),
        mesh=meshes.preset_mesh(options.mesh, "decode"),
    )
    if options.prompt_format is None and folders.tokenizer.prompt_format == "chat":
        print(
            "Prompts are put into the model's chat template; --prompt-format plain takes them as they are.",
            file=sys.stderr,
        )
    return folders
