"""launch/tpu.sh against a gcloud that plays a TPU's life, and hosts that are folders: what is called, in which order."""

import json
import os
import shlex
import shutil
import signal
import subprocess

import pytest
from fakes import verb
from marks import slow

TPU = ["--name", "q", "--zone", "z"]
RUN = ["run", *TPU]
ARGUMENTS = ["--", "--config", "configs/arithmetic.py", "--workdir", "/nfs/run", "--config.mesh=v5e_16"]
ONE, FOUR = ["--type", "v6e-4"], ["--type", "v5e-16"]
WORDS = "run --config code/configs/arithmetic.py --workdir /nfs/run --config.mesh=v5e_16 --coordinator tpu"
LOOK, MAKE, FROM_READY = (
    ["describe", "state"],
    ["create", "describe"],
    ["state", "scp", "install", "start", "describe", "state"],
)


def without_scratch(call: list[str]) -> list[str]:
    """A launch's temporary folder has its process id in its name."""
    return ["SCRATCH" if "/qsharp-" in word else word for word in call]


def launch(world, *words: str, **more: str):
    return world.run("tpu.sh", *RUN, *words, *ARGUMENTS, **more)


@pytest.mark.parametrize(("slice_type", "hosts"), [(ONE, 1), (FOUR, 4)])
def test_a_run_makes_the_slice_and_starts_the_same_program_on_every_host(world, slice_type, hosts):
    world.play(hosts, [["CREATING", "READY"]], [["0"] * hosts])
    done = launch(world, *slice_type)
    assert done.returncode == 0, done.stderr
    assert world.verbs() == ["describe", *MAKE, *FROM_READY]
    installed = [f"{world.folder}/home/{host}/qsharp/code[tpu]" for host in range(hosts)]
    assert sorted(world.lines("installed")) == installed
    started = sorted(world.started(), key=lambda start: start["host"])
    assert [start["host"] for start in started] == [str(host) for host in range(hosts)]
    assert {start["words"] for start in started} == {WORDS}
    assert {start["platforms"] for start in started} == {"tpu,cpu"}
    for host in range(hosts):
        files = world.folder / "home" / str(host) / "qsharp"
        assert f"this is host {host}" in (files / "LOG").read_text()
        assert (files / "EXIT").read_text() == "0\n"
        assert (files / "code" / "configs" / "arithmetic.py").exists()


