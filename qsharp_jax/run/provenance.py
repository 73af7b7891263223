"""Hashes of a run's inputs: the files of its models' folders, and its problems.

They stand in the workdir's config.json, under "hashes" beside the settings. A run that goes on with other weights or
problems than it began with is refused: its guide would be of neither.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from qsharp_jax.run import models
from qsharp_jax.run.problems import all_train_problems, test_problems
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.progress import Bar
from qsharp_jax.tasks.base import Problem

# Of a model's folder: weights, configs, tokenizer. What else lies there, as a README, changes nothing.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt")
SLOW = 2e9  # bytes, from which on progress is shown

Files = dict[str, dict]  # by name: sha256, and size in bytes and mtime_ns, by which an unchanged file is known


def check_folders(workdir: Workdir) -> None:
    """Check that the models' folders hold the same files as when the run began; in a new run they are noted.

    A file is read only if its size or time of change is not as noted: all of them in a new run, none as a rule later.

    Raises:
      UserError: naming the setting, the folder and the files.
    """
    if not workdir.writes:  # the first process of several looks
        return
    held = workdir.read_hashes()
    found = dict(held)
    for name in models.ON_THE_SPOT:
        folder = models.folder(workdir.config, name)
        if folder is None:
            continue
        found[name] = _files(folder, held.get(name, {}))
        if name in held and (changed := _changed(held[name], found[name])):
            raise UserError(
                f"config.{name} is {folder}, where {', '.join(changed)} changed since this run began; put back what was"
                " there, or give another --workdir"
            )
    if found != held:
        workdir.write_hashes(found)


def check_problems(session: Session) -> None:
    """Check that the task gives the same problems as when the run began; in a new run they are noted.

    Raises:
      UserError: naming the task and the split.
    """
    if not session.workdir.writes:
        return
    held = session.workdir.read_hashes()
    found = held | {
        "train problems": of_problems(all_train_problems(session)),
        "test problems": of_problems(test_problems(session)),
    }
    for name in found.keys() & held.keys():
        if found[name] != held[name]:
            raise UserError(
                f"the {name} of the task {session.config.task.name} changed since this run began; put back the data, or"
                " the program, that it began with, or give another --workdir"
            )
    if found != held:
        session.workdir.write_hashes(found)


def of_problems(problems: Sequence[Problem]) -> str:
    """The SHA-256 of the problems as JSON lines, in their order."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps(vars(problem), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _files(folder: Path, held: Files) -> Files:
    paths = sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})
    slow = sum(path.stat().st_size for path in paths) > SLOW

    def describe(path: Path) -> dict:
        stat = path.stat()
        noted = held.get(path.name, {})
        made = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if all(noted.get(key) == number for key, number in made.items()):
            return noted
        with open(path, "rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()} | made

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        bar = Bar(pool.map(describe, paths), f"hash {folder.name}", total=len(paths), disable=not slow)
        return {path.name: description for path, description in zip(paths, bar, strict=True)}


def _changed(held: Files, found: Files) -> list[str]:
    def sha256(files: Files, name: str) -> str | None:
        return files.get(name, {}).get("sha256")

    return [name for name in sorted(held | found) if sha256(held, name) != sha256(found, name)]
