"""A trace of a few training steps for a profiler's eyes: what ran on host and devices, and when.

TensorBoard shows it with its profile plugin (`pip install xprof`).
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import jax

from qsharp_jax.system.files import folder_of_this_machine

STEPS = 10
WARM = 5  # steps in a row without a compilation before the trace begins


class Trace:
    """At most one trace of `STEPS` steps, in a folder; without a folder, none."""

    def __init__(self, folder: Path | None):
        self._folder, self._left = folder, None if folder is None else STEPS
        self._running, self._stack = False, contextlib.ExitStack()

    def before_step(self, state: Any, warm: int) -> None:
        """Begins the trace, or ends it, when the device is done with all steps so far, whose state this is.

        Args:
          warm: steps so far, since the last that compiled.
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
        """Writes what there is; training that ends sooner has fewer steps in its trace, or none, and says so."""
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._stack.close()
            self._running, self._left = False, None
        elif self._left:
            print(f"no trace in {self._folder}: there were not {WARM} steps without a compilation", file=sys.stderr)
