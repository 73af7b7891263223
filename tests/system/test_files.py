"""Paths as users write them, and files that other machines write."""

import threading
from pathlib import Path

import pytest

from qsharp_jax.system import files
from qsharp_jax.system.errors import UserError


@pytest.mark.parametrize("kind", [str, Path])
def test_the_user_s_folder_has_a_short_name(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert files.make_path(kind("~/runs/mine")) == tmp_path / "runs" / "mine"
    assert files.make_path(kind("runs/~mine")) == Path("runs/~mine")


def test_a_bucket_has_no_user_s_folder():
    pytest.importorskip("gcsfs")
    assert str(files.make_path("gs://bucket/~/mine")) == "gs://bucket/~/mine"


def test_a_file_that_a_network_shows_late_is_waited_for(tmp_path):
    path = tmp_path / "config.json"
    timer = threading.Timer(0.3, path.write_text, ["{}"])
    timer.start()
    files.wait_for(path)
    assert path.read_text() == "{}"
    timer.join()


def test_a_file_that_never_comes_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LATEST", 0.1)
    with pytest.raises(UserError, match=r"config.json.*is not seen on this machine.*that all machines share"):
        files.wait_for(tmp_path / "config.json")
