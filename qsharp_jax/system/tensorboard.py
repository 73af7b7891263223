"""Metrics as TensorBoard shows them: event files, in which each phase is a run with its own steps.

An event file is a TFRecord file of `Event` protocol buffers; TensorBoard's own writer encodes them. It knows nothing of
what the numbers mean.
"""

import io
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from qsharp_jax.system.files import Growing


class EventFiles:
    """The event files of one workdir: `FOLDER/PHASE/events.out.tfevents...`, one file a phase and process.

    A phase that goes on in another process is written to another file, which begins by saying at which step: what an
    earlier process logged of that step and later ones, TensorBoard then leaves out.
    """

    def __init__(self, folder: Path):
        self._folder, self._files = folder, {}

    def write(self, metrics: dict[str, Any]) -> None:
        """One line of metrics at its "step" (0 without one) in its "phase"; what is no number is left out.

        Raises:
          OSError: if the file cannot be written.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # half a second, and only for who logs
        from tensorboard.compat.proto.summary_pb2 import Summary

        phase, step = metrics.get("phase", ""), metrics.get("step", 0)
        now = time.time()
        numbers = {
            name: number
            for name, number in metrics.items()
            if isinstance(number, int | float) and not isinstance(number, bool) and name != "step"
        }
        events = []
        if phase not in self._files:
            self._files[phase] = Growing(self._folder / _folder_name(phase) / _file_name(now))
            events.append(Event(wall_time=now, file_version="brain.Event:2"))
            events.append(Event(wall_time=now, step=step, session_log=SessionLog(status=SessionLog.START)))
        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        events.append(Event(wall_time=now, step=step, summary=Summary(value=values)))
        self._files[phase].append(_records(events))


def _records(events: list) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    written = io.BytesIO()
    writer = RecordWriter(written)
    for event in events:
        writer.write(event.SerializeToString())
    return written.getvalue()


def _folder_name(phase: str) -> str:
    """ "round 1: fit" as round_1_fit: the name of a folder everywhere."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", phase)


def _file_name(now: float) -> str:
    """TensorBoard reads files with "tfevents" in their names, in the names' order."""
    return f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
