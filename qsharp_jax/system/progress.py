"""Progress of long loops on standard error: a bar on a terminal, elsewhere a line of text at most twice a minute."""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from tqdm import tqdm


class Bar(tqdm):
    """`tqdm` for logs too: `Bar(items, name)`, with tqdm's other options."""

    def __init__(self, items: Iterable[Any], name: str | None, **options: Any):
        interval = 0.5 if sys.stderr.isatty() else 30.0
        unseen = options.get("total") == 0 or bool(os.environ.get("TQDM_DISABLE"))
        options["disable"] = options.get("disable", False) or unseen
        super().__init__(items, name, mininterval=interval, maxinterval=interval, dynamic_ncols=True, **options)

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda text: print(text.strip(), file=file, flush=True) if text.strip() else None
