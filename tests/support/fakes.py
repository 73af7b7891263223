"""Stand-ins for gcloud, ssh, Python and the installed program, so that launches run whole on one machine.

Hosts are folders: a command for a host runs in bash with that folder as its home. `World` is what a test sets up and
asks; this file, run as a program, is the fake `gcloud` and the fake `ssh`. They share a folder, $FAKE:

  world.json   hosts: how many; lives: the states that `describe` plays, a list for each time that the TPU is made;
               programs: what the program does on each host, a list for each of these lives (see QSHARP)
  fail/VERB    the next call of that kind fails, with the message in the file
  calls        what was called, a line of JSON each
  copied       what scp brought to a host, with its mode
  home/HOST/   the hosts
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The interpreter that setup.sh finds, and puts in the virtual environment: notes what it is to install.
PYTHON = """#!/bin/bash
case "$*" in
    -c*) ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip --version") ;;
    "-m pip install "*) echo "${@: -1}" >>"$FAKE/installed" && cp "$FAKE/qsharp" "$(dirname "$0")/qsharp" ;;
    *) exit 99 ;;
esac
"""

# The installed program: ends at once with the exit code that the world gives it, runs on, or waits for a file `finish`.
QSHARP = """#!/bin/bash
echo "$FAKE_HOST|$JAX_PLATFORMS|$XLA_FLAGS|$CUDA_VISIBLE_DEVICES|$HF_TOKEN|$(env | grep ^MALLOC_ | sort | xargs)|$PWD|$*" >>"$FAKE/started"
echo "this is host $FAKE_HOST"
case $FAKE_PROGRAM in
    forever) sleep 60 ;;
    finish) until [[ -e $FAKE/finish ]]; do sleep 0.05; done ;;
    *) exit "$FAKE_PROGRAM" ;;
esac
"""


class World:
    """A folder with a checkout of the launch scripts, the fakes on a PATH, and what they are to do."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.repo = folder / "repo"
        self.bin = folder / "bin"
        (folder / "fail").mkdir(parents=True)
        (folder / "home").mkdir()
        self._make_checkout()
        self.bin.mkdir()
        for name in ("gcloud", "ssh"):
            self.put(name, f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" {name} "$@"\n')
        self.put("python3.13", PYTHON)
        self.put("nvidia-smi", "#!/bin/sh\nexit 9\n")
        (folder / "qsharp").write_text(QSHARP)
        (folder / "qsharp").chmod(0o755)

    def _make_checkout(self):
        shutil.copytree(ROOT / "launch", self.repo / "launch")
        for name in ("setup.py", "requirements.txt", "qsharp_jax/configs/arithmetic.py"):
            (self.repo / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.repo / name)
        (self.repo / "configs").symlink_to("qsharp_jax/configs")  # as in the repository
        git = ["git", "-C", str(self.repo), "-c", "user.name=test", "-c", "user.email=test@localhost"]
        for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "test"]):
            subprocess.run([*git, *words], check=True)

    def put(self, name: str, text: str):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def play(self, hosts: int, lives: list[list[str]], programs: list[list[str]]):
        (self.folder / "world.json").write_text(
            json.dumps({"hosts": hosts, "lives": lives, "programs": programs, "life": -1, "at": -1, "absent": True})
        )

    def fail_once(self, verb: str, message: str = "ERROR: UNAVAILABLE: try again"):
        (self.folder / "fail" / verb).write_text(message)

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.bin}:/usr/bin:/bin"
        return {"PATH": path, "HOME": str(self.folder), "FAKE": str(self.folder), "QSHARP_POLL_SECONDS": "0.1"} | more

    def start(self, script: str, *words: str, **more: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", f"launch/{script}", *words],
            cwd=self.repo, env=self.environment(**more), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, script: str, *words: str, **more: str) -> subprocess.CompletedProcess:
        process = self.start(script, *words, **more)
        out, err = process.communicate(timeout=180)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.lines("calls")]

    def verbs(self) -> list[str]:
        """The calls' kinds, one that is repeated named once."""
        kinds = [verb(call) for call in self.calls()]
        return [kind for kind, before in zip(kinds, [None, *kinds]) if kind != before]

    def started(self) -> list[dict[str, str]]:
        fields = ("host", "platforms", "flags", "gpus", "token", "malloc", "cwd", "words")
        return [dict(zip(fields, line.split("|"))) for line in self.lines("started")]

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def wait(self, condition, seconds: float = 90):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.lines("calls")
            time.sleep(0.02)

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in sorted((self.folder / "home").glob("*/**/PID"))]

    def alive(self) -> list[int]:
        """The programs that run; one that has ended may stay in the process table until it is asked after."""
        states = {pid: Path(f"/proc/{pid}/stat") for pid in self.pids()}
        return [
            pid for pid, stat in states.items() if stat.exists() and stat.read_text().rsplit(")")[-1].split()[0] != "Z"
        ]

    def kill(self):
        for pid in self.alive():
            os.killpg(pid, signal.SIGKILL)


