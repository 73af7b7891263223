"""Progress of long loops on standard error: bars on a terminal or in a notebook, else a line at most twice a minute."""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from tqdm import tqdm


class Bar(tqdm):
    """`tqdm` for logs too: `Bar(items, name)`, with tqdm's other options.

    Args:
      before: shown in the bar until its first step, such as "compiling"; not in logs.
    """

    def __init__(self, items: Iterable[Any], name: str | None, *, before: str = "", **options: Any):
        interval = 0.5 if on_screen() else 30.0
        unseen = options.get("total") == 0 or bool(os.environ.get("TQDM_DISABLE"))
        options["disable"] = options.get("disable", False) or unseen
        width = {"ncols": 100} if in_notebook() else {"dynamic_ncols": True}
        super().__init__(items, name, mininterval=interval, maxinterval=interval, **width, **options)
        self._words = ""
        if before:
            self.say(before)

    def say(self, words: str) -> None:
        """Show what goes on, in place of numbers, until the next step; not in logs."""
        if on_screen() and not self.disable:
            self.set_postfix_str(words)
            self._words = words

    def update(self, n: float | None = 1) -> bool | None:
        if self._words and self._words == self.postfix:
            self.set_postfix_str("", refresh=False)
        self._words = ""
        return super().update(n)

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        if on_screen():
            return tqdm.status_printer(file)
        return lambda text: print(text.strip(), file=file, flush=True) if text.strip() else None


def tell(words: str) -> None:
    """Write one line about what goes on, such as "loading the guide"; not in logs."""
    if on_screen() and not os.environ.get("TQDM_DISABLE"):
        print(f"qsharp: {words}", file=sys.stderr, flush=True)


def on_screen() -> bool:
    """Return true if standard error is shown to a person, who sees lines overwritten."""
    return sys.stderr.isatty() or in_notebook()


def in_notebook() -> bool:
    """Return true in the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    return bool(shell) and "IPKernelApp" in shell.config
