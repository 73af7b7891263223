"""What `qsharp generate` writes: JSON lines, one a response.

On standard output they come in the order of the prompts. A file gets each line as its response ends, so that a command
that was stopped goes on behind what is there; when the last line has come, they are put into the order of the prompts.
It knows nothing of models.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qsharp_jax import files
from qsharp_jax.errors import UserError
from qsharp_jax.generate import Generation

BEGINNING = b'{"prompt": '  # of every line
NEITHER = "give another --output, or delete it"


@dataclasses.dataclass(frozen=True)
class Request:
    """What is known of a response before it is generated; no two of a command have all the same.

    Attributes:
      eta: None for infinity.
      seed: of this response.
      settings: all else that it depends on, as JSON has it.
    """

    prompt: str
    eta: float | None
    seed: int
    settings: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, float | None, int]:
        return self.prompt, self.eta, self.seed


def encode(request: Request, response: str, part: Generation, row: int) -> bytes:
    """The line of a response, which is a row of `part`: strict JSON, null for what is not finite."""

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
        "settings": request.settings,
    }
    return json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def in_order(lines: Iterable[tuple[int, bytes]], places: Sequence[int]) -> Iterator[bytes]:
    """Each line as soon as it and those before it are there.

    Args:
      lines: each with its place, in any order.
      places: in the order that is wanted.
    """
    waiting, wanted = {}, iter(places)
    place = next(wanted, None)
    for other, line in lines:
        waiting[other] = line
        while place in waiting:
            yield waiting.pop(place)
            place = next(wanted, None)


# --- Files ----------------------------------------------------------------------------------------------------------


def is_kept(path: Path) -> bool:
    """Whether what is written there stays, unlike in /dev/null or a pipe."""
    return not path.exists() or path.is_file()


def resume(path: Path, requests: Sequence[Request]) -> dict[int, tuple[int, int]]:
    """The places, among the requests, of the responses that the file holds; for each, where its line begins and ends.

    Half a line that a kill left at the end is cut off.

    Raises:
      UserError: naming the first line that is not a response to one of the requests with the same settings. The file
        is left as it is.
    """
    if not path.exists():
        return {}
    places = {request.key: place for place, request in enumerate(requests)}
    spans: dict[int, tuple[int, int]] = {}
    begin = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                if line[: len(BEGINNING)] != BEGINNING[: len(line)]:
                    raise UserError(f"{path} ends with a line that is not a response of qsharp generate; {NEITHER}")
                os.truncate(path, begin)
                break
            place = _place(path, number, line, requests, places)
            if place in spans:
                raise UserError(f"{path}, line {number}, is a response that is there already; {NEITHER}")
            spans[place] = begin, begin + len(line)
            begin += len(line)
    return spans


def _place(
    path: Path, number: int, line: bytes, requests: Sequence[Request], places: Mapping[tuple, int]
) -> int:
    try:
        kept = json.loads(line)
        key, settings = (kept["prompt"], kept["eta"], kept["seed"]), kept["settings"]
        place = places.get(key)
        theirs = settings | {}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}, line {number}, is not a response of this version's qsharp generate; {NEITHER}") from None
    ours = requests[0 if place is None else place].settings
    for name in ours | theirs:
        # Of another request the prompt is another too.
        if theirs.get(name) != ours.get(name) and not (place is None and name == PROMPT_SUM):
            raise UserError(
                f"{path}, line {number}, was generated with {name} {json.dumps(theirs.get(name))}, and this command has"
                f" {json.dumps(ours.get(name))}; give another --output, or the same settings as before"
            )
    if place is None:
        raise UserError(
            f"{path}, line {number}, is a response to a prompt, eta and seed that this command does not have; give"
            " another --output, or the same arguments as before"
        )
    return place
