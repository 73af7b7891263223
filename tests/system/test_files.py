"""Paths as users write them."""

from pathlib import Path

import pytest

from qsharp_jax.system import files


@pytest.mark.parametrize("kind", [str, Path])
def test_the_user_s_folder_has_a_short_name(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert files.make_path(kind("~/runs/mine")) == tmp_path / "runs" / "mine"
    assert files.make_path(kind("runs/~mine")) == Path("runs/~mine")


def test_a_bucket_has_no_user_s_folder():
    pytest.importorskip("gcsfs")
    assert str(files.make_path("gs://bucket/~/mine")) == "gs://bucket/~/mine"