def verb(call: list[str]) -> str:
    """The kind of call: gcloud's verb, and for a host's command that of host.sh."""
    words = " ".join(call)
    for kind in ("install", "start", "state", "stop", "log"):
        if f"host.sh {kind}" in words:
            return kind
    return call[4] if call[0] == "gcloud" else call[0]


def on_host(fake: Path, host: str, program: str, command: str) -> subprocess.Popen:
    home = fake / "home" / host
    home.mkdir(exist_ok=True)
    keep = {name: os.environ[name] for name in ("PATH", "FAKE")}
    env = keep | {"HOME": str(home), "FAKE_HOST": host, "FAKE_PROGRAM": program}
    return subprocess.Popen(["bash", "-c", command], cwd=home, env=env)


def give_up(message: str):
    print(message, file=sys.stderr)
    sys.exit(1)


def gcloud(fake: Path, words: list[str]):
    world = json.loads((fake / "world.json").read_text())
    group, what = words[2], words[3]
    state = None if world["absent"] else world["lives"][world["life"]][max(world["at"], 0)]
    if what == "describe":
        if world["absent"]:
            give_up("ERROR: (gcloud) NOT_FOUND: Resource was not found")
        life = world["lives"][world["life"]]
        world["at"] = min(world["at"] + 1, len(life) - 1)
        state = life[world["at"]]
        if state in ("PREEMPTED", "SUSPENDED"):
            lose(fake)
        print(state)
    elif what == "create":
        if not world["absent"]:
            give_up("ERROR: ALREADY_EXISTS")
        world |= {"life": world["life"] + 1, "at": -1, "absent": False}
    elif what == "delete":
        lose(fake)
        world["absent"] = True
    elif state not in ("READY", "ACTIVE"):
        give_up(f'ERROR: This TPU has terminal state "{state}", so it cannot be used anymore.')
    elif what == "scp":
        for host in range(world["hosts"]):
            home = fake / "home" / str(host)
            home.mkdir(exist_ok=True)
            copied = home / words[5].partition(":")[2]
            shutil.copy(words[4], copied)
            with open(fake / "copied", "a") as lines:
                lines.write(f"{copied.name} {copied.stat().st_mode & 0o777:o}\n")
    else:
        assert (group, what) == ("tpu-vm", "ssh")
        options = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
        hosts = range(world["hosts"]) if options["--worker"] == "all" else [int(options["--worker"])]
        programs = world["programs"][world["life"]]
        running = [on_host(fake, str(host), programs[host], options["--command"]) for host in hosts]
        if code := max(process.wait() for process in running):
            sys.exit(code)
        return  # what happens on the hosts is no change of the world
    change = fake / f"world.json.{os.getpid()}"  # other calls read the old world or the new one, and never a part
    change.write_text(json.dumps(world))
    change.replace(fake / "world.json")


def lose(fake: Path):
    """Do what a preemption does: the programs end, the disks are gone."""
    for path in (fake / "home").glob("*/qsharp/PID"):
        try:
            os.killpg(int(path.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass
    shutil.rmtree(fake / "home")
    (fake / "home").mkdir()


def ssh(fake: Path, words: list[str]):
    host, command = words[-2:]
    world = json.loads((fake / "world.json").read_text())
    programs = world["programs"][0]
    sys.exit(on_host(fake, host, programs[int(host[-1]) - 1], command).wait())


def main(name: str, words: list[str]):
    fake = Path(os.environ["FAKE"])
    call = [name, *words]
    with open(fake / "calls", "a") as calls:
        calls.write(json.dumps(call) + "\n")
    try:
        message = (fake / "fail" / verb(call)).read_text()
        (fake / "fail" / verb(call)).unlink()
    except FileNotFoundError:
        {"gcloud": gcloud, "ssh": ssh}[name](fake, words)
    else:
        give_up(message)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
