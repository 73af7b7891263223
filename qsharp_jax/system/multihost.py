"""Several processes on one run, one per host: how they meet, what each does, and how all end when one does.

Every process runs the same program on the same workdir. The first prints, reports and writes what exists once. Each
keeps a connection to the first, so that one that dies or fails ends the others at once and is named: JAX's collectives
would wait for it, or abort without a message.
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
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qsharp_jax.system.errors import Stopped, UserError
from qsharp_jax.system.sigterm import Peers, leave, requested

PORT = 8476  # the coordinator's default port; the next one is for the connections


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of one process among `count`: its index, and the address where they meet."""

    host: str
    port: int
    count: int
    index: int


# --- How they meet --------------------------------------------------------------------------------------------------


def find_place(coordinator: str, count: int | None, index: int | None) -> Place:
    """Find out where this process meets the others.

    Args:
      coordinator: "tpu" (by the TPU VM's metadata), "slurm" (by srun's variables), or HOST:PORT of process 0.
      count, index: with HOST:PORT only.

    Raises:
      UserError: if it is none of these, or the metadata or variables do not exist.
    """
    if coordinator in ("tpu", "slurm"):
        if (count, index) != (None, None):
            raise UserError(f"--processes and --process are only for --coordinator HOST:PORT, not for {coordinator}")
        return _place_by_tpu() if coordinator == "tpu" else _place_by_slurm()
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise UserError(f"--coordinator is {coordinator!r}; give HOST:PORT of the first process, tpu or slurm")
    if count is None or index is None or not 0 <= index < count:
        raise UserError("--coordinator HOST:PORT needs --processes N, and --process I from 0 to N - 1")
    return Place(host, int(port), count, index)


def _place_by_slurm() -> Place:
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


def _place_by_tpu() -> Place:
    def attribute(name: str) -> str:
        host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
        url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()

    def variables() -> dict[str, str]:
        """The environment, and what it lacks of the attribute whose lines are like MEGASCALE_NUM_SLICES: '2'."""
        try:
            lines = [line.partition(":") for line in attribute("tpu-env").splitlines()]
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            lines = []  # no such attribute: one slice
        return {name.strip(): text.strip().strip("'") for name, _, text in lines} | os.environ

    try:
        # An endpoint is NAME:ID:ADDRESS or an address alone.
        hosts = [endpoint.rpartition(":")[2] for endpoint in attribute("worker-network-endpoints").split(",")]
        worker, megascale = int(attribute("agent-worker-number")), variables()
        slices = int(megascale.get("MEGASCALE_NUM_SLICES") or 1)
        number = int(megascale.get("MEGASCALE_SLICE_ID") or 0)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--coordinator tpu finds no TPU VM's metadata here ({error}); start it on a TPU VM, or give HOST:PORT"
        ) from None
    first = (megascale.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).partition(":")[0]
    return Place(first, PORT, slices * len(hosts), number * len(hosts) + worker)


