"""Your own task: prompts from a file or a data set, and rewards by Python functions (see `rewards.py`).

A row of the prompts is a JSON object with a `prompt`, a text or a list of messages with `role` and `content`; its other
columns are given to the reward functions. One prompt in five, chosen by a hash of it, is held out for the evaluation.
A Python file may be both: it defines `problems(split)`, an iterable of such rows for "train" and for "test", and
`reward`.

config: file           Python file or module with problems(split) and reward, or empty
        prompts        JSON lines, a Parquet file, or the name of a data set on the hub (its split "train"), or empty
        rewards        FILE.py:NAME or MODULE:NAME of the reward functions; empty: `reward` of `file`; <python>:NAME of
                       one that was a Python object, which only the program that gave it has
        weights        of the rewards in their sum; empty: 1 each
        reward_workers processes that call them; 0: this process calls them; -1: one per core, up to 16
        reward_seconds wall time of a response's rewards in a worker
        most_failures  share of responses without a reward, above which a run stops
"""

import collections
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qsharp_jax.system import chat, settings
from qsharp_jax.system.chat import Prompt
from qsharp_jax.system.errors import UserError, first_line
from qsharp_jax.system.files import is_file, make_path
from qsharp_jax.tasks import base, finite, reward_worker
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.rewards import (
    ARGUMENTS,
    OBJECT,
    Function,
    RewardJudge,
    name_of,
    parse_function,
    source_hash,
)

FINITE, SYMBOLIC = True, False

_NUMBERS = {
    "reward_workers": settings.whole(-1),
    "reward_seconds": settings.POSITIVE_FINITE,
    "most_failures": settings.UNIT,
}


def check(config: Any) -> None:
    for name, rule in _NUMBERS.items():
        settings.check(f"config.task.{name}", config[name], rule)
    if bool(config.file) == bool(config.prompts):
        raise ValueError("give the prompts, by --prompts FILE, or a Python file with problems and reward, by --task")
    functions = _functions(config)
    weights = list(config.weights)
    if weights and (len(weights) != len(functions) or not all(map(math.isfinite, weights))):
        raise ValueError(f"task.weights is {weights}; give one finite number for each of {len(functions)} rewards")


def _functions(config: Any) -> list[Function]:
    if config.rewards:
        return [parse_function(words) for words in config.rewards]
    if not config.file:
        raise UserError("there is no reward; give one by --reward FILE.py:NAME")
    return [parse_function(f"{config.file}:reward")]


def judge(config: Any, objects: Sequence[Callable[..., Any]] = ()) -> RewardJudge:
    """Return the judge that calls the reward functions; raises a UserError if they cannot be loaded.

    Args:
      objects: the reward functions, where they are Python objects.
    """
    check_objects(config, objects)
    functions = objects or _functions(config)
    workers = config.reward_workers
    own = RewardJudge(
        functions, list(config.weights) or [1.0] * len(functions), workers=None if workers < 0 else workers,
        seconds=config.reward_seconds, most_failures=config.most_failures,
    )  # fmt: skip
    own.check()
    return own


def check_files(config: Any) -> None:
    """Check that the file of prompts exists and that the reward functions load (UserError), before anything is read.

    Functions that are called in this process are left alone: to load them may take the memory of a model.
    """
    if config.prompts:
        _file(config.prompts)
    is_module = "/" not in config.file and not config.file.endswith(".py")
    if config.file and not is_module and not (config.file.endswith(".py") and Path(config.file).is_file()):
        raise UserError(f"there is no Python file {config.file}; give --task one, with problems(split) and reward")
    if config.reward_workers:
        judge(config).close()


def check_objects(config: Any, objects: Sequence[Callable[..., Any]]) -> None:
    """Raise a UserError if the reward functions are Python objects that this program does not have."""
    missing = [name for source, name in _functions(config) if source == OBJECT]
    if missing and not objects:
        raise UserError(
            f"the reward {', '.join(missing)} of this run was a Python object, which is not in its folder; call"
            " qsharp_jax.train_guide with it and the same workdir, or begin a new run with a function in a file, by"
            " --reward FILE.py:NAME"
        )


def describe_objects(objects: Sequence[Callable[..., Any]]) -> dict[str, dict]:
    """Return the hash of each reward function's source, by its name in messages."""
    numbered = enumerate(map(name_of, objects), start=1)
    names = [f"the reward {name}" + (f" (number {number})" if len(objects) > 1 else "") for number, name in numbered]
    return {name: {"sha256": source_hash(function)} for name, function in zip(names, objects, strict=True)}


def files(config: Any) -> list[Path]:
    """Return the files that the task is made of."""
    named = [config.file, config.prompts, *(source for source, _ in _functions(config))]
    return sorted({Path(name) for name in named if name and Path(name).is_file()})


