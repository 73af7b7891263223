"""launch/cuda.sh here, by an ssh whose boxes are folders, and for SLURM: what is started where, and how it ends."""

import os
import shlex
import signal
import subprocess
import sys

import pytest
from fakes import verb

ARGUMENTS = ["--", "--config", "configs/arithmetic.py", "--workdir", "/nfs/run", "--config.mesh=cuda_8"]
WORDS = "run --config code/configs/arithmetic.py --workdir /nfs/run --config.mesh=cuda_8"
HERE = "run --config configs/arithmetic.py --workdir /nfs/run --config.mesh=cuda_8"
FLAG = "--xla_gpu_enable_latency_hiding_scheduler=true"
TWO = ["--hosts", "me@box1,box2"]


def by_order(world) -> list[dict[str, str]]:
    return sorted(world.started(), key=lambda start: start["host"])


@pytest.fixture
def gpu(world):
    """This machine has one, and a fake interpreter to install into."""
    world.put("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA'\n")
    return world


@pytest.mark.parametrize("code", [0, 3])
def test_here_it_sets_up_and_runs_in_the_foreground(gpu, code):
    done = gpu.run("cuda.sh", "--gpus", "2", *ARGUMENTS, FAKE_PROGRAM=str(code), FAKE_HOST="here")
    assert done.returncode == code, done.stderr
    (started,) = gpu.started()
    assert started["words"] == HERE and started["gpus"] == "0,1" and started["cwd"] == str(gpu.repo)
    assert started["platforms"] == "cuda,cpu" and started["flags"] == FLAG
    assert gpu.lines("installed") == [f"{gpu.repo}[cuda]"]


@pytest.mark.parametrize(("driver", "extra"), [("570.86.10", "cuda"), ("580.159.04", "cuda13"), ("1000.1", "cuda13")])
def test_jax_has_the_cuda_of_the_driver(world, driver, extra):
    world.put("nvidia-smi", f'#!/bin/sh\n[ "$1" = -L ] || echo {driver}\n')
    done = world.run("cuda.sh", *ARGUMENTS, FAKE_PROGRAM="0")
    assert done.returncode == 0, done.stderr
    assert world.run("setup.sh", "bench").returncode == 0
    assert world.lines("installed") == [f"{world.repo}[{extra}]", f"{world.repo}[{extra},bench]"]


def test_what_the_user_set_is_respected(world):
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = world.run("cuda.sh", *ARGUMENTS, FAKE_PROGRAM="0", **settings)
    assert done.returncode == 0, done.stderr
    (started,) = world.started()
    assert started["platforms"] == "cpu" and started["gpus"] == ""
    assert started["flags"] == f"{FLAG} --xla_force_host_platform_device_count=2"


def test_the_flags_are_ones_that_xla_knows():
    jax = "import jax; jax.numpy.ones(2).sum().block_until_ready()"  # a flag unknown to XLA aborts it
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAG}
    subprocess.run([sys.executable, "-c", jax], env=environment, check=True)


def test_by_ssh_each_box_has_one_process_that_knows_the_others(world):
    world.play(2, [], [["0", "0"]])
    done = world.run("cuda.sh", *TWO, "--port", "999", "--gpus", "4", *ARGUMENTS, XLA_FLAGS="--xla_x=1 --xla_y=2")
    assert done.returncode == 0, done.stderr
    meeting = "--coordinator box1:999 --processes 2 --process"
    assert [(start["host"], start["words"]) for start in by_order(world)] == [
        ("me@box1", f"{WORDS} {meeting} 0"),
        ("box2", f"{WORDS} {meeting} 1"),
    ][::-1]  # sorted by the name: box2, me@box1
    assert {start["flags"] for start in world.started()} == {f"{FLAG} --xla_x=1 --xla_y=2"}
    assert {start["platforms"] for start in world.started()} == {"cuda,cpu"}
    assert {start["gpus"] for start in world.started()} == {"0,1,2,3"}
    assert world.verbs()[:1] == ["state"] and world.verbs()[-1] == "state"
    assert world.verbs().index("install") < world.verbs().index("start")
    assert len([line for line in world.lines("installed") if line.endswith("/code[cuda]")]) == 2
    log = world.folder / "home" / "box2" / "qsharp" / "box2" / "LOG"
    assert "this is host box2" in log.read_text()


def test_one_box_alone_needs_no_meeting_point(world):
    world.play(1, [], [["0"]])
    arguments = ["--", "--config", "configs/arithmetic.py", "--workdir", "runs/a"]
    done = world.run("cuda.sh", "--hosts", "box1", "--repo", f"file://{world.repo}", *arguments)
    assert done.returncode == 0, done.stderr
    assert world.started()[0]["words"] == "run --config code/configs/arithmetic.py --workdir runs/a"
    assert world.started()[0]["cwd"] == f"{world.folder}/home/box1/qsharp/box1"


