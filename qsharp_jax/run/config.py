"""The configuration of a run: a recipe's `get_config()`, changed by `--config.KEY=VALUE`, checked, stored as JSON.

In messages and on the command line a key is dotted: `fit.optimizer.clip`.
"""

import ast
import itertools
import json
import runpy
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qsharp_jax.algorithms.registry import ALGORITHMS
from qsharp_jax.run import schema
from qsharp_jax.system import settings
from qsharp_jax.system.errors import UserError, nearest

# Sections whose settings depend on what they are for: the task, the size of a model, the algorithms that are compared.
OPEN = ("task.", "model.", "compare.changes.")
RECIPES = Path(__file__).parents[1] / "configs"  # the recipes of the package

# --- From the file and the command line -----------------------------------------------------------------------------


def load(recipe: str | Path, overrides: list[str]) -> ConfigDict:
    """Return the locked config of a recipe's `get_config()`, changed by the overrides.

    A `mesh` that is a string is a preset's name, and becomes that preset's section; `--config.mesh=NAME` applies before
    all other overrides.

    Args:
      recipe: a file, or the name of one in `qsharp_jax/configs`, for example "arithmetic" or "math/llama31_8b".

    Raises:
      UserError: if the file does not exist, fails (naming the line), returns no ConfigDict or has a value that JSON
        cannot store, for an unknown preset, and as in `override`.
    """
    path = find(recipe)
    try:
        module = runpy.run_path(str(path))
        if "get_config" not in module:
            raise TypeError("the file defines no get_config()")
        config = module["get_config"]()
        if type(config) is not ConfigDict:
            raise TypeError(f"get_config() returns a {type(config).__name__}, not an ml_collections.ConfigDict")
        config.lock()
    except Exception as e:
        line = _line(e, str(path))
        where = f"{path}, line {line}" if line else path
        what = (str(e).splitlines() or ["no message"])[0]
        raise UserError(f"{where}: {type(e).__name__}: {what}; fix the config file") from e
    names, rest = _split_mesh(overrides)
    if "mesh" not in config and names:
        raise UserError(f'there is no setting --config.mesh in {path}; add c.mesh = "single"')
    if isinstance(name := (names or [config.get("mesh")])[-1], str):
        _set_mesh(config, preset(path, name))
    override(config, rest)
    to_json(config)
    return config


def check_known(config: ConfigDict, recipe: str | Path) -> None:
    """Check that a recipe has no setting that nothing reads, such as a misspelt one; a UserError names it.

    Stored configs may have settings of older versions.
    """
    for key in keys(config):
        if key not in schema.RULES and not key.startswith(OPEN):
            raise UserError(f"{find(recipe)} has the setting {key}, which is not known; {nearest(key, schema.RULES)}")


def find(recipe: str | Path) -> Path:
    """Return the path of a recipe, given by path or by name in `qsharp_jax/configs`; a UserError if none exists."""
    if Path(recipe).is_file():
        return Path(recipe)
    if (path := RECIPES / f"{recipe}.py").is_file():
        return path
    recipes = [path for path in RECIPES.rglob("[!_]*.py") if "def get_config" in path.read_text(encoding="utf-8")]
    names = [path.relative_to(RECIPES).with_suffix("").as_posix() for path in recipes]
    raise UserError(
        f"there is no config file {recipe}; give a path, or the name of a recipe: {nearest(str(recipe), names)}"
    )


def override_stored(config: ConfigDict, overrides: list[str]) -> None:
    """Change a stored config in place, as `override`, and its mesh by `--config.mesh=NAME`, which applies first."""
    names, rest = _split_mesh(overrides)
    if names:
        _set_mesh(config, preset(RECIPES, names[-1]))
    override(config, rest)


def mesh_section(name: str, overrides: list[str]) -> ConfigDict:
    """Return a preset of the package as a config's section `mesh`, changed by `--config.mesh.KEY=VALUE`."""
    config = ConfigDict({"mesh": preset(RECIPES, name)}).lock()
    override(config, overrides)
    return config.mesh


