"""A file of prompts and responses, scored: JSON lines in, the same lines with log-probabilities and values out.

The output grows in the order of the input, so what is there says where to go on. It knows nothing of what scores.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qsharp_jax.data.batches import Example
from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.system import files
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.progress import Bar

ADDED = ("ref_log_probs", "values", "value")
SHORTEST = 32  # tokens; batches are as wide as this or 2, 4, 8, ... times it, so that few programs are compiled
CHUNK = 16  # batches between two writes: enough that sequences of like length meet

# scorer(examples, bucket=their batches' width in tokens) -> one array a response, with an entry a response token
Scorer = Callable[..., list[np.ndarray]]


def read(path: str | Path) -> list[dict]:
    """The file's records, each with texts `prompt` and `response` or with ids `prompt_tokens` and `response_tokens`.

    Raises:
      UserError: if there is no such file, it holds no records, or a line is none, which is named.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # not `splitlines`: JSON has some inside strings
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no file {path}; give --input the path of a file of JSON lines") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError(f"{path} is no text in UTF-8; give --input a file of JSON lines") from None
    records = [_parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise UserError(f"{path} holds no prompts and responses; write them as JSON lines")
    return records


def _parse(path: Path, number: int, line: str) -> dict:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
        _dump(record).encode()  # half a surrogate pair is in no text
    except ValueError:
        record = None
    if not isinstance(record, dict) or not (_has_tokens(record) or _has_texts(record)):
        raise UserError(
            f'{path}, line {number}: expected a JSON object with texts "prompt" and "response", or with lists of ids'
            ' "prompt_tokens" and "response_tokens"'
        )
    # Scores that are there, as in the output of `qsharp generate`, are of other models perhaps.
    return {key: item for key, item in record.items() if key not in ADDED}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _has_tokens(record: dict) -> bool:
    lists = [record.get(key) for key in ("prompt_tokens", "response_tokens")]
    return all(isinstance(ids, list) and all(type(token) is int for token in ids) for ids in lists)


def _has_texts(record: dict) -> bool:
    return all(isinstance(record.get(key), str) for key in ("prompt", "response"))


def encode(records: Sequence[dict], text: Tokenizer, positions: int, *, first: int = 1) -> list[Example]:
    """Token ids of the records; texts as `Tokenizer` encodes them, with the token that ends a response.

    Args:
      positions: the longest sequence that the models take, in tokens.
      first: number of the first of them, for the messages.

    Raises:
      UserError: naming a record with unknown words or ids, one that is too long, or one with nothing to score.
    """
    examples = []
    for number, record in enumerate(records, start=first):
        if _has_tokens(record):
            prompt, response = record["prompt_tokens"], record["response_tokens"]
        else:
            try:
                prompt, response = text.encode_prompt(record["prompt"]), text.encode_response(record["response"])
            except UserError as error:
                raise UserError(f"record {number}: {error}") from None
        if not prompt or not response:
            raise UserError(
                f"record {number} has no {'response' if prompt else 'prompt'} tokens; it needs at least one"
            )
        if not all(0 <= token < text.vocab_size for token in (*prompt, *response)):
            raise UserError(f"record {number} has token ids outside the vocabulary of {text.vocab_size}")
        if len(prompt) + len(response) > positions:
            raise UserError(
                f"record {number} has {len(prompt)} prompt and {len(response)} response tokens, which is more than the"
                f" model's {positions} positions; shorten it, or leave it out"
            )
        examples.append(Example(prompt, response))
    return examples


def resume(path: str | Path, records: Sequence[dict], added: Sequence[str]) -> int:
    """How many of the records the output has already; a half line that a kill left is cut off.

    Args:
      added: those of `ADDED` that this scoring adds.

    Raises:
      UserError: if what is there does not come from these records. It is left as it is then.
    """
    path = Path(path)
    data = path.read_bytes() if path.is_file() else b""
    *lines, half = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            held = json.loads(line)
        except ValueError:
            held = None
        known = isinstance(held, dict) and number <= len(records)
        known = known and {key: item for key, item in held.items() if key not in ADDED} == records[number - 1]
        if not known:
            raise UserError(
                f"{path}, line {number}, is not of record {number} of the input; give another --output, or delete it"
            )
        scored = [key for key in ADDED if key in held]
        if scored != list(added):
            raise UserError(
                f"{path}, line {number}, has {' and '.join(scored) or 'no scores'}, where this command gives"
                f" {' and '.join(added)}; give another --output, or the same models as before"
            )
    if half:
        whole = _dump(records[len(lines)])[:-1].encode() if len(lines) < len(records) else b""
        if not whole or half[: len(whole)] != whole[: len(half)]:
            raise UserError(
                f"{path} ends with a line that is not of record {len(lines) + 1} of the input; give another --output,"
                " or delete it"
            )
        os.truncate(path, len(data) - len(half))
    return len(lines)


def write(
    path: str | Path,
    records: Sequence[dict],
    examples: Sequence[Example],
    *,
    log_probs: Scorer | None,
    means: Scorer | None,
    rows: int,
) -> None:
    """Appends the scored records to the output, chunk by chunk.

    Args:
      log_probs: of the reference, without which there are none in the output.
      means: of the guide, likewise.
      rows: of a batch.
    """
    with files.named(path), open(path, "a", encoding="utf-8") as file:
        for begin in Bar(range(0, len(records), rows * CHUNK), "score"):
            part = examples[begin : begin + rows * CHUNK]
            found_log_probs = log_probs and _by_width(log_probs, part)
            found_means = means and _by_width(means, part)
            for row, record in enumerate(records[begin : begin + rows * CHUNK]):
                if found_log_probs:
                    record = record | {"ref_log_probs": _numbers(found_log_probs[row])}
                if found_means:
                    values = _numbers(found_means[row])
                    record = record | {"values": values, "value": values[-1]}
                file.write(_dump(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _by_width(scorer: Scorer, examples: Sequence[Example]) -> list[np.ndarray]:
    widths = [SHORTEST << max(math.ceil(math.log2(len(example) / SHORTEST)), 0) for example in examples]
    found: list[np.ndarray] = [np.empty(0)] * len(examples)
    for width in sorted(set(widths)):
        indices = [index for index, other in enumerate(widths) if other == width]
        for index, numbers in zip(indices, scorer([examples[index] for index in indices], bucket=width), strict=True):
            found[index] = numbers
    return found


def _numbers(array: np.ndarray) -> list[float | None]:
    """As JSON has them: the shortest decimals that are these float32, null for what is not finite."""
    return [float(str(x)) if math.isfinite(x) else None for x in np.asarray(array, np.float32)]


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)
