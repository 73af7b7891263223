"""Output of `qsharp generate`: JSON lines, one per response.

On standard output they come in the order of the prompts. A file gets each line as its response ends, so that a command
that was stopped goes on behind what is there; when the last line has come, they are put into the order of the prompts.
"""

import json
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qsharp_jax.generate import Generation
from qsharp_jax.system import files, lock
from qsharp_jax.system.errors import UserError

BEGINNING = b'{"prompt": '  # of every line
OTHER_FILE = "give another --output, or delete it"
Span = tuple[int, int]  # where a line begins in its file, and where it ends


class Request(NamedTuple):
    """Everything known of a response before it is generated.

    Attributes:
      eta: None for infinity, which JSON does not know.
      seed: of this response.
    """

    prompt: str
    eta: float | None
    seed: int


def encode(request: Request, response: str, part: Generation, row: int, settings: Mapping[str, Any]) -> str:
    """The line of a response.

    Args:
      part, row: where its tokens and their numbers are; null for those that are not finite.
      settings: what all responses of the command have in common, as JSON has it.
    """

    def numbers(array: np.ndarray) -> list[float | None]:
        return [round(float(x), 6) if math.isfinite(x) else None for x in array[row, : part.lengths[row]]]

    line = {
        "prompt": request.prompt,
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
    """Each line as soon as it and those of all places before it have come."""
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
    """Appends what is missing of the responses, each when it comes, and at the end puts all lines in order.

    Args:
      settings: as of `encode`.
      lines: of the places of missing responses, their lines with their places, in any order.

    Returns:
      How many responses were there already.

    Raises:
      UserError: if another process writes there, or the file holds something else, see `_resume`.
    """
    with open(path, "ab") as file:
        if not lock.lock_file(file):
            raise UserError(f"another process writes to {path}; wait for it to end, or give another --output")
        spans = _resume(path, requests, settings)
        kept, end = len(spans), max((end for _, end in spans.values()), default=0)
        missing = [place for place in range(len(requests)) if place not in spans]
        for place, line in lines(missing) if missing else ():
            data = line.encode()
            with files.named(path):
                file.write(data)
                file.flush()
            spans[place] = end, end + len(data)
            end += len(data)
        _sort(path, spans)
    return kept


def _resume(path: Path, requests: Sequence[Request], settings: Mapping[str, Any]) -> dict[int, Span]:
    """Find where the file holds responses to the requests, by their places.

    Half a line that a kill left at the end is cut off.

    Raises:
      UserError: naming the first line that is not a response to one of the requests by the same settings. The file
        stays as it is.
    """
    places = defaultdict(deque)  # one as a rule: the same prompt may be there several times, and get the same seed
    for place, request in enumerate(requests):
        places[request].append(place)
    spans: dict[int, Span] = {}
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                if line[: len(BEGINNING)] != BEGINNING[: len(line)]:
                    raise UserError(f"{path} ends with a line that is not of `qsharp generate`; {OTHER_FILE}")
                os.truncate(path, end)
                break
            if not (waiting := places.get(_read(path, number, line, settings))):
                raise UserError(
                    f"{path}, line {number}, is not a response that this command lacks: its prompt, eta or seed is"
                    f" another, or it is there twice; {OTHER_FILE}"
                )
            spans[waiting.popleft()] = end, end + len(line)
            end += len(line)
    return spans


def _read(path: Path, number: int, line: bytes, settings: Mapping[str, Any]) -> Request:
    """The request that a line answers.

    Raises:
      UserError: if it is no response, or one by other settings, of which the first is named.
    """
    try:
        kept = json.loads(line)
        request, theirs = Request(kept["prompt"], kept["eta"], kept["seed"]), dict(kept["settings"])
        hash(request)  # of lists there is none
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}, line {number}, is not of `qsharp generate` as it is now; {OTHER_FILE}") from None
    for name in [*settings, *theirs]:
        if theirs.get(name) != settings.get(name):
            raise UserError(
                f"{path}, line {number}, was generated with {name} {json.dumps(theirs.get(name))}, and this command has"
                f" {json.dumps(settings.get(name))}; give another --output, or the settings of before"
            )
    return request


def _sort(path: Path, spans: Mapping[int, Span]) -> None:
    """Puts a file's lines into the order of their places, all of them or none."""
    in_place = [spans[place] for place in sorted(spans)]
    if in_place == sorted(in_place):
        return
    path = path.resolve()  # what a link refers to, not the link, is replaced
    with open(path, "rb") as source, files.writing(path) as target:
        for begin, end in in_place:
            source.seek(begin)
            target.write(source.read(end - begin))