def test_boxes_share_a_bucket_and_get_what_reads_it(world):
    world.play(2, [], [["0", "0"]])
    arguments = ["--", "--config", "configs/arithmetic.py", "--workdir", "gs://bucket/a", "--config.mesh.hosts=2"]
    done = world.run("cuda.sh", *TWO, *arguments)
    assert done.returncode == 0, done.stderr
    assert all("--workdir gs://bucket/a" in start["words"] for start in world.started())
    assert len([line for line in world.lines("installed") if line.endswith("/code[cuda,gcs]")]) == 2


def test_boxes_get_the_variables_and_no_command_line_has_their_values(world):
    world.play(2, [], [["0", "0"]])
    done = world.run("cuda.sh", *TWO, "--env", "HF_TOKEN", *ARGUMENTS, HF_TOKEN="it's a secret")
    assert done.returncode == 0, done.stderr
    assert [start["token"] for start in world.started()] == ["it's a secret"] * 2
    assert "secret" not in str(world.calls()) + done.stdout + done.stderr
    assert list(world.folder.glob("home/**/ENV")) == []
    assert len([call for call in world.calls() if call[-1].startswith("umask 077 && cat >qsharp/box")]) == 2
    dry = world.run("cuda.sh", *TWO, "--env", "HF_TOKEN", "--dry-run", *ARGUMENTS, HF_TOKEN="it's a secret")
    assert "umask 077 && cat >qsharp/box1/ENV" in dry.stdout and "secret" not in dry.stdout


def test_a_failure_on_one_box_ends_the_others_and_is_the_exit_code(world):
    world.play(2, [], [["forever", "3"]])
    done = world.run("cuda.sh", *TWO, *ARGUMENTS)
    assert done.returncode == 3, done.stderr
    assert "this is host box2" in done.stderr
    assert len(world.pids()) == 2 and not world.alive()


def test_a_box_that_is_gone_ends_the_others(world):
    world.play(2, [], [["forever", "forever"]])
    launched = world.start("cuda.sh", *TWO, *ARGUMENTS)
    world.wait(lambda: len(world.started()) == 2 and world.verbs()[-1] == "state")
    os.killpg(world.pids()[0], signal.SIGKILL)
    _, err = launched.communicate(timeout=180)
    assert launched.returncode == 1 and "gone from a box" in err
    assert not world.alive()


def test_while_it_runs_a_box_may_be_out_of_reach(world):
    world.play(2, [], [["finish", "finish"]])
    launched = world.start("cuda.sh", *TWO, *ARGUMENTS)
    world.wait(lambda: len(world.started()) == 2 and world.verbs()[-1] == "state")
    world.fail_once("state", "ssh: connect to host box1 port 22: Connection timed out")
    world.wait(lambda: not (world.folder / "fail" / "state").exists())
    (world.folder / "finish").touch()
    _, err = launched.communicate(timeout=180)
    assert launched.returncode == 0 and "out of reach (1 of 30" in err


def test_a_box_that_cannot_be_reached_at_first_is_an_error(world):
    world.play(1, [], [["0"]])
    world.fail_once("state", "ssh: Could not resolve hostname box1")
    done = world.run("cuda.sh", "--hosts", "box1", *ARGUMENTS)
    assert done.returncode == 2 and "Could not resolve hostname" in done.stderr
    assert world.started() == []


def test_an_interrupted_launch_finds_the_program_running_and_the_other_commands_work(world):
    world.play(2, [], [["finish", "finish"]])
    first = world.start("cuda.sh", *TWO, *ARGUMENTS)
    world.wait(lambda: len(world.started()) == 2 and world.verbs()[-1] == "state")
    first.terminate()
    first.communicate(timeout=180)

    other = world.run("cuda.sh", *TWO, *ARGUMENTS, "--config.seed=2")
    assert other.returncode == 2 and "another run is under way" in other.stderr
    status = world.run("cuda.sh", "status", *TWO)
    assert status.stdout.splitlines() == ["qsharp: running"] * 2
    attached = world.start("cuda.sh", "attach", *TWO)

    again = world.start("cuda.sh", *TWO, *ARGUMENTS)
    assert again.stderr.readline() == "cuda.sh: running on 2 box(es); `cuda.sh attach` shows the log\n"
    assert world.run("cuda.sh", "stop", *TWO).returncode == 0
    again.communicate(timeout=180)
    assert again.returncode == 143 and not world.alive()
    assert "this is host me@box1" in attached.communicate(timeout=180)[0]
    assert len(world.started()) == 2 and len([call for call in world.calls() if verb(call) == "install"]) == 2


