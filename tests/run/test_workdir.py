"""The workdir: one writer at a time, one config, and files that a kill or a full disk cannot spoil."""

import datetime
import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refusal
from ml_collections import ConfigDict
from repository import ROOT

from qsharp_jax.configs import arithmetic
from qsharp_jax.run.config import differences
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError, explain_os_error
from qsharp_jax.system.files import write_atomic


def make_config(**changes):
    return ConfigDict({"seed": 0, "fit": {"epochs": 4}, "etas": (0.5, 0.1), **changes}).lock()


def in_another_process(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_new_workdir_keeps_its_config(tmp_path):
    path = tmp_path / "runs" / "one"
    with Workdir.open(path, make_config()) as workdir:
        assert json.loads((path / "config.json").read_text()) == {"seed": 0, "fit": {"epochs": 4}, "etas": [0.5, 0.1]}
        assert workdir.config.etas == (0.5, 0.1)
    with Workdir.open(path) as workdir:  # as `qsharp evaluate --workdir DIR`
        assert workdir.config.fit.epochs == 4 and workdir.config.is_locked
    Workdir.open(path, make_config()).close()  # the same settings again: a run that resumes


def test_settings_that_are_newer_than_a_run_have_their_defaults(tmp_path):
    config = arithmetic.get_config()
    Workdir.open(tmp_path, config).close()
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["quantize"], stored["fit"]["attention"], stored["fit"]["optimizer"]["schedule"]
    path.write_text(json.dumps(stored))
    for given in (None, config):
        with Workdir.open(tmp_path, given) as workdir:
            assert not differences(workdir.config, config)


def test_other_settings_are_refused_with_both_values(tmp_path):
    Workdir.open(tmp_path, make_config()).close()
    before = (tmp_path / "config.json").read_text()
    message = refusal(Workdir.open, tmp_path, make_config(seed=1, new="x"))
    assert str(tmp_path) in message and "seed: 0 -> 1" in message and "new: absent -> 'x'" in message
    assert "fit" not in message and "--workdir" in message
    assert (tmp_path / "config.json").read_text() == before
    Workdir.open(tmp_path).close()  # the refusal gave the lock back


def test_a_run_goes_on_with_another_mesh(tmp_path):
    """The one that is given; without a config the stored one, which is not changed."""
    mesh = {"name": "v5e_8", "fit": {"fsdp": 8}}
    Workdir.open(tmp_path, make_config(mesh=mesh)).close()
    for other in ({"name": "cpu"}, {"name": "v5e_8", "fit": {"fsdp": 4, "tensor": 2}}):
        with Workdir.open(tmp_path, make_config(mesh=other)) as workdir:
            assert workdir.config.mesh.to_dict() == other
    with Workdir.open(tmp_path, make_config()) as workdir:
        assert "mesh" not in workdir.config
    with Workdir.open(tmp_path) as workdir:
        assert workdir.config.mesh.to_dict() == mesh
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        Workdir.open(tmp_path, make_config(mesh={"name": "cpu"}, seed=1))


def test_a_run_with_chats_keeps_the_date_that_it_was_begun_on(tmp_path):
    """A chat template may write it: the prompts stay the same on the next day, for all processes of the run."""
    begun, chats = datetime.date(2024, 2, 29), make_config(prompt_format="chat")
    with Workdir.open(tmp_path, chats, date=begun) as workdir:
        assert workdir.date == begun
        assert json.loads((tmp_path / "config.json").read_text())["date"] == "2024-02-29"
    for config in (None, chats):
        with Workdir.open(tmp_path, config, date=datetime.date(2024, 3, 1)) as workdir:
            assert workdir.date == begun == Workdir.attach(tmp_path, config).date
            assert "date" not in workdir.config
    stored = json.loads((tmp_path / "config.json").read_text())
    for date in ("yesterday", 3, None):
        (tmp_path / "config.json").write_text(json.dumps(stored | {"date": date}))
        with pytest.raises(UserError, match="has the date .*; write it as YYYY-MM-DD"):
            Workdir.open(tmp_path)
    del stored["date"]  # as an older version left it
    (tmp_path / "config.json").write_text(json.dumps(stored))
    Workdir.open(tmp_path).close()
    with Workdir.open(tmp_path, date=begun) as workdir:
        assert datetime.date.today() - workdir.date <= datetime.timedelta(1)


def test_what_is_no_workdir_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (tmp_path / "absent", tmp_path, file):
        with pytest.raises(UserError, match="is not a workdir"):
            Workdir.open(path)
    for path in (file, file / "inside"):
        with pytest.raises(UserError, match="a file is in the way"):
            Workdir.open(path, make_config())
    assert sorted(tmp_path.iterdir()) == [file] and file.read_text() == "mine"


def test_a_damaged_config_is_named(tmp_path):
    Workdir.open(tmp_path, make_config()).close()
    (tmp_path / "config.json").write_text('{\n"seed": \n')
    with pytest.raises(UserError, match="config.json is damaged .*line 3"):
        Workdir.open(tmp_path)


HOLD = """
import sys
from ml_collections import ConfigDict
from qsharp_jax.configs import arithmetic
from qsharp_jax.run.config import differences
from qsharp_jax.run.workdir import Workdir
workdir = Workdir.open(sys.argv[1], ConfigDict({"seed": 0}))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    config = ConfigDict({"seed": 0})
    holder = in_another_process(HOLD, tmp_path)
    try:
        assert holder.stdout.readline() == "held\n", holder.stderr.read()
        for _ in range(2):  # a refused one does not spoil the name of the holder
            with pytest.raises(UserError, match=f"in use by process {holder.pid};.*--workdir"):
                Workdir.open(tmp_path, config)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    Workdir.open(tmp_path, config).close()


def test_the_lock_names_its_last_holder_and_is_given_back(tmp_path):
    with Workdir.open(tmp_path, make_config()):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()};"):
            Workdir.open(tmp_path)
    workdir = Workdir.open(tmp_path)
    workdir.close()
    workdir.close()  # twice does no harm
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    workdir = Workdir.open(tmp_path, make_config())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        os._exit(0)
    try:
        workdir.close()
        Workdir.open(tmp_path).close()
    finally:
        os.write(write, b".")
        os.waitpid(child, 0)


@pytest.fixture
def workdir(tmp_path):
    with Workdir.open(tmp_path, make_config()) as workdir:
        yield workdir


def test_metrics_come_back_in_order_and_are_strict_json(workdir):
    assert workdir.read_metrics() == []
    workdir.append_metrics({"step": 1, "loss": 0.5, "phase": "fit", "first": True})
    workdir.append_metrics({"loss": math.nan, "kl": [math.inf, 1.0], "deep": {"x": -math.inf}, "none": None})
    workdir.append_metrics({"step": np.int64(3), "loss": np.float32("nan"), "mean": np.array(0.25, np.float32)})
    workdir.append_metrics({"loss": jnp.float32(0.5), "step": jnp.int32(2)})
    for line in workdir.metrics.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert workdir.read_metrics() == [
        {"step": 1, "loss": 0.5, "phase": "fit", "first": True},
        {"loss": None, "kl": [None, 1.0], "deep": {"x": None}, "none": None},
        {"step": 3, "loss": None, "mean": 0.25},
        {"loss": 0.5, "step": 2},
    ]


@pytest.mark.parametrize("half", [b"{", b'{"step": 2, "loss": 0.', b'{"step": 2}', b'{"text": "\xc3'])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_half_line_is_passed_over_and_mended_by_the_next_append(workdir, half, before):
    rows = [{"step": step} for step in range(before)]
    for row in rows:
        workdir.append_metrics(row)
    with open(workdir.metrics, "ab") as file:
        file.write(half)
    assert workdir.read_metrics() == rows
    workdir.append_metrics({"step": 9})
    workdir.append_metrics({"step": 10})
    assert workdir.read_metrics() == [*rows, {"step": 9}, {"step": 10}]
    assert workdir.metrics.read_text().count("\n") == before + 2


def test_damage_elsewhere_is_named_with_its_line(workdir):
    workdir.metrics.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2, is damaged"):
        workdir.read_metrics()


def test_a_killed_writer_loses_nothing_that_it_wrote(tmp_path):
    code = HOLD.replace("sys.stdin.read()", "[workdir.append_metrics({'step': step}) for step in range(10**9)]")
    writer = in_another_process(code, tmp_path)
    assert writer.stdout.readline() == "held\n", writer.stderr.read()
    while not (tmp_path / "metrics.jsonl").exists() or (tmp_path / "metrics.jsonl").stat().st_size < 1000:
        assert writer.poll() is None, writer.stderr.read()
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    with Workdir.open(tmp_path) as workdir:
        steps = [row["step"] for row in workdir.read_metrics()]
        assert len(steps) > 10 and steps == list(range(len(steps)))
        workdir.append_metrics({"step": -1})
        assert workdir.read_metrics()[-1] == {"step": -1}


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), ValueError("Bad Request: invalid")], ids=repr
)
def test_settings_that_cannot_be_read_are_not_called_damaged(workdir, monkeypatch, error):
    """As by a disk that fails, or a bucket, whose client has such a ValueError."""

    def fail(path):
        raise error

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(type(error)) as caught:
        Workdir.attach(workdir.path)
    assert caught.value is error


def test_write_atomic_replaces_the_whole_file(tmp_path):
    path = tmp_path / "results.json"
    for text in ("a" * 10_000, "é\n", ""):
        write_atomic(path, text)
        assert path.read_text(encoding="utf-8") == text
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "report.md", "\ud800")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, error):
    def fail(*_):
        raise error

    path = tmp_path / "results.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)) as caught:
        write_atomic(path, "new")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"
    if isinstance(error, OSError):
        assert caught.value.filename == str(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_explained_with_the_name_of_the_file(workdir):
    workdir.metrics.symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        workdir.append_metrics({"step": 1})
    assert explain_os_error(caught.value).startswith(f"{workdir.metrics}: the disk is full; ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_explained(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError) as caught:
        Workdir.open(tmp_path / "run", make_config())
    assert "permission is denied" in explain_os_error(caught.value)


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")],
)
def test_some_os_errors_are_explained(code, words):
    named, bare = OSError(code, os.strerror(code), "runs/x/report.md"), OSError(code, os.strerror(code))
    assert words in explain_os_error(named) and explain_os_error(named).startswith("runs/x/report.md: ")
    assert words in explain_os_error(bare) and "None" not in explain_os_error(bare)
    assert explain_os_error(OSError(errno.EPIPE, "Broken pipe")) is explain_os_error(OSError("no number")) is None
