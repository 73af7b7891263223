"""Event files for TensorBoard, in which each phase of a run has its own steps.

An event file is a TFRecord file of `Event` protocol buffers, which TensorBoard's own writer encodes.
"""

import io
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from qsharp_jax.system.files import Growing


class EventFiles:
    """The event files of one workdir: `FOLDER/PHASE/events.out.tfevents...`, one file per phase and process.

    A phase resumed by another process gets another file, which begins with the step that it starts at: TensorBoard then
    ignores what the earlier process logged at that step and later.
    """

    def __init__(self, folder: Path):
        self._folder, self._files = folder, {}

    def log(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of a step of a phase."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # takes half a second, only when logging
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        now, events = time.time(), []
        if phase not in self._files:
            self._files[phase] = Growing(self._folder / folder_name(phase) / _file_name(now))
            events.append(Event(wall_time=now, file_version="brain.Event:2"))
            events.append(Event(wall_time=now, step=step, session_log=SessionLog(status=SessionLog.START)))
        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        events.append(Event(wall_time=now, step=step, summary=Summary(value=values)))
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        self._files[phase].append(records.getvalue())

    def close(self) -> None:
        """Do nothing: every line is on disk once it is logged."""


def folder_name(phase: str) -> str:
    """Turn "round 1: fit" into round_1_fit, a valid name of a folder and in other loggers."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", phase)


def _file_name(now: float) -> str:
    """TensorBoard reads files with "tfevents" in their names, in the names' order."""
    return f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