def presets(path: str | Path) -> dict[str, dict]:
    """Return the sections `mesh` by name, from the `meshes.py` beside a config file, or else of this package."""
    path = _presets_file(path)
    try:
        return dict(runpy.run_path(str(path))["PRESETS"])
    except Exception as e:
        raise UserError(f"{path}: {type(e).__name__}: {e}; it must have a table PRESETS, as configs/meshes.py") from e


def preset(path: str | Path, name: str) -> dict:
    """Return one of the `presets`; a UserError for an unknown name."""
    known = presets(path)
    if name not in known:
        raise UserError(f"there is no mesh {name!r} in {_presets_file(path)}; {nearest(name, known)}")
    return known[name]


def _presets_file(path: str | Path) -> Path:
    beside = Path(path).with_name("meshes.py")
    return beside if beside.exists() else RECIPES / "meshes.py"


def _set_mesh(config: ConfigDict, section: dict) -> None:
    with config.unlocked(), config.ignore_type():
        config.mesh = ConfigDict(section)


def _split_mesh(overrides: list[str]) -> tuple[list[str], list[str]]:
    """Return the names given by `--config.mesh`, and the other overrides."""
    names, rest, arguments = [], [], iter(overrides)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        pair = [argument] if equals else [argument, *itertools.islice(arguments, 1)]
        if key == "--config.mesh" and (equals or len(pair) == 2):
            names.append(text if equals else pair[1])
        else:
            rest += pair
    return names, rest


def _line(error: Exception, path: str) -> int | None:
    """Return the last line of the file that the error passed through; None if it did not."""
    if isinstance(error, SyntaxError) and error.filename == path:  # it never ran, so it has no frame
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else None


def override(config: ConfigDict, overrides: list[str]) -> None:
    """Set `--config.KEY=VALUE` (or `--config.KEY`, `VALUE`) in place, reading each value as its key's current type.

    A UserError for an argument of another form, an unknown key, or a value of the wrong type.
    """
    arguments = iter(overrides)
    for argument in arguments:
        if not argument.startswith("--config."):
            raise UserError(f"unknown argument {argument!r}; settings are written --config.KEY=VALUE")
        key, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            text = next(arguments, None)
            if text is None:
                raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
        _set(config, key, text)


def _set(config: ConfigDict, key: str, text: str) -> None:
    known = dict(_leaves(to_json(config)))
    if key not in known:
        inside = [k for k in known if k.startswith(f"{key}.")]
        hint = f"it is a section, with {', '.join(inside)}" if inside else nearest(key, known)
        raise UserError(f"there is no setting --config.{key}; {hint}")
    parent, _, name = key.rpartition(".")
    section = config[parent] if parent else config
    kind = section.get_type(name)
    try:
        takes_none = section[name] is None or key in schema.RULES and schema.RULES[key].passes(None)
        if takes_none and text.lower() == "none":
            section[name] = None
        else:
            section[name] = _parse(text, kind, _item_kind(key, section[name]))
    except ValueError:
        shown = text if text.isprintable() else repr(text)
        raise UserError(f"--config.{key}={shown} is not {_words(kind, _item_kind(key, section[name]))}") from None


def _parse(text: str, kind: type, item_kind: type) -> Any:
    """Read `text` as a `kind`; a ValueError if it is not one.

    A list is written as 1,2. One of texts may also be JSON, and is for commas, line ends, and spaces at their ends:
    ["a, b", "c "].
    """
    if kind in (tuple, list) and item_kind is str and text.startswith('["'):
        return kind(json.loads(text))
    if kind in (tuple, list):
        if item_kind is str and (text != text.strip() or "\n" in text):  # which would be lost
            raise ValueError
        items = text.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]").split(",")
        if not items[-1].strip():  # "(1,)" and "()"
            items.pop()
        return kind(_scalar(item.strip(), item_kind) for item in items)
    if kind is type(None):  # no type to go by: None without a placeholder, or read back from JSON
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    return _scalar(text, kind)