def test_the_commands_are_gclouds(world):
    world.play(4, [["READY"]], [["0"] * 4])
    assert launch(world, *FOUR, "--spot", "--project", "p").returncode == 0
    tail = ["--zone", "z", "--project", "p", "--quiet"]
    calls = {verb(call): call for call in world.calls()}
    head = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert calls["describe"] == [*head, "describe", "q", "--format=value(state)", *tail]
    kind = ["--accelerator-type", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite", "--spot"]
    assert calls["create"] == [*head, "create", "q", *kind, *tail]
    assert calls["scp"][:5] == [*head, "scp"] and calls["scp"][6:] == ["q:qsharp.tar.gz", "--worker=all", *tail]
    assert calls["start"][:7] == [*head, "ssh", "q", "--worker=all"] and calls["start"][8:] == tail


@pytest.mark.parametrize(("slice_type", "hosts"), [(ONE, 1), (FOUR, 4)])
def test_after_a_preemption_the_slice_is_deleted_and_made_again_and_the_program_resumes(world, slice_type, hosts):
    lives = [["CREATING", "READY", "READY", "READY", "PREEMPTED"], ["CREATING", "READY"]]
    world.play(hosts, lives, [["forever"] * hosts, ["0"] * hosts])
    world.fail_once("create")
    done = launch(world, *slice_type, "--spot")
    assert done.returncode == 0, done.stderr
    first = ["describe", "create", "describe", *MAKE, *FROM_READY, *LOOK]  # one creation failed
    assert world.verbs() == [*first, "describe", "delete", "describe", *MAKE, *FROM_READY]
    assert [start["words"] for start in world.started()] == [WORDS] * 2 * hosts
    assert "q is PREEMPTED" in done.stderr


@pytest.mark.parametrize("kind", ["start", *map(slow, ("describe", "create", "scp", "install", "state", "delete"))])
def test_any_call_may_fail_once(world, kind):
    world.play(1, [["READY", "READY", "READY", "READY", "READY", "PREEMPTED"], ["READY"]], [["forever"], ["0"]])
    world.fail_once(kind)
    done = launch(world, *ONE)
    assert done.returncode == 0, done.stderr
    assert not (world.folder / "fail" / kind).exists()
    assert "UNAVAILABLE: try again" in done.stderr
    assert [start["words"] for start in world.started()] == [WORDS] * 2


def test_a_queued_resource_is_waited_for_and_its_node_used(world):
    states = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    world.play(4, [[*states, "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"], states], [["forever"] * 4, ["0"] * 4])
    done = launch(world, *FOUR, "--queued", "--spot")
    assert done.returncode == 0, done.stderr
    calls = {verb(call): call[3:] for call in world.calls()}
    node = ["--node-id", "q", "--accelerator-type", "v5litepod-16", "--runtime-version", "v2-alpha-tpuv5-lite"]
    tail = ["--zone", "z", "--quiet"]
    assert calls["create"] == ["queued-resources", "create", "q", *node, "--spot", *tail]
    assert calls["describe"] == ["queued-resources", "describe", "q", "--format=value(state.state)", *tail]
    assert calls["delete"] == ["queued-resources", "delete", "q", "--force", *tail]
    assert calls["start"][:2] == ["tpu-vm", "ssh"]
    assert len(world.started()) == 8


def test_an_interrupted_launch_finds_the_program_running(world):
    world.play(4, [["READY"]], [["finish"] * 4])
    first = world.start("tpu.sh", *RUN, *FOUR, *ARGUMENTS)
    world.wait(lambda: len(world.started()) == 4)
    first.terminate()
    first.communicate(timeout=180)
    before = len(world.calls())

    another = world.run("tpu.sh", *RUN, *FOUR, *ARGUMENTS, "--config.seed=2")
    assert another.returncode == 2 and "another run is under way on q" in another.stderr

    again = world.start("tpu.sh", *RUN, *FOUR, *ARGUMENTS)
    world.wait(lambda: len(world.calls()) > before + 4)
    (world.folder / "finish").touch()
    again.communicate(timeout=180)
    assert again.returncode == 0
    assert {verb(call) for call in world.calls()[before:]} == {"describe", "state"}
    assert len(world.started()) == 4


def test_a_failure_on_one_host_ends_the_others_and_is_the_exit_code(world):
    world.play(4, [["READY"]], [["forever", "forever", "3", "forever"]])
    done = launch(world, *FOUR)
    assert done.returncode == 3
    assert "exit code 3" in done.stderr and "this is host 2" in done.stderr
    assert world.pids() and not world.alive()
    assert "delete" not in world.verbs()


def test_a_failure_while_the_slice_is_being_preempted_is_not_the_programs(world):
    lives = [["READY", "READY", "PREEMPTED"], ["READY"]]
    world.play(4, lives, [["forever", "1", "1", "1"], ["0"] * 4])
    done = launch(world, *FOUR)
    assert done.returncode == 0, done.stderr
    assert len(world.started()) == 8


def test_a_host_that_was_rebooted_has_all_started_anew(world):
    world.play(4, [["READY"]], [["finish"] * 4])
    launched = world.start("tpu.sh", *RUN, *FOUR, *ARGUMENTS)
    world.wait(lambda: len(world.started()) == 4 and world.verbs()[-1] in LOOK)
    os.killpg(world.pids()[2], signal.SIGKILL)
    world.wait(lambda: len(world.started()) == 8)
    (world.folder / "finish").touch()
    _, err = launched.communicate(timeout=180)
    assert launched.returncode == 0 and "without an exit code" in err


def test_the_other_commands(world):
    world.play(2, [["READY"]], [["finish"] * 2])
    launched = world.start("tpu.sh", *RUN, "--type", "v4-16", *ARGUMENTS)
    world.wait(lambda: len(world.started()) == 2 and world.verbs()[-1] in LOOK)

    status = world.run("tpu.sh", "status", *TPU)
    assert status.stdout.splitlines() == ["READY", "qsharp: running", "qsharp: running"]

    attached = world.start("tpu.sh", "attach", *TPU)
    world.wait(lambda: "log" in world.verbs())
    assert "--worker=0" in next(call for call in world.calls() if verb(call) == "log")

    assert world.run("tpu.sh", "stop", *TPU).returncode == 0
    assert world.pids() and not world.alive()
    assert "this is host 0" in attached.communicate(timeout=180)[0]  # the log's end is attach's
    launched.communicate(timeout=180)
    assert launched.returncode == 143  # it was ended, so nothing is started again

    assert world.run("tpu.sh", "delete", *TPU).returncode == 0
    assert world.calls()[-1][3:] == ["tpu-vm", "delete", "q", "--zone", "z", "--quiet"]


def test_hosts_clone_a_repository(world):
    world.play(1, [["READY"]], [["0"]])
    done = launch(world, *ONE, "--repo", f"file://{world.repo}")
    assert done.returncode == 0, done.stderr
    assert "scp" not in world.verbs() and world.started()[0]["words"] == WORDS


def test_a_second_run_replaces_the_code_and_keeps_a_relative_workdir(world):
    world.play(1, [["READY"]], [["0"]])
    arguments = ["--", "--config", "configs/arithmetic.py", "--workdir", "runs/a"]
    assert world.run("tpu.sh", *RUN, *ONE, *arguments).returncode == 0
    home = world.folder / "home" / "0" / "qsharp"
    assert world.started()[0]["cwd"] == str(home)
    (home / "runs").mkdir()
    (home / "code" / "stale.py").touch()
    assert world.run("tpu.sh", *RUN, *ONE, *arguments).returncode == 0
    assert (home / "runs").exists() and not (home / "code" / "stale.py").exists()
    assert len(world.lines("installed")) == 1  # what is installed already is not installed again


def test_where_the_image_has_no_recent_python_uv_brings_one(world):
    world.play(1, [["READY"]], [["0"]])
    (world.bin / "python3.13").rename(world.folder / "python3.12")
    for old in ("python3", "python3.11", "python3.12", "python3.13"):
        world.put(old, "#!/bin/sh\nexit 1\n")
    uv = (
        '#!/bin/bash\n[[ $1$2 == pythoninstall ]] && mkdir -p "$UV_PYTHON_INSTALL_DIR/bin" '
        '&& cp "$FAKE/python3.12" "$UV_PYTHON_INSTALL_DIR/bin"\n'
        '[[ $1$2 != pythonfind ]] || echo "$UV_PYTHON_INSTALL_DIR/bin/python3.12"\n'
    )
    (world.folder / "uv").write_text(uv)
    world.put("curl", '#!/bin/sh\necho \'mkdir -p "$UV_INSTALL_DIR" && install "$FAKE/uv" "$UV_INSTALL_DIR/uv"\'\n')
    done = launch(world, *ONE)
    assert done.returncode == 0, done.stderr
    assert world.started()[0]["words"] == WORDS


def test_each_life_gets_the_variables_and_no_command_line_has_their_values(world):
    world.play(4, [["READY", "READY", "READY", "PREEMPTED"], ["READY"]], [["forever"] * 4, ["0"] * 4])
    done = launch(world, *FOUR, "--env", "HF_TOKEN", "--env", "EMPTY", HF_TOKEN="it's a secret", EMPTY="")
    assert done.returncode == 0, done.stderr
    assert [start["token"] for start in world.started()] == ["it's a secret"] * 8
    assert world.lines("copied").count("ENV 600") == 8
    assert "secret" not in str(world.calls()) + done.stdout + done.stderr
    assert list(world.folder.glob("home/**/ENV")) == [] == list(world.folder.glob("qsharp-*"))
    dry = launch(world, *FOUR, "--env", "HF_TOKEN", "--dry-run", HF_TOKEN="it's a secret")
    assert "/ENV q:qsharp/ENV --worker=all" in dry.stdout and "secret" not in dry.stdout


def test_a_bad_request_is_not_tried_again(world):
    world.play(1, [["READY"]], [["0"]])
    world.fail_once("create", "ERROR: (gcloud) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied")
    done = launch(world, *ONE)
    assert done.returncode == 2 and "PERMISSION_DENIED" in done.stderr
    assert world.verbs() == ["describe", "create"]


def test_it_gives_up_after_so_many_failures_in_a_row(world):
    world.play(1, [["FAILED"]] * 5, [["0"]] * 5)
    done = launch(world, *ONE, QSHARP_ATTEMPTS="3")
    assert done.returncode == 1 and "giving up after 3 failures in a row" in done.stderr
    assert world.verbs().count("delete") == 3


@pytest.mark.parametrize("queued", [[], ["--queued"]])
def test_a_dry_run_prints_every_command_and_runs_none(world, queued):
    ready = "ACTIVE" if queued else "READY"
    gone = "SUSPENDED" if queued else "PREEMPTED"
    world.play(4, [[ready, ready, ready, gone], [ready]], [["forever"] * 4, ["0", "0", "0", "4"]])
    dry = launch(world, *FOUR, "--spot", *queued, "--dry-run")
    assert dry.returncode == 0 and dry.stderr == "" and world.calls() == []
    lines = [line for line in dry.stdout.splitlines() if not line.startswith("#")]
    printed = [shlex.split(line) for line in lines]
    assert launch(world, *FOUR, "--spot", *queued).returncode == 4
    assert any(words[:4] == ["git", "-C", str(world.repo), "archive"] for words in printed)

    printed = [without_scratch(words) for words in printed if words[0] == "gcloud"]
    for call in world.calls():
        assert without_scratch(call) in printed
    for words in printed:
        assert words in [without_scratch(call) for call in world.calls()]
    for command in ("attach", "status", "stop", "delete"):
        before = len(world.calls())
        dry = world.run("tpu.sh", command, *TPU, *queued, "--dry-run")
        assert dry.returncode == 0 and dry.stdout.startswith("gcloud compute tpus ")
        assert len(world.calls()) == before


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="the parser of the real gcloud judges; it asks no server")
def test_gclouds_own_parser_takes_the_commands(world):
    commands = set()
    for queued in ([], ["--queued"]):
        dry = launch(world, *FOUR, "--spot", "--project", "p", *queued, "--dry-run")
        for line in dry.stdout.splitlines():
            words = without_scratch(shlex.split(line))
            words = ["--command=x" if word.startswith("--command=") else word for word in words]
            if words[0] == "gcloud":
                commands.add(shlex.join(words))
    assert len(commands) == 8
    environment = os.environ | {"CLOUDSDK_CONFIG": str(world.folder / "gcloud")}
    for command in commands:
        lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={command}"]
        answer = subprocess.run(lint, check=True, capture_output=True, text=True, env=environment).stdout
        (result,) = json.loads(answer)
        assert result["success"], (command, result["error_message"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give one of run, attach, status, stop, delete first"),
        (["fly"], "give one of run, attach"),
        (["run", "--zone", "z"], "give the TPU's name: --name NAME"),
        (["run", "--name", "q"], "give the TPU's zone: --zone ZONE"),
        (["run", "--name"], "--name needs a value"),
        (["run", "--name", "--zone"], "--name needs a value"),
        ([*RUN, *ARGUMENTS], "unknown --type ''"),
        ([*RUN, "--type", "h100-8", *ARGUMENTS], "unknown --type 'h100-8'; give one such as v4-8"),
        ([*RUN, "--type", "v6e-5", *ARGUMENTS], "there is no --type v6e-5: v6e comes with 1, 4, 8"),
        ([*RUN, "--type", "v4-12", *ARGUMENTS], "there is no --type v4-12: v4 comes in multiples of 8"),
        ([*RUN, *ONE, "--fast", *ARGUMENTS], "unknown option --fast"),
        ([*RUN, *ONE], "give the arguments of `qsharp run` after --"),
        ([*RUN, *ONE, "--", "--workdir", "/w"], "give the arguments of `qsharp run` after --"),
        ([*RUN, *ONE, "--", "--config", "configs/arithmetic.py", "--workdir", "s3://b/w"], "s3://b/w is neither"),
        ([*RUN, *ONE, "--", "--workdir=/w", "--config", "mine.py"], "--config mine.py is not in HEAD"),
        (
            [*RUN, *FOUR, "--", "--config", "configs/arithmetic.py", "--workdir", "runs/a"],
            "another folder on each of the 4",
        ),
        ([*RUN, *FOUR, *ARGUMENTS[:-1], "--config.seed=1"], "4 hosts need --config.mesh=NAME among the arguments"),
        ([*RUN, *ONE, "--env", "NOT_SET", *ARGUMENTS], "--env takes the name of a variable that is exported"),
        ([*RUN, *ONE, "--env", "HOME=x", *ARGUMENTS], "--env takes the name of a variable that is exported"),
    ],
)
def test_bad_input_is_answered_by_one_sentence(world, words, sentence):
    done = world.run("tpu.sh", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("tpu.sh: ") and sentence in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == "" and world.calls() == []


def test_without_gcloud_it_says_so(world):
    (world.bin / "gcloud").unlink()
    path = world.folder / "path"
    path.mkdir()
    for name in ("bash", "dirname", "basename"):
        (path / name).symlink_to(shutil.which(name))
    done = launch(world, *ONE, PATH=str(path))
    assert done.returncode == 2 and "there is no gcloud on the PATH" in done.stderr
