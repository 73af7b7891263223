"""Files of prompts and responses: JSON lines in and out; errors give the line's number."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from qsharp_jax.system.errors import UserError

GENERATED = (  # fields of a line of `qsharp generate`, beside the prompt and the other columns of the input
    "response", "tokens", "finished", "eta", "seed", "log_probs", "ref_log_probs", "kl", "values", "settings"
)  # fmt: skip


def read_lines(path: str, content: str) -> list[tuple[str, str]]:
    """Read the nonempty lines of a text file, each with its place ("FILE, line N") for messages.

    Args:
      path: the file, or "-" for standard input.
      content: what it should hold, for example "prompts, one per line".

    Raises:
      UserError: if the file does not exist, is not UTF-8 text, or has no lines.
    """
    name = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no file {name}; give --input the path of a file of {content}") from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder; give --input a file of {content}") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text; give --input a file of {content}") from None
    # Not `splitlines`, since JSON strings may contain other line ends.
    lines = [
        (f"{name}, line {number}", line.removesuffix("\r"))
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not lines:
        raise UserError(f"{name} is empty; write {content}")
    return lines


def parse(line: str, *, strict: bool = False) -> dict[str, Any] | None:
    """Parse one line as a JSON object; None if it is anything else, or holds half a surrogate pair.

    Args:
      strict: refuse NaN and infinity, which JSON does not have.
    """
    try:
        record = json.loads(line, parse_constant=_refuse_constant if strict else None)
        json.dumps(record, ensure_ascii=False, allow_nan=not strict).encode()  # 1e400 is read as infinity
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def dump(record: Any) -> str:
    """One line of JSON, without the line end."""
    return json.dumps(record, ensure_ascii=False)


def check_other_file(path: str, source: str) -> None:
    """Raise a UserError if the output is the input itself."""
    if Path(path).exists() and os.path.samefile(source, path):
        raise UserError(f"{path} is the input itself; give another --output")


def check_output(path: str) -> None:
    """Raise a UserError if a file cannot be written, before anything is computed; its content stays."""
    try:
        open(path, "a").close()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} cannot be written: its folder does not exist; create it, or give another --output"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give --output the path of a file") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
