"""Settings as dataclass fields that hold default, range, unit and help in one place.

A section of the config, `Sampling`, and the arguments of a command are frozen dataclasses of such fields, from which
the checks, `--help`, docs/config.md and the tests of ranges are derived.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qsharp_jax.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
    """The values that a setting may have: a predicate, and the same in words ("a whole number, at least 1")."""

    passes: Callable[[Any], bool]
    words: str


def setting(default: Any, rule: Rule, help: str, *, unit: str | None = None) -> Any:
    """Return a dataclass field with a default, the rule for its values, its help text, and its unit, as "tokens"."""
    return dataclasses.field(default=default, metadata={"rule": rule, "help": help, "unit": unit})


def check(name: str, value: Any, rule: Rule) -> None:
    """Check a setting, every entry of an array; a UserError gives the `name` as the user wrote it, as "--eta"."""
    entries = np.unique(value).tolist() if isinstance(value, np.ndarray) else [value]
    if not all(map(rule.passes, entries)):
        raise UserError(f"{name} is {value!r}; it must be {rule.words}")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def whole(least: int) -> Rule:
    return Rule(lambda v: is_whole(v) and v >= least, f"a whole number, at least {least}")


def one_of(*names: str) -> Rule:
    return Rule(lambda v: v in names, f"one of {', '.join(names)}")


def optional(rule: Rule) -> Rule:
    return Rule(lambda v: v is None or rule.passes(v), f"{rule.words}, or none")


POSITIVE = Rule(lambda v: is_number(v) and v > 0, "a number above 0")  # inf is allowed: no clipping
POSITIVE_FINITE = Rule(lambda v: is_number(v) and 0 < v < math.inf, "a finite number above 0")
NOT_NEGATIVE = Rule(lambda v: is_number(v) and 0 <= v < math.inf, "a finite number, at least 0")
SHARE = Rule(lambda v: is_number(v) and 0 < v <= 1, "a number above 0, at most 1")
FRACTION = Rule(lambda v: is_number(v) and 0 <= v < 1, "a number, at least 0 and below 1")
UNIT = Rule(lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
WITHIN = Rule(lambda v: is_number(v) and 0 < v < 1, "a number above 0 and below 1")
TRUTH = Rule(lambda v: isinstance(v, bool), "true or false")
TEXT = Rule(lambda v: isinstance(v, str) and v != "", "a text that is not empty")
