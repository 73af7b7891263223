"""A profiler trace of a few training steps, for TensorBoard's profile plugin (`pip install xprof`)."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import jax

from qsharp_jax.system.files import folder_of_this_machine

STEPS = 10
WARM = 5  # consecutive steps without a compilation before the trace begins


class Trace:
    """At most one trace of `STEPS` steps, in a folder; without a folder, none."""

    def __init__(self, folder: Path | None):
        self._folder, self._left = folder, None if folder is None else STEPS
        self._running, self._stack = False, contextlib.ExitStack()

    def before_step(self, state: Any, warm: int) -> None:
        """Begin or end the trace, once the device has finished all steps so far, whose state this is.

        Args:
          warm: steps since the last one that compiled.
        """
        if self._running and self._left == 0:
            self.end(state)
        if self._left and (self._running or warm >= WARM):
            if not self._running:
                jax.block_until_ready(state)
                jax.profiler.start_trace(str(self._stack.enter_context(folder_of_this_machine(self._folder))))
                self._running = True
            self._left -= 1

    def end(self, state: Any) -> None:
        """Write the trace; a training that ends early has fewer steps in it, or none, with a message."""
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._stack.close()
            self._running, self._left = False, None
        elif self._left:
            print(f"no trace in {self._folder}: there were not {WARM} steps without a compilation", file=sys.stderr)