def _scalar(text: str, kind: type) -> bool | int | float | str:
    if kind is bool:
        text = text.lower()
        if text not in ("true", "1", "false", "0"):
            raise ValueError
        return text in ("true", "1")
    if kind not in (int, float, str):
        raise ValueError
    value = kind(text)
    if value != value:  # NaN passes no range and equals nothing, so no setting allows it
        raise ValueError
    return value


def _item_kind(key: str, present: Any) -> type:
    """Return the type of a list's items; if there are none, or several types, the one that the schema declares."""
    kinds = {type(item) for item in present} if isinstance(present, tuple | list) else set()
    return kinds.pop() if len(kinds) == 1 else schema.ITEM_TYPES.get(key, float)


def _words(kind: type, item_kind: type) -> str:
    if kind in (tuple, list):
        if item_kind is str:
            return 'a list of texts, as a,b, or in JSON where they hold commas, spaces or line ends, as ["a, b", "c"]'
        return f"a list of {item_kind.__name__}, as 1,2"
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, f"of type {kind.__name__}")


# --- Reading the config ---------------------------------------------------------------------------------------------


def trains_policy(config: ConfigDict) -> bool:
    """Return true if the algorithm learns a policy instead of a guide."""
    return ALGORITHMS[config.algorithm].learns == "policy"


def row_width(config: ConfigDict) -> tuple[str, int]:
    """Return which setting of the fit gives the width of a batch's rows, and its value in tokens.

    The rows of a guide's fit are packed, all as wide as `pack_length`, if that is set; others, like all of a policy,
    hold one response and are padded to a multiple of `length_bucket`.
    """
    name = "pack_length" if config.fit.pack_length and not trains_policy(config) else "length_bucket"
    return name, config.fit[name]


def kl_weight(config: ConfigDict) -> float:
    """Return eta of the objective E reward - eta KL(pi || pi_ref): the algorithm's own, or `collect.eta`."""
    own = ALGORITHMS[config.algorithm].eta
    weight = config[config.algorithm][own] if own else None
    return config.collect.eta if weight is None else weight


def check(config: ConfigDict) -> None:
    """Check the ranges of the settings in `schema.RULES` that this config has.

    A UserError names the first setting out of range, its value and what is allowed.
    """
    for key, value in _leaves(to_json(config)):
        if key in schema.RULES:
            settings.check(f"config.{key}", value, schema.RULES[key])


# --- To and from JSON -----------------------------------------------------------------------------------------------


def to_json(config: ConfigDict) -> dict:
    """Return the config as a plain dict that `json` can write, with lists for tuples; a UserError for other values."""
    return _plain("config", config.to_dict())


def from_json(plain: dict) -> ConfigDict:
    """Return the locked config that `to_json` gave, with lists for tuples."""
    return ConfigDict(plain).lock()


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(f"{key}.{name}", item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(key, item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"{key} is of type {type(value).__name__}; use numbers, texts, booleans, lists of them")


def _leaves(plain: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in plain.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def keys(config: ConfigDict) -> list[str]:
    """Return all settings, dotted."""
    return [key for key, _ in _leaves(to_json(config))]


_ABSENT = object()  # in place of the value of a setting that a config does not have


def differences(a: ConfigDict, b: ConfigDict, *, but: Collection[str] = ()) -> list[str]:
    """Return the settings that differ, each as "fit.epochs: 4 -> 5", except the settings and sections `but`."""

    def words(value: Any) -> str:
        return "absent" if value is _ABSENT else repr(value)

    pairs = {key: pair for key, pair in changed(a, b).items() if key.partition(".")[0] not in but}
    return [f"{key}: {words(before)} -> {words(after)}" for key, (before, after) in pairs.items()]


def changed(a: ConfigDict, b: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Return both values of the settings that differ, by key; a tuple equals a list, and 1 equals 1.0."""
    old, new = (dict(_leaves(to_json(config))) for config in (a, b))
    pairs = {key: (old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in old | new}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
