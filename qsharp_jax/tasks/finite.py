"""Shared by tasks over a fixed data set: its rows, from JSON lines or from the Hugging Face hub, and its splits.

config: data         folder with the data set's files; "hub": load from the Hugging Face hub; "": the folder in the
                     environment variable QSHARP_DATA, or the hub if it is not set
        evaluate_on  the held-out problems: "test", or "validation", a tenth of the training problems
        split_seed   selects that tenth
"""

import collections
import dataclasses
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qsharp_jax.system.errors import UserError, first_line
from qsharp_jax.tasks import base
from qsharp_jax.tasks.base import Problem

VARIABLE = "QSHARP_DATA"
_HELD_OUT = 0.1  # share of the training problems that are for validation, as in the paper


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file, with its `place` for messages, and its `fields` by name."""

    place: str
    fields: dict[str, Any]

    def text(self, field: str) -> str:
        """Return a required field that is a nonblank text; raises a UserError that names the row."""
        if field not in self.fields:
            names = ", ".join(self.fields) or "none at all"
            raise UserError(f"{self.place}: there is no field {field!r}, but {names}; add it")
        value = self.fields[field]
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.place}: the field {field!r} is {value!r}; it must be a text")
        return value

    def problem(self, problem_id: str, prompt: str, gold: Callable[[str], str], answer: str) -> Problem:
        """Return the problem whose answer is `gold(answer)`; a ValueError of `gold` becomes a UserError."""
        try:
            return Problem(problem_id, prompt, gold(answer))
        except ValueError as error:
            raise UserError(f"{self.place}, problem {problem_id}: {error}; fix it, or remove the line") from None


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of a data set."""

    file: str  # path below the data folder, of JSON lines with the hub's fields
    hub: str  # name of the data set on the hub, or URL of a file of JSON lines
    to_problems: Callable[[Row], list[Problem]]  # (row) -> its problems
    split: str = "train"  # name of the split on the hub
    parts: tuple[str | None, ...] = (None,)  # configurations on the hub, whose rows are concatenated


def check(config: Any) -> None:
    if not isinstance(config.data, str):
        raise ValueError(f"data is {config.data!r}; it must be a folder, hub, or empty")
    if config.evaluate_on not in ("test", "validation"):
        raise ValueError(f"evaluate_on is {config.evaluate_on!r}; it must be test or validation")
    if type(config.split_seed) is not int:
        raise ValueError(f"split_seed is {config.split_seed!r}; it must be an integer")


def problems(
    config: Any,
    split: str,
    count: int,
    seed: int,
    *,
    train: Source,
    test: Source,
    group: Callable[[Problem], str] = lambda problem: problem.problem_id,
) -> list[Problem]:
    """Draw `count` problems of a split without replacement.

    Args:
      split: "train" or "test", which means `config.evaluate_on`.
      train: divided into training and validation problems.
      group: (problem) -> its group; problems with the same group stay together, and repeats of a problem always do.

    Raises:
      ValueError: for an unknown split, or if there are fewer problems.
      UserError: as in `read`.
    """
    check(config)
    base.check_split(split)
    name = split if split == "train" else config.evaluate_on
    pairs = _read(test if name == "test" else train, config.data)
    if name != "test":
        validation = _validation([(group(first), group(problem)) for first, problem in pairs], config.split_seed)
        pairs = [pair for pair in pairs if (group(pair[0]) in validation) == (name == "validation")]
    chosen = [problem for _, problem in pairs]
    if len(chosen) < count:
        raise ValueError(f"there are {len(chosen)} {name} problems, not the {count} asked for; ask for fewer")
    base.generator("finite", seed).shuffle(chosen)
    return chosen[:count]


def _validation(groups: Sequence[tuple[str, str]], split_seed: int) -> set[str]:
    """Draw the groups of the validation problems: a tenth, also where some groups hold repeats, which count as well.

    Args:
      groups: per problem, the group that it is kept in, and the one that it would be if it were no repeat.
    """
    repeats = collections.defaultdict[str, set[str]](set)
    for group, alone in groups:
        repeats[group].add(alone)
    group_of = {alone: group for group, members in repeats.items() for alone in members}
    order = sorted(group_of)
    random.Random(f"validation/{split_seed}").shuffle(order)
    chosen, room = set[str](), round(_HELD_OUT * len(order))
    for group in (group_of[alone] for alone in order):
        if group not in chosen and len(repeats[group]) <= room:
            chosen.add(group)
            room -= len(repeats[group])
    return chosen


def read(source: Source, data: str) -> list[Problem]:
    """Read one file's problems; the id of a repeated problem ends in -2, -3, ...

    Args:
      data: as in the config.

    Raises:
      UserError: if the file does not exist, the hub cannot be reached, or rows are missing or damaged.
    """
    return [problem for _, problem in _read(source, data)]


def _read(source: Source, data: str) -> list[tuple[Problem, Problem]]:
    """Read pairs of a problem with the id that it has in the file, and the problem with an id of its own."""
    folder = data or os.environ.get(VARIABLE) or "hub"
    path = Path(folder).expanduser() / source.file
    rows = _hub_rows(source) if folder == "hub" else _local_rows(source, path)
    if not rows:
        where = source.hub if folder == "hub" else path
        raise UserError(f"{where} has no problems; put the data set's rows there, as JSON lines")
    pairs, times = [], collections.Counter[str]()
    for problem in (problem for row in rows for problem in source.to_problems(row)):
        times[problem.problem_id] += 1
        own_id = problem.problem_id
        if times[own_id] > 1:
            own_id = f"{own_id}-{times[own_id]}"
        pairs.append((problem, dataclasses.replace(problem, problem_id=own_id)))
    return pairs


def _local_rows(source: Source, path: Path) -> list[Row]:
    try:
        return json_rows(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"there is no file {path}; put the JSON lines of {source.hub} (split {source.split}) there, or give"
            " --config.task.data=hub to load them from the hub"
        ) from None


def json_row(place: str, fields: dict[str, Any]) -> Row:
    """Return a row; raises a UserError that names a column which JSON, the form of records, cannot hold."""
    for name, value in fields.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            what = value if isinstance(value, float) else f"a {type(value).__name__}"
            raise UserError(
                f"{place}: the column {name!r} holds {what}; write it as a text, a finite number or lists of them, or"
                " leave that column out"
            ) from None
    return Row(place, fields)


def json_rows(path: Path) -> list[Row]:
    """Read a file of JSON lines; raises a UserError for one that is damaged, as in `json_row`."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # not `splitlines`: JSON strings have some
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8, or download it again") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise UserError(f"{path}, line {number}, is not a JSON object; fix it, or write the file again")
        rows.append(json_row(f"{path}, line {number}", fields))
    return rows


def _hub_rows(source: Source) -> list[Row]:
    import datasets  # takes seconds

    try:
        if "://" in source.hub:
            parts = [datasets.load_dataset("json", data_files=source.hub, split="train")]
        else:
            parts = [datasets.load_dataset(source.hub, part, split=source.split) for part in source.parts]
    except Exception as error:  # from the hub's client, the network, or `datasets`
        raise UserError(
            f"cannot load {source.hub} ({first_line(error)}); put its JSON lines at DIR/{source.file} and set"
            f" {VARIABLE}=DIR, or give --config.task.data=DIR"
        ) from error
    rows = [dict(row) for part in parts for row in part]
    return [Row(f"{source.hub}, {source.split}, row {number}", row) for number, row in enumerate(rows, start=1)]
