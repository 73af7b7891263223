"""What tasks over a fixed data set share: its rows, from JSON lines or from the hub, and its splits.

config: data         folder with the data set's files; "hub": Hugging Face's; "": the folder that QSHARP_DATA names, or
                     the hub if it names none
        evaluate_on  the held-out problems: "test", or "validation", a tenth of the training problems
        split_seed   says which tenth

It knows no data set's fields.
"""

import collections
import dataclasses
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import base
from qsharp_jax.tasks.base import Problem

VARIABLE = "QSHARP_DATA"
_HELD_OUT = 0.1  # share of the training problems that are for validation, as in the paper

Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its fields
Make = Callable[[Row], list[Problem]]  # the problems of a row


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of a data set.

    Attributes:
      file: below the data folder, JSON lines in the hub's fields.
      hub: the data set's name there, or the address of a file of JSON lines.
      split: its name there.
      parts: its configurations there; their rows follow each other.
    """

    file: str
    hub: str
    split: str = "train"
    parts: tuple[str | None, ...] = (None,)


def check(config: Any) -> None:
    if not isinstance(config.data, str):
        raise ValueError(f"data is {config.data!r}; it must be a folder, hub, or empty")
    if config.evaluate_on not in ("test", "validation"):
        raise ValueError(f"evaluate_on is {config.evaluate_on!r}; it must be test or validation")
    if type(config.split_seed) is not int:
        raise ValueError(f"split_seed is {config.split_seed!r}; it must be a whole number")


def choose(
    config: Any,
    split: str,
    count: int,
    seed: int,
    *,
    train: tuple[Source, Make],
    test: tuple[Source, Make],
    group: Callable[[Problem], str] = lambda problem: problem.problem_id,
) -> list[Problem]:
    """`count` problems of a split, drawn without replacement by the seed.

    Args:
      split: "train" or "test"; the latter is what `config.evaluate_on` says.
      train: divided into the problems to learn from and those for validation.
      group: problems of one are not divided.

    Raises:
      ValueError: for another split, or if there are fewer problems; UserError: as `read`.
    """
    check(config)
    if split not in base.SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(base.SPLITS)}")
    name = split if split == "train" else config.evaluate_on
    chosen = read(*(test if name == "test" else train), config.data)
    if name != "test":
        groups = sorted({group(problem) for problem in chosen})
        random.Random(f"validation/{config.split_seed}").shuffle(groups)
        validation = set(groups[: round(_HELD_OUT * len(groups))])
        chosen = [problem for problem in chosen if (group(problem) in validation) == (name == "validation")]
    if len(chosen) < count:
        raise ValueError(f"there are {len(chosen)} {name} problems, not the {count} asked for; ask for fewer")
    base.generator("finite", seed).shuffle(chosen)
    return chosen[:count]


def read(source: Source, make: Make, data: str) -> list[Problem]:
    """One file's problems. Of several with one id, as a data set may hold a problem twice, the later get new ones.

    Args:
      data: as in the config.

    Raises:
      UserError: as `read_rows`, and for fields that are not as they should be.
    """
    problems, times = [], collections.Counter()
    for problem in (problem for row in read_rows(source, data) for problem in make(row)):
        times[problem.problem_id] += 1
        if times[problem.problem_id] > 1:
            problem = dataclasses.replace(problem, problem_id=f"{problem.problem_id}-{times[problem.problem_id]}")
        problems.append(problem)
    return problems


# --- Rows and their fields ------------------------------------------------------------------------------------------


def read_rows(source: Source, data: str) -> list[Row]:
    """The rows of one file, at least one.

    Raises:
      UserError: if there is no such file, or the hub cannot be reached, naming the file that would do; for a line that
        is no JSON object; if there are no rows.
    """
    folder = data or os.environ.get(VARIABLE) or "hub"
    rows = _hub_rows(source) if folder == "hub" else _local_rows(source, Path(folder).expanduser() / source.file)
    if not rows:
        where = source.hub if folder == "hub" else Path(folder).expanduser() / source.file
        raise UserError(f"{where} holds no problems; put the data set's rows there, as JSON lines")
    return rows


def text(row: Row, field: str) -> str:
    """A field that has to be there, as a text that is not blank.

    Raises:
      UserError: naming the row.
    """
    where, fields = row
    if field not in fields:
        raise UserError(f"{where}: there is no field {field!r}, but {', '.join(fields) or 'none at all'}; add it")
    if not isinstance(fields[field], str) or not fields[field].strip():
        raise UserError(f"{where}: the field {field!r} is {fields[field]!r}; it must be a text")
    return fields[field]


def gold(row: Row, problem_id: str, parse: Callable[[str], str], answer: str) -> str:
    """The gold answer as `parse` gives it.

    Raises:
      UserError: naming the row and the problem, for a ValueError of `parse`.
    """
    try:
        return parse(answer)
    except ValueError as error:
        raise UserError(f"{row[0]}, problem {problem_id}: {error}; mend it, or leave the line out") from None


def _local_rows(source: Source, path: Path) -> list[Row]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # not `splitlines`: JSON has some inside strings
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"there is no file {path}; put the JSON lines of {source.hub} (split {source.split}) there, or give"
            " --config.task.data=hub to load them from there"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8; put the data set's JSON lines there anew") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise UserError(f"{path}, line {number}, is no JSON object; mend it, or put the file there anew")
        rows.append((f"{path}, line {number}", fields))
    return rows


def _hub_rows(source: Source) -> list[Row]:
    import datasets  # of seconds

    try:
        if "://" in source.hub:
            parts = [datasets.load_dataset("json", data_files=source.hub, split="train")]
        else:
            parts = [datasets.load_dataset(source.hub, part, split=source.split) for part in source.parts]
    except Exception as error:  # of the hub's client, of the network below it, or of `datasets`
        words = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{source.hub} cannot be loaded ({words}); put its JSON lines at DIR/{source.file} and set"
            f" {VARIABLE}=DIR, or give --config.task.data=DIR"
        ) from error
    rows = [dict(row) for part in parts for row in part]
    return [(f"{source.hub}, {source.split}, row {number}", row) for number, row in enumerate(rows, start=1)]
