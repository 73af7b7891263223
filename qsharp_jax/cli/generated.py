"""Output of `qsharp generate`: JSON lines, one per response.

On standard output they come in the order of the prompts. A file gets each line as its response ends, so that a stopped
command resumes after the existing lines; at the end they are sorted into the order of the prompts.
"""

import json
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qsharp_jax.cli import json_lines
from qsharp_jax.decoding import Generation
from qsharp_jax.system import files, lock
from qsharp_jax.system.chat import Prompt
from qsharp_jax.system.errors import UserError

BEGINNING = b'{"prompt": '  # of every line
OTHER_FILE = "give another --output, or delete it"
Span = tuple[int, int]  # begin and end of a line in its file


class Request(NamedTuple):
    """Everything known of a response before it is generated; an eta of None is infinity, which JSON does not have."""

    prompt: Prompt
    columns: Mapping[str, Any]  # of the input, to copy
    eta: float | None
    seed: int

    @property
    def key(self) -> str:
        """Return a text that is the same for equal requests."""
        return json.dumps(self, sort_keys=True)


def encode(request: Request, response: str, part: Generation, row: int, settings: Mapping[str, Any]) -> str:
    """Return the line of a response, whose tokens and numbers are in a row of `part`; null for what is not finite.

    Args:
      settings: what all responses of the command share, as JSON values.
    """

    def numbers(array: np.ndarray) -> list[float | None]:
        return [round(float(x), 6) if math.isfinite(x) else None for x in array[row, : part.lengths[row]]]

    line = {
        "prompt": request.prompt,
        **request.columns,
        "response": response,
        "tokens": part.response(row),
        "finished": bool(part.finished[row]),
        "eta": request.eta,
        "seed": request.seed,
        "log_probs": numbers(part.log_probs),
        "ref_log_probs": numbers(part.ref_log_probs),
        "kl": numbers(part.kl),
        "values": numbers(part.values),
        "settings": settings,
    }
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def in_order(lines: Iterable[tuple[int, str]]) -> Iterator[str]:
    """Yield each line as soon as it and all lines of earlier places have come."""
    waiting, place = {}, 0
    for other, line in lines:
        waiting[other] = line
        while place in waiting:
            yield waiting.pop(place)
            place += 1


# --- Files ----------------------------------------------------------------------------------------------------------


def write(
    path: Path,
    requests: Sequence[Request],
    settings: Mapping[str, Any],
    lines: Callable[[Sequence[int]], Iterable[tuple[int, str]]],
) -> int:
    """Append the missing responses as they come, then sort all lines; return how many responses existed.

    Args:
      settings: as in `encode`.
      lines: (places of missing responses, perhaps none) -> their lines with their places, in any order.

    Raises:
      UserError: if another process writes to the file, or it holds something else, see `_resume`.
    """
    with open(path, "ab") as file:
        if not lock.lock_file(file):
            raise UserError(f"another process writes to {path}; wait for it to end, or give another --output")
        spans = _resume(path, requests, settings)
        existing, end = len(spans), max((end for _, end in spans.values()), default=0)
        missing = [place for place in range(len(requests)) if place not in spans]
        for place, line in lines(missing):
            data = line.encode()
            with files.named(path):
                file.write(data)
                file.flush()
            spans[place] = end, end + len(data)
            end += len(data)
        _sort(path, spans)
    return existing


def _resume(path: Path, requests: Sequence[Request], settings: Mapping[str, Any]) -> dict[int, Span]:
    """Find the file's responses to the requests, by their places, and remove a half line that a kill left.

    Raises:
      UserError: naming the first line that does not respond to one of the requests with the same settings; the file is
        then unchanged.
    """
    places = defaultdict(deque)  # usually one per request, but the same prompt and seed may occur several times
    for place, request in enumerate(requests):
        places[request.key].append(place)
    spans: dict[int, Span] = {}
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                if line[: len(BEGINNING)] != BEGINNING[: len(line)]:
                    raise UserError(f"{path} ends with a line that is not of `qsharp generate`; {OTHER_FILE}")
                os.truncate(path, end)
                break
            if not (waiting := places.get(_read(path, number, line, settings).key)):
                raise UserError(
                    f"{path}, line {number}, is not a response that this command lacks: its prompt, another column of"
                    f" the input, its eta or seed differs, or it is there twice; {OTHER_FILE}"
                )
            spans[waiting.popleft()] = end, end + len(line)
            end += len(line)
    return spans


def _read(path: Path, number: int, line: bytes, settings: Mapping[str, Any]) -> Request:
    """Return the request that a line answers; a UserError names the first setting that differs."""
    try:
        stored = dict(json.loads(line))
        columns = {name: value for name, value in stored.items() if name not in ("prompt", *json_lines.GENERATED)}
        request, theirs = Request(stored["prompt"], columns, stored["eta"], stored["seed"]), dict(stored["settings"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}, line {number}, is not of `qsharp generate` as it is now; {OTHER_FILE}") from None
    for name in [*settings, *theirs]:
        if theirs.get(name) != settings.get(name):
            raise UserError(
                f"{path}, line {number}, was generated with {name} {json.dumps(theirs.get(name))}, and this command has"
                f" {json.dumps(settings.get(name))}; give another --output, or the previous settings"
            )
    return request


def _sort(path: Path, spans: Mapping[int, Span]) -> None:
    """Sort a file's lines by their places, all of them or none."""
    in_place = [spans[place] for place in sorted(spans)]
    if in_place == sorted(in_place):
        return
    path = path.resolve()  # replace the target of a link, not the link
    with open(path, "rb") as source, files.writing(path) as target:
        for begin, end in in_place:
            source.seek(begin)
            target.write(source.read(end - begin))
