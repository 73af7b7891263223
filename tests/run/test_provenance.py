"""A run is told what it was made with, and goes on with that alone."""

import hashlib
import json
import os
from pathlib import Path

import helpers
import pytest
from ml_collections import ConfigDict

from qsharp_jax import cli
from qsharp_jax.run import provenance
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import star_graph

FILES = {
    "model-1.safetensors": b"weights" * 1000, "model-2.safetensors": b"more", "config.json": b"{}", "README.md": b"x",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    for name, data in FILES.items():
        (made / name).write_bytes(data)
    return made


def begin(tmp_path, folder) -> Path:
    """A new workdir of a run whose reference is the folder's; its guide starts from it."""
    with Workdir.open(tmp_path / "run", ConfigDict({"ref": str(folder), "guide": "ref"})) as workdir:
        provenance.check_folders(workdir)
    return tmp_path / "run"


def go_on(path: Path) -> None:
    with Workdir.open(path) as workdir:
        provenance.check_folders(workdir)


def test_the_hashes_of_the_files_stand_beside_the_settings(tmp_path, folder):
    path = begin(tmp_path, folder)
    stored = json.loads((path / "config.json").read_text())
    assert {name: noted["sha256"] for name, noted in stored["hashes"]["ref"].items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in FILES.items() if name != "README.md"
    }
    with Workdir.open(path) as workdir:  # they are no settings
        assert workdir.config.to_dict() == {"ref": str(folder), "guide": "ref"}
    go_on(path)
    assert json.loads((path / "config.json").read_text()) == stored


def rewrite(folder: Path) -> None:
    """Other content of the same size, a moment later."""
    (folder / "model-1.safetensors").write_bytes(b"WEIGHTS" * 1000)


CHANGES = {
    "config.json, model-1.safetensors": lambda f: [rewrite(f), (f / "config.json").write_text("{ }")],
    "model-2.safetensors": lambda f: (f / "model-2.safetensors").unlink(),
    "model-2.safetensors, model-3.safetensors": lambda f: (f / "model-2.safetensors").rename(f / "model-3.safetensors"),
}


@pytest.mark.parametrize("names", CHANGES)
def test_weights_that_changed_are_gone_or_new_are_refused_by_name(tmp_path, folder, names):
    path = begin(tmp_path, folder)
    (folder / "README.md").write_text("another")  # which is no part of the model
    go_on(path)
    CHANGES[names](folder)
    with pytest.raises(UserError, match=f"config.ref is {folder}, where {names} changed since"):
        go_on(path)
    (folder / "model-3.safetensors").unlink(missing_ok=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    go_on(path)


def test_unchanged_files_are_not_read_again_and_copied_ones_are_once(tmp_path, folder, monkeypatch):
    path, read = begin(tmp_path, folder), []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: read.append(Path(file.name).name) or digest(file, kind)
    )
    go_on(path)
    assert not read
    os.utime(folder / "model-1.safetensors", ns=(1, 1))  # as a copy of the folder, on a machine made anew
    for _ in range(2):
        go_on(path)
    assert read == ["model-1.safetensors"]


def test_a_workdir_without_hashes_notes_them_now(tmp_path, folder):
    Workdir.open(tmp_path / "run", ConfigDict({"ref": str(folder), "guide": "ref"})).close()
    go_on(tmp_path / "run")
    rewrite(folder)
    with pytest.raises(UserError, match="model-1.safetensors"):
        go_on(tmp_path / "run")


def test_other_problems_are_refused(tmp_path, monkeypatch):
    made = helpers.session(tmp_path)
    provenance.check_problems(made)
    provenance.check_problems(Session(made.workdir))
    problems = star_graph.problems
    monkeypatch.setattr(
        star_graph, "problems",
        lambda config, split, *rest: problems(config, split, *rest)[:: -1 if split == "test" else 1],
    )  # fmt: skip
    with pytest.raises(UserError, match="^the test problems of the task star_graph changed since this run began"):
        provenance.check_problems(Session(made.workdir))
    made.workdir.close()
    assert cli.main(["evaluate", "--workdir", str(tmp_path)]) == 2
    with Workdir.open(tmp_path):  # the refusal gave the lock back
        pass
