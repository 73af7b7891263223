"""Hashes of a run's inputs: the files of its models' folders, and its problems.

They are stored in the workdir's config.json, under "hashes" beside the settings. A run is not resumed with other
weights or problems than it began with, since its guide would match neither.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from qsharp_jax.models import hf
from qsharp_jax.run import sources
from qsharp_jax.run.problems import all_train_problems, test_problems
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.progress import Bar
from qsharp_jax.tasks import registry
from qsharp_jax.tasks.base import Problem

# Of a model's folder: weights, configs, tokenizer. Other files, such as a README, do not matter.
PATTERNS = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model", "merges.txt")
SLOW = 2e9  # bytes; progress is shown above this

Files = dict[str, dict]  # by name: sha256, and size in bytes and mtime_ns, which tell whether a file changed


def check_folders(workdir: Workdir) -> None:
    """Check that the models' folders hold the same files as when the run began; a new run stores their hashes.

    Files with unchanged size and mtime are not rehashed.

    Raises:
      UserError: naming the setting, the folder and the files.
    """
    if not workdir.writes:  # only the first of several processes checks
        return
    stored = workdir.read_hashes()
    hashes = dict(stored)
    folders = {name: sources.folder(workdir.config, name) for name in sources.NOT_FOLDERS}
    bases = {f"{name}'s base": hf.base_of(folder) for name, folder in folders.items() if folder}
    for name, folder in (folders | bases).items():
        if folder is None:
            continue
        hashes[name] = _hash_files(folder, stored.get(name, {}))
        if name in stored and (changed := _changed(stored[name], hashes[name])):
            raise UserError(
                f"config.{name} is {folder}, where {', '.join(changed)} changed since this run began; restore the"
                " files, or give another --workdir"
            )
    if hashes != stored:
        workdir.write_hashes(hashes)


def check_problems(session: Session) -> None:
    """Check that the task has the same problems as when the run began (UserError); a new run stores their hashes."""
    if not session.workdir.writes:
        return
    stored = session.workdir.read_hashes()
    hashes = stored | {
        "train problems": of_problems(all_train_problems(session)),
        "test problems": of_problems(test_problems(session)),
    }
    task = registry.get(session.config.task.name)
    if hasattr(task, "files"):
        task.check_objects(session.config.task, session.rewards)
        hashes["task"] = {str(path): _describe(path, {}) for path in task.files(session.config.task)}
        hashes["task"] |= task.describe_objects(session.rewards)
        if "task" in stored and (changed := _changed(stored["task"], hashes["task"])):
            raise UserError(
                f"{', '.join(changed)} changed since this run began; restore what it was, or give another --workdir"
            )
    for name in ("train problems", "test problems"):
        if name in stored and hashes[name] != stored[name]:
            raise UserError(
                f"the {name} of the task {session.config.task.name} changed since this run began; restore the data, or"
                " the program, that it began with, or give another --workdir"
            )
    if hashes != stored:
        session.workdir.write_hashes(hashes)


def of_problems(problems: Sequence[Problem]) -> str:
    """Return the SHA-256 of the problems as JSON lines, in their order."""
    digest = hashlib.sha256()
    for problem in problems:
        record = {name: value for name, value in vars(problem).items() if name != "columns" or value}
        digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _hash_files(folder: Path, stored: Files) -> Files:
    files = {path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    paths = [folder] if folder.is_file() else sorted(files)
    slow = sum(path.stat().st_size for path in paths) > SLOW

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        descriptions = pool.map(lambda path: _describe(path, stored.get(path.name, {})), paths)
        bar = Bar(descriptions, f"hash {folder.name}", total=len(paths), disable=not slow)
        return {path.name: description for path, description in zip(paths, bar, strict=True)}


def _describe(path: Path, noted: dict) -> dict:
    """Return a file's entry, which is `noted` if its size and mtime are unchanged."""
    stat = path.stat()
    stamp = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if stamp.items() <= noted.items():
        return noted
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()} | stamp


def _changed(stored: Files, current: Files) -> list[str]:
    def sha256(files: Files, name: str) -> str | None:
        return files.get(name, {}).get("sha256")

    return [name for name in sorted(stored | current) if sha256(stored, name) != sha256(current, name)]