@contextlib.contextmanager
def joined(place: Place, timeout: int, explain: Callable[[BaseException], tuple[int, str]]) -> Iterator[Peers]:
    """Meet the other processes of a run and start `jax.distributed`; an error inside the block ends all of them.

    Yields the ways to end or stop them at any moment, from any thread.

    Args:
      timeout: seconds to wait for the others.
      explain: returns the exit code and the message for an error.

    Raises:
      UserError: if the others do not come, or the first cannot be reached.
    """
    connections = _accept_others(place, timeout) if place.index == 0 else _connect_to_first(place, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Without detection, which under SLURM would give a process only the device of its rank on the host.
    jax.distributed.initialize(
        f"{place.host}:{place.port}", place.count, place.index, initialization_timeout=timeout,
        cluster_detection_method="deactivate",
    )  # fmt: skip

    def end_all(code: int, sentence: str) -> None:
        connections.tell(code, f"{_who(place.index)} has ended: {sentence}{_ALL_END}" if code else sentence)
        leave(code, sentence)

    try:
        yield Peers(end_all, connections.stop)
        wait_for_all("the end of the run")
    except BaseException as error:
        if not isinstance(error, UserError | Stopped):
            time.sleep(2)  # it may result from another process's end, which a connection reports in a moment
        end_all(*explain(error))
    connections.tell(0, "")


# --- The connections ------------------------------------------------------------------------------------------------

# A message is a line of JSON: `_STOP`, or the exit code and the message that a process ends with ("": normally).
_STOP = "stop"  # the sender received a SIGTERM
_ALL_END = "; all processes of the run end"
_PATIENCE = 45  # seconds of silence after which a host counts as dead


class _Connections:
    """The connections of this process: of the first to each of the others, of another to the first only."""

    def __init__(self):
        self._lines: list[socket.socket] = []
        self._ending, self._stopping = threading.Lock(), threading.Event()

    def add(self, line: socket.socket, who: str) -> None:
        """Start a thread that acts on the messages and the death of the process at the other end."""
        self._lines.append(line)
        threading.Thread(target=self._read, args=(line, who), daemon=True).start()

    def _read(self, line: socket.socket, who: str) -> None:
        while (message := _receive(line)) == _STOP:
            self.stop(but=line)
            os.kill(os.getpid(), signal.SIGTERM)
        code, sentence = message or (2, f"{who} has died{_ALL_END}")
        if sentence:
            with self._ending:  # the first to end is the one that is named
                self.tell(code, sentence, but=line)
                leave(code, sentence)

    def stop(self, but: socket.socket | None = None) -> None:
        """Pass on a SIGTERM, once, to the processes at all connections except `but`."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._send(_STOP, but)

    def tell(self, code: int, sentence: str, but: socket.socket | None = None) -> None:
        """Report how a process has ended; an empty message means normally."""
        self._send((code, sentence), but)

    def _send(self, message: Any, but: socket.socket | None) -> None:
        for line in self._lines:
            if line is not but:
                _send(line, message)


def _connect_to_first(place: Place, timeout: int) -> _Connections:
    connections, deadline = _Connections(), time.monotonic() + timeout
    while True:
        try:
            line = socket.create_connection((place.host, place.port + 1), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the coordinator {place.host}:{place.port} could not be reached within {timeout} s ({error});"
                    " make sure that process 0 runs there, and that no firewall closes this port and the next"
                ) from None
            time.sleep(0.5)
    _send(line, {"index": place.index, "count": place.count, "who": _who(place.index)})
    connections.add(line, f"process 0 on {place.host}")
    return connections


def _accept_others(place: Place, timeout: int) -> _Connections:
    connections, deadline = _Connections(), time.monotonic() + timeout
    missing = set(range(1, place.count))
    with socket.create_server(("", place.port + 1)) as server:
        while missing:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                line, _ = server.accept()
            except TimeoutError:
                raise UserError(
                    f"of {place.count} processes {', '.join(map(str, sorted(missing)))} did not come to port"
                    f" {place.port + 1} within {timeout} s; make sure that they were started, with this host's"
                    " address as coordinator"
                ) from None
            greeting = _receive(line, timeout=5)
            if isinstance(greeting, dict) and greeting.get("count") == place.count and greeting["index"] in missing:
                missing.remove(greeting["index"])
                connections.add(line, greeting["who"])
    return connections


def _who(index: int) -> str:
    return f"process {index} (pid {os.getpid()} on {socket.gethostname()})"


def _send(line: socket.socket, message: Any) -> None:
    with contextlib.suppress(OSError):  # the other end is gone, which the reading thread reports
        line.sendall(json.dumps(message).encode() + b"\n")


def _receive(line: socket.socket, timeout: float | None = None) -> Any:
    """Return the next message; None if the other end is gone, sends no JSON, or its host no longer answers."""
    line.settimeout(timeout)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", _PATIENCE // 3), ("TCP_KEEPINTVL", _PATIENCE // 9), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):  # on Linux
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    try:
        return json.loads(line.makefile("rb", buffering=0).readline())  # unbuffered, so that no more than this is read
    except (OSError, ValueError):
        return None


# --- Who does what --------------------------------------------------------------------------------------------------

# Processes decode in groups of `hosts_per_group` neighbors, on the devices of the whole group. The first of a group
# leads: it stores the results that all of them have.


def is_first() -> bool:
    return jax.process_index() == 0


def leads(hosts_per_group: int) -> bool:
    """Return true if this process is the first of its group."""
    return jax.process_index() % hosts_per_group == 0


def share(items: Sequence[Any], hosts_per_group: int = 1) -> Sequence[Any]:
    """Return this group's part of a sequence: adjacent items, in number equal to the other groups' or one off."""
    bounds = np.linspace(0, len(items), jax.process_count() // hosts_per_group + 1).round().astype(int)
    group = jax.process_index() // hosts_per_group
    return items[bounds[group] : bounds[group + 1]]


def gather(items: list[Any], hosts_per_group: int = 1) -> list[Any]:
    """Concatenate the leading processes' lists of JSON values, in every process."""
    if jax.process_count() == 1:
        return items
    parts = _gather_bytes(json.dumps(items).encode() if leads(hosts_per_group) else b"")
    return [item for part in parts for item in json.loads(part)]


def gather_rows(arrays: Mapping[str, np.ndarray], hosts_per_group: int = 1) -> dict[str, np.ndarray]:
    """Concatenate the leading processes' rows, bit for bit, in every process.

    Args:
      arrays: [rows, ...] each, with the same names in all groups, or empty for a group without rows.
    """
    if jax.process_count() == 1:
        return dict(arrays)
    file = io.BytesIO()
    if arrays and leads(hosts_per_group):
        np.savez(file, **arrays)
    parts = [np.load(io.BytesIO(part)) for part in _gather_bytes(file.getvalue())]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _gather_bytes(data: bytes) -> list[bytes]:
    """Gather the bytes of all processes, in their order, omitting empty ones."""
    sizes = multihost_utils.process_allgather(np.asarray([len(data)])).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    gathered = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [row[:size].tobytes() for row, size in zip(gathered, sizes, strict=True) if size]


def everywhere(condition: bool) -> bool:
    """Return true if the condition holds in every process; all of them must call this."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.asarray(condition)).all())


def stop_if_told() -> None:
    """Raise `Stopped` in every process if one of them was told to stop; all of them must call this."""
    if not everywhere(not requested()):
        raise Stopped


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Run a part independently in each process or group; at its end all wait for each other.

    Raises:
      Stopped: in every process, if it was raised inside any.
    """
    stopped = False
    try:
        yield
    except Stopped:
        stopped = True
    if not everywhere(not stopped):
        raise Stopped


def wait_for_all(what: str) -> None:
    """Wait until every process has called this; `what` names the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