def make_absolute(config: Any) -> None:
    """Make the paths of files that are there absolute, in place: not modules, nor names of data sets on the hub."""
    config.file, config.prompts = absolute(config.file), absolute(config.prompts)
    config.rewards = type(config.rewards)(map(absolute_function, config.rewards))


def absolute(path: str) -> str:
    """Return the absolute path of a file; what is no file stays as it is."""
    full = os.path.abspath(os.path.expanduser(path))
    return full if os.path.isfile(full) else path


def absolute_function(words: str) -> str:
    """Return FILE.py:NAME with the file's absolute path."""
    source, colon, name = words.rpartition(":")
    return f"{absolute(source)}{colon}{name}"


def problems(config: Any, split: str, count: int, seed: int) -> list[Problem]:
    """Draw at most `count` problems of a split without replacement.

    Raises:
      UserError: for a file that cannot be read, a row without a prompt, or a split without prompts.
    """
    chosen = _every_problem(config, split)
    base.generator("own", seed).shuffle(chosen)
    return chosen[:count]


def available(config: Any, split: str) -> int:
    """Return how many problems a split has; raises as `problems`."""
    return len(_every_problem(config, split))


def _every_problem(config: Any, split: str) -> list[Problem]:
    base.check_split(split)
    if config.file:
        chosen = to_problems(_rows_of_program(config.file, split))
        if not chosen:
            raise UserError(f"problems({split!r}) of {config.file} gives no prompts; return some")
    else:
        every = to_problems(read_rows(config.prompts))
        if not every:
            raise UserError(f"{config.prompts} has no prompts; write rows with a column prompt")
        chosen = [problem for problem in every if base.split_of(problem.problem_id[:16]) == split]
        if not chosen:
            use = "train on" if split == "train" else "evaluate on"
            raise UserError(
                f"of the {len(every)} prompts of {config.prompts} none is left to {use}: one in five different ones,"
                " chosen by a hash of it, is held out; add prompts"
            )
    return chosen


def to_problems(rows: Iterable[finite.Row]) -> list[Problem]:
    """Return the rows as problems; the id of a repeated prompt ends in -2, -3, ..."""
    chosen, times = [], collections.Counter[str]()
    for row in rows:
        if taken := [name for name in ARGUMENTS if name in row.fields]:
            raise UserError(f"{row.place}: rewards have an argument {taken[0]!r} of their own; rename that column")
        prompt = _prompt(row)
        problem_id = base.content_id(json.dumps(prompt))
        times[problem_id] += 1
        if times[problem_id] > 1:
            problem_id = f"{problem_id}-{times[problem_id]}"
        columns = {name: value for name, value in row.fields.items() if name != "prompt"}
        chosen.append(Problem(problem_id, prompt, "", columns))
    return chosen


def _prompt(row: finite.Row) -> Prompt:
    prompt = row.fields.get("prompt")
    if not isinstance(prompt, list):
        return row.text("prompt")
    chat.check_messages(prompt, row.place)
    return [dict(message) for message in prompt]


# --- Rows -----------------------------------------------------------------------------------------------------------


def read_rows(prompts: str) -> list[finite.Row]:
    """Read the prompts of a file, or of a data set on the hub; raises a UserError for what cannot be read."""
    if (path := _file(prompts)) is None:
        return _hub_rows(prompts)
    return _parquet_rows(path) if path.suffix == ".parquet" else finite.json_rows(path)


def _file(prompts: str) -> Path | None:
    """Return the path of a file of prompts; None for the name of a data set on the hub."""
    path = make_path(prompts)
    if is_file(path):
        return path
    if path.suffix in (".jsonl", ".json", ".parquet") or prompts.count("/") > 1:
        raise UserError(f"there is no file {path}; give JSON lines, a Parquet file, or a data set's name on the hub")
    return None


def _parquet_rows(path: Path) -> list[finite.Row]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file ({first_line(error)}); write it again") from None
    return [finite.json_row(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _hub_rows(name: str) -> list[finite.Row]:
    import datasets  # takes seconds

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # from the hub's client, the network, or `datasets`
        raise UserError(
            f"cannot load the data set {name} from the hub ({first_line(error)}); give a file of JSON lines or Parquet"
            " instead"
        ) from error
    return [finite.json_row(f"{name}, row {number}", dict(row)) for number, row in enumerate(rows, start=1)]


def _rows_of_program(source: str, split: str) -> list[finite.Row]:
    """Return the rows that `problems(split)` of a Python file gives; they must be what JSON can hold."""
    try:
        rows = list(reward_worker.load(source, "problems")(split))
        for row in rows:
            if not isinstance(row, dict):
                raise TypeError(f"problems({split!r}) gave a {type(row).__name__}, not a dict")
        rows = [json.loads(json.dumps(row, allow_nan=False)) for row in rows]
    except Exception as error:
        raise UserError(f"cannot read the problems of {source} ({reward_worker.explain(error)}); fix it") from error
    return [finite.Row(f"{source}, {split} problem {number}", row) for number, row in enumerate(rows, start=1)]
