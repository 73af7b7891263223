"""Several processes on one run, one a host: how they meet, who has which share, and how all end when one does.

Every process runs the same program on the same workdir. The first prints, reports and writes what there is one of. A
connection from each to the first is held all the time, so that one that dies, or refuses to go on, ends the others at
once and is named: JAX's collectives would wait for it, or abort without a word to the user.
"""

import contextlib
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qsharp_jax.system.errors import Stopped, UserError
from qsharp_jax.system.sigterm import Peers, leave, requested

PORT = 8476  # of the coordinator where nobody names one; the next one up is for the connections
_PATIENCE = 45  # seconds without a sign of a host until it counts as dead
_STOP = "stop"  # on a connection: a SIGTERM came to the sender


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among several: where they meet, how many they are, and which this one is."""

    host: str
    port: int
    count: int
    index: int


# --- How they meet --------------------------------------------------------------------------------------------------


def find_place(coordinator: str, count: int | None, index: int | None) -> Place:
    """Args:
      coordinator: "tpu" (by the TPU VM's metadata), "slurm" (by srun's variables), or HOST:PORT of process 0.
      count, index: with HOST:PORT only.

    Raises:
      UserError: if it is none of these, or what it names is not there.
    """
    found = {"tpu": _of_tpu, "slurm": _of_slurm}.get(coordinator)
    if found:
        if (count, index) != (None, None):
            raise UserError(f"--processes and --process go with --coordinator HOST:PORT; {coordinator} knows them")
        return found()
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise UserError(f"--coordinator is {coordinator!r}; give HOST:PORT of the first process, tpu or slurm")
    if count is None or index is None or not 0 <= index < count:
        raise UserError("--coordinator HOST:PORT needs --processes N, and --process I from 0 to N - 1")
    return Place(host, int(port), count, index)


def _of_slurm() -> Place:
    try:
        count, index = int(os.environ["SLURM_STEP_NUM_TASKS"]), int(os.environ["SLURM_PROCID"])
        nodes, job = os.environ["SLURM_STEP_NODELIST"], int(os.environ["SLURM_JOB_ID"])
        names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (KeyError, ValueError, OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"--coordinator slurm finds no SLURM step around it ({type(error).__name__}: {error}); start it with srun"
        ) from None
    # Two jobs may have the same first node.
    return Place(names.stdout.split()[0], 20000 + 2 * (job % 20000), count, index)


def _of_tpu() -> Place:
    def attribute(name: str) -> str:
        host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
        url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=10
        ) as answer:
            return answer.read().decode()

    try:
        hosts = [endpoint.split(":")[2] for endpoint in attribute("worker-network-endpoints").split(",")]
        worker = int(attribute("agent-worker-number"))
        slices = int(os.environ.get("MEGASCALE_NUM_SLICES", "1"))
        number = int(os.environ.get("MEGASCALE_SLICE_ID", "0"))
    except (OSError, IndexError, ValueError) as error:
        raise UserError(
            f"--coordinator tpu finds no TPU VM's metadata here ({error}); start it on a TPU VM, or give HOST:PORT"
        ) from None
    first = os.environ.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).partition(":")[0]
    return Place(first, PORT, slices * len(hosts), number * len(hosts) + worker)


@contextlib.contextmanager
def joined(place: Place, timeout: int, explain: Callable[[BaseException], tuple[int, str]]) -> Iterator[Peers]:
    """All processes of a run have met, and `jax.distributed` is up. What is raised inside ends all of them.

    Gives the ways to end or stop them at any moment, from any thread.

    Args:
      timeout: seconds to wait for the others.
      explain: the exit code and the sentence for an error.

    Raises:
      UserError: if the others do not come, or the first cannot be reached.
    """
    watch = _FirstWatch(place, timeout) if place.index == 0 else _Watch(place, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Undetected, since under SLURM a process is else given the one device of its rank on the host.
    jax.distributed.initialize(
        f"{place.host}:{place.port}", place.count, place.index, initialization_timeout=timeout,
        cluster_detection_method="deactivate",
    )  # fmt: skip

    def end_all(code: int, sentence: str) -> None:
        watch.tell(code, f"{_who(place.index)} has ended: {sentence}" if code else sentence)
        leave(code, sentence)

    try:
        yield Peers(end_all, watch.stop)
        wait_for_all("the end of the run")
    except BaseException as error:
        if not isinstance(error, UserError | Stopped):
            time.sleep(2)  # it may be but the echo of another process's end, of which the watch hears in a moment
        end_all(*explain(error))
    watch.tell(0, "")


# --- The connections ------------------------------------------------------------------------------------------------


class _Watch:
    """Of a process that is not the first: a line to it, and a thread that reads its word about the others."""

    def __init__(self, place: Place, timeout: int):
        self._stopping = threading.Event()
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._line = socket.create_connection((place.host, place.port + 1), timeout=5)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"the coordinator {place.host}:{place.port} could not be reached within {timeout} s ({error});"
                        " see that process 0 has been started there, and that no firewall closes this port and the next"
                    ) from None
                time.sleep(0.5)
        _send(self._line, {"index": place.index, "count": place.count, "who": _who(place.index)})
        self._first = f"process 0 on {place.host}"
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while (message := _receive(self._line)) == _STOP:
            self._stopping.set()
            os.kill(os.getpid(), signal.SIGTERM)
        code, sentence = message or (2, f"{self._first} has died, and so all processes of the run end")
        if sentence:
            leave(code, sentence)

    def stop(self) -> None:
        """Pass a SIGTERM on to the other processes, once."""
        if not self._stopping.is_set():
            self._stopping.set()
            _send(self._line, _STOP)

    def tell(self, code: int, sentence: str) -> None:
        """How this process has ended; without a sentence, as it should."""
        _send(self._line, (code, sentence))


class _FirstWatch:
    """Of the first process: a line to each of the others, and a thread a line."""

    def __init__(self, place: Place, timeout: int):
        self._lines: dict[int, socket.socket] = {}
        self._ending, self._stopping = threading.Lock(), threading.Event()
        deadline = time.monotonic() + timeout
        with socket.create_server(("", place.port + 1)) as server:
            while len(self._lines) < place.count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    line, _ = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, place.count)) - set(self._lines))
                    raise UserError(
                        f"of {place.count} processes {', '.join(map(str, missing))} did not come to port"
                        f" {place.port + 1} within {timeout} s; see that they have been started, with this host's"
                        " address as coordinator"
                    ) from None
                met = _receive(line, timeout=5)
                if isinstance(met, dict) and met.get("count") == place.count and met["index"] not in self._lines:
                    self._lines[met["index"]] = line
                    threading.Thread(target=self._read, args=(line, met["who"]), daemon=True).start()

    def _read(self, line: socket.socket, who: str) -> None:
        while (message := _receive(line)) == _STOP:
            self.stop(but=line)
            os.kill(os.getpid(), signal.SIGTERM)
        code, sentence = message or (2, f"{who} has died")
        if not sentence:
            return
        with self._ending:  # the first that ends is the one that is named
            sentence += "; all processes of the run end" if code else ""
            self.tell(code, sentence, but=line)
            leave(code, sentence)

    def stop(self, but: socket.socket | None = None) -> None:
        """Pass a SIGTERM on to the other processes, or to all but the one at a line, once."""
        if not self._stopping.is_set():
            self._stopping.set()
            for line in self._lines.values():
                if line is not but:
                    _send(line, _STOP)

    def tell(self, code: int, sentence: str, but: socket.socket | None = None) -> None:
        """How this process has ended, or the one at a line; without a sentence, as it should."""
        for line in self._lines.values():
            if line is not but:
                _send(line, (code, sentence))


def _who(index: int) -> str:
    return f"process {index} (pid {os.getpid()} on {socket.gethostname()})"


def _send(line: socket.socket, what: Any) -> None:
    with contextlib.suppress(OSError):  # it has gone: its own thread will say so
        line.sendall(json.dumps(what).encode() + b"\n")


def _receive(line: socket.socket, timeout: float | None = None) -> Any:
    """What the other end says next; None if it has gone, says what is no JSON, or its host does not answer any more."""
    line.settimeout(timeout)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", _PATIENCE // 3), ("TCP_KEEPINTVL", _PATIENCE // 9), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):  # Linux has them
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    try:
        return json.loads(line.makefile("rb", buffering=0).readline())  # unbuffered, so that no more than this is read
    except (OSError, ValueError):
        return None


# --- Who does what --------------------------------------------------------------------------------------------------


def is_first() -> bool:
    return jax.process_index() == 0


def leads(together: int) -> bool:
    """Whether this process is the first of its group, and so keeps what all of the group have.

    Args:
      together: processes of a group, next to each other, which do the same on the devices of all of them.
    """
    return jax.process_index() % together == 0


def share(items: Sequence[Any], together: int = 1) -> Sequence[Any]:
    """This group's part of a sequence: items next to each other, as many as any other's give or take one.

    Args:
      together: as of `leads`.
    """
    bounds = np.linspace(0, len(items), jax.process_count() // together + 1).round().astype(int)
    group = jax.process_index() // together
    return items[bounds[group] : bounds[group + 1]]


def gather(items: list[Any], together: int = 1) -> list[Any]:
    """The lists of all groups, one after the other, in every process; their items are what JSON knows.

    Args:
      together: as of `leads`; the lists are those of the processes that lead.
    """
    if jax.process_count() == 1:
        return items
    parts = _gather_bytes(json.dumps(items).encode() if leads(together) else b"")
    return [item for part in parts for item in json.loads(part)]


def gather_rows(arrays: Mapping[str, np.ndarray], together: int = 1) -> dict[str, np.ndarray]:
    """Gather arrays in every process, bit for bit: the rows of the first group, then those of the next.

    Args:
      arrays: [rows, ...] each, with the same names in all groups but those that have no rows, which may give none.
      together: as of `gather`.
    """
    if jax.process_count() == 1:
        return dict(arrays)
    file = io.BytesIO()
    if arrays and leads(together):
        np.savez(file, allow_pickle=False, **arrays)
    parts = [np.load(io.BytesIO(part)) for part in _gather_bytes(file.getvalue())]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _gather_bytes(data: bytes) -> list[bytes]:
    """Gather the bytes of all processes, in their order, without those that have none."""
    sizes = multihost_utils.process_allgather(np.asarray([len(data)])).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    gathered = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [row[:size].tobytes() for row, size in zip(gathered, sizes, strict=True) if size]


def everywhere(condition: bool) -> bool:
    """Whether it holds in every process; all of them must ask."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.asarray(condition)).all())


def stop_if_told() -> None:
    """Raise `Stopped` in every process if one of them was told to stop; all of them have to call this."""
    if not everywhere(not requested()):
        raise Stopped


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Run a part that each process, or group of processes, does by itself; at its end all wait for each other.

    Raises:
      Stopped: in every process, if it was raised inside in one.
    """
    stopped = False
    try:
        yield
    except Stopped:
        stopped = True
    if not everywhere(not stopped):
        raise Stopped


def wait_for_all(what: str) -> None:
    """Returns when every process has come here; `what` is a name for the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