def test_slurm_has_one_process_a_node_with_all_its_gpus(world):
    world.put("sbatch", '#!/bin/sh\ncp "$1" "$FAKE/submitted"\necho Submitted batch job 7\n')
    world.put(
        "srun", '#!/bin/sh\necho "$1" >"$FAKE/srun"; shift\necho "$JAX_LOCAL_DEVICE_IDS" >"$FAKE/before"\nexec "$@"\n'
    )
    done = world.run("cuda.sh", "--slurm", "3", "--gpus", "4", *ARGUMENTS, "it's", XLA_FLAGS="--xla_x=1")
    assert done.returncode == 0, done.stderr
    assert "Submitted batch job 7" in done.stdout
    script = "\n".join(world.lines("submitted"))
    for line in ("--nodes=3", "--ntasks-per-node=1", "--gpus-per-node=4", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3 " in script  # else JAX gives each task one GPU

    subprocess.run(["bash", world.folder / "submitted"], check=True, env=world.environment(FAKE_PROGRAM="0"))
    (started,) = world.started()
    assert started["words"] == f"{HERE} it's --coordinator slurm" and started["flags"] == f"{FLAG} --xla_x=1"
    assert world.lines("srun") == ["--kill-on-bad-exit=1"]


@pytest.mark.parametrize("where", [[], TWO, ["--slurm", "2", "--gpus", "8"]])
def test_a_dry_run_prints_every_command_and_runs_none(world, where):
    dry = world.run("cuda.sh", *where, "--dry-run", *ARGUMENTS)
    assert dry.returncode == 0 and dry.stderr == ""
    assert world.calls() == [] and world.lines("installed") == [] and not (world.repo / "runs").exists()
    subprocess.run(["bash", "-n"], input=dry.stdout, text=True, check=True)
    if where == TWO:
        world.play(2, [], [["0", "3"]])
        assert world.run("cuda.sh", *where, *ARGUMENTS).returncode == 3
        printed = [shlex.split(line.partition(" | ")[2] or line) for line in dry.stdout.splitlines() if line[0] != "#"]
        assert all(call in printed for call in world.calls())
        assert all(words in world.calls() for words in printed)
    else:
        assert f"bash {world.repo}/launch/setup.sh cuda\n" in dry.stdout
        together = " --coordinator slurm" if where else ""
        assert f"{world.repo}/.venv/bin/qsharp {HERE}{together}\n" in dry.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give the arguments of `qsharp run` after --"),
        (["--fast"], "unknown option --fast"),
        (["--hosts"], "--hosts needs a value"),
        (["--gpus", "two", *ARGUMENTS], "--gpus takes a number from 1 up, not 'two'"),
        (["--slurm", "0", *ARGUMENTS], "--slurm takes a number from 1 up"),
        (["--slurm", "2", *ARGUMENTS], "say how many GPUs a node has: --gpus N"),
        (["--slurm", "2", "--gpus", "1", "--hosts", "a", *ARGUMENTS], "give --hosts or --slurm, not both"),
        (["--slurm", "2", "--gpus", "1", *ARGUMENTS], "there is no sbatch on the PATH"),
        (["attach", "--slurm", "2", "--gpus", "1"], "`cuda.sh attach` goes with --hosts"),
        (["--repo", "URL", *ARGUMENTS], "--repo goes with --hosts"),
        (["--env", "HOME", *ARGUMENTS], "--env goes with --hosts"),
        ([*TWO, "--env", "NOT_SET", *ARGUMENTS], "--env takes the name of a variable that is exported"),
        ([*TWO, *ARGUMENTS[:-1]], "2 hosts need --config.mesh=NAME among the arguments"),
        (["--slurm", "2", "--gpus", "8", *ARGUMENTS[:-1]], "2 hosts need --config.mesh=NAME among the arguments"),
        (
            [*TWO, "--", "--config", "configs/arithmetic.py", "--workdir", "runs/a"],
            "another folder on each of the 2 hosts",
        ),
        ([*TWO, "--", "--config", "mine.py", "--workdir", "/w"], "--config mine.py is not in HEAD"),
        (["--", "--config", "mine.py", "--workdir", "/w"], "there is no config file mine.py"),
        (ARGUMENTS, "there is no NVIDIA GPU here"),
    ],
)
def test_bad_input_is_answered_by_one_sentence(world, words, sentence):
    done = world.run("cuda.sh", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("cuda.sh: ") and sentence in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == "" and world.calls() == [] and world.lines("installed") == []
