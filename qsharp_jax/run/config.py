"""The configuration of a run: a Python file's `get_config()`, changed by `--config.KEY=VALUE`, checked, kept as JSON.

Knows the ranges of the shared sections (`generate`, `collect`, `fit`, ...) and nothing of what is done with them.
In the error messages and on the command line a key is dotted: `fit.optimizer.clip`.
"""

import ast
import itertools
import math
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qsharp_jax.sampling import LEAST_ETA, LEAST_TEMPERATURE, OTHERS
from qsharp_jax.system.errors import UserError, nearest

# ---------------------------------------------------------------------------------------------------------------
# From the file and the command line
# ---------------------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: list[str]) -> ConfigDict:
    """Runs the config file's `get_config()` and applies the overrides; the result is locked.

    A `mesh` that is a text is the name of a preset in the `meshes.py` beside the file, or in the folder above, and
    becomes that preset's section; `--config.mesh=NAME` comes before all other overrides.

    Raises UserError if the file is missing, fails (naming the line), returns no ConfigDict or holds a value that JSON
    cannot keep, for an unknown preset, and as `override` does.
    """
    path = Path(path)
    try:
        source = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"there is no config file {path}; give the path of one, as configs/arithmetic.py") from None
    module = {"__name__": "config", "__file__": str(path)}
    beside = [str(folder) for folder in path.resolve().parents[:2]]
    sys.path[:0] = beside  # so that a config can import the one that it varies, there or in the folder above
    try:
        exec(compile(source, str(path), "exec"), module)
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
        raise UserError(f"{where}: {type(e).__name__}: {what}; mend the config file") from e
    finally:
        del sys.path[: len(beside)]
    names, rest = _split_mesh(overrides)
    if "mesh" not in config and names:
        raise UserError(f'there is no setting --config.mesh in {path}; add c.mesh = "single"')
    if isinstance(name := (names or [config.get("mesh")])[-1], str):
        with config.unlocked(), config.ignore_type():
            config.mesh = ConfigDict(preset(path, name))
    override(config, rest)
    to_json(config)
    return config


def override_mesh(config: ConfigDict, overrides: list[str]) -> None:
    """Changes the mesh of a workdir's config, in place: --config.mesh=single, or single numbers of the one it has.

    Raises UserError for a name that only the `meshes.py` beside a config file could tell, and as `override` does.
    """
    names, rest = _split_mesh(overrides)
    if names and names[-1] != "single":
        raise UserError(f"--config.mesh={names[-1]} is looked up beside the config file; give --config too, or single")
    if names and "mesh" in config:
        with config.unlocked():
            del config["mesh"]
    override(config, rest)


def presets(path: str | Path) -> dict[str, dict]:
    """The sections by name in the `meshes.py` beside a config file, or else in the folder above.

    Raises UserError if there is no such file, or it does not hold what it should.
    """
    path = _presets_file(path)
    try:
        return dict(runpy.run_path(str(path))["PRESETS"])
    except FileNotFoundError:
        raise UserError(f"there is no {path}, where the mesh is looked up; copy configs/meshes.py there") from None
    except Exception as e:
        raise UserError(f"{path}: {type(e).__name__}: {e}; it must have a table PRESETS, as configs/meshes.py") from e


def preset(path: str | Path, name: str) -> dict:
    """One of the `presets`; UserError for a name that is not among them, as well."""
    known = presets(path)
    if name not in known:
        raise UserError(f"there is no mesh {name!r} in {_presets_file(path)}; {nearest(name, known)}")
    return known[name]


def _presets_file(path: str | Path) -> Path:
    above = Path(path).absolute().parent.with_name("meshes.py")
    beside = Path(path).with_name("meshes.py")
    return beside if beside.exists() or not above.exists() else above


def _split_mesh(overrides: list[str]) -> tuple[list[str], list[str]]:
    """The names that `--config.mesh` is given, and the other overrides."""
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
    """The last line of the file that the error came through, if it came through the file."""
    if isinstance(error, SyntaxError) and error.filename == path:  # it never ran, so it has no frame there
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else None


def override(config: ConfigDict, overrides: list[str]) -> None:
    """Sets `--config.KEY=VALUE` (or `--config.KEY`, `VALUE`) in place, each value read as its key's present type.

    Raises UserError for an argument of another form, an unknown key, or a value of the wrong type.
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
        section[name] = _parse(text, section[name], kind)
    except ValueError:
        raise UserError(f"--config.{key}={text} is not {_words(section[name], kind)}") from None


def _parse(text: str, present: Any, kind: type) -> Any:
    """Reads `text` as a `kind`, the declared type of the value `present`; ValueError if it is none."""
    if present is None and text.lower() == "none":
        return None
    if kind in (tuple, list):
        items = text.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]").split(",")
        if not items[-1].strip():  # "(1,)" and "()"
            items.pop()
        return kind(_scalar(item.strip(), _item_kind(present)) for item in items)
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
    if value != value:  # NaN passes no range and equals nothing, so no setting means it
        raise ValueError
    return value


def _item_kind(present: tuple | list | None) -> type:
    """A list keeps the type of its items; where that is not one type, or there are none, they are floats."""
    kinds = {type(item) for item in present or ()}
    return kinds.pop() if len(kinds) == 1 else float


def _words(present: Any, kind: type) -> str:
    if kind in (tuple, list):
        return f"a list of {_item_kind(present).__name__}, as 1,2"
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, f"of type {kind.__name__}")


# ---------------------------------------------------------------------------------------------------------------
# Ranges
# ---------------------------------------------------------------------------------------------------------------

Rule = tuple[Callable[[Any], bool], str]  # what a value must pass, and the same in words


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _whole(least: int) -> Rule:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least, f"a whole number, at least {least}"


def _one_of(*names: str) -> Rule:
    return lambda v: v in names, f"one of {', '.join(names)}"


_POSITIVE = (lambda v: _is_number(v) and v > 0, "a number above 0")  # inf is meant: no clipping
_POSITIVE_FINITE = (lambda v: _is_number(v) and 0 < v < math.inf, "a finite number above 0")
_NOT_NEGATIVE = (lambda v: _is_number(v) and 0 <= v < math.inf, "a finite number, at least 0")
_SHARE = (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, at most 1")
_FRACTION = (lambda v: _is_number(v) and 0 <= v < 1, "a number, at least 0 and below 1")
_UNIT = (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
_WITHIN = (lambda v: _is_number(v) and 0 < v < 1, "a number above 0 and below 1")
_TRUTH = (lambda v: isinstance(v, bool), "true or false")


def _is_list(value: Any, passes: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(passes(item) for item in value)


_TEMPERATURE = (
    lambda v: _is_number(v) and (v == 0 or LEAST_TEMPERATURE <= v < math.inf),
    f"0, which is greedy, or a finite number, at least {LEAST_TEMPERATURE:g}",
)
_ETA = (lambda v: _is_number(v) and v >= LEAST_ETA, f"a number, at least {LEAST_ETA:g}")  # inf is meant: no guidance
_OWN_ETA = (lambda v: v is None or _ETA[0](v) and v < math.inf, f"a number, at least {LEAST_ETA:g}, or none")
_ETAS = (
    lambda v: _is_list(v, lambda x: _ETA[0](x) and x < math.inf) and v != [],
    f"a list of finite numbers, at least {LEAST_ETA:g}",
)
_ASCENDING = (
    lambda v: _is_list(v, _is_number) and all(-math.inf < a < b < math.inf for a, b in itertools.pairwise(v)),
    "a list of finite numbers, each above the one before",
)

_OPTIMIZER = {
    "name": _one_of("adamw", "adafactor", "muon"),
    "learning_rate": _POSITIVE_FINITE,
    "adam_learning_rate": _POSITIVE_FINITE,
    "b2": _FRACTION,
    "weight_decay": _NOT_NEGATIVE,
    "clip": _POSITIVE,
    "warmup_steps": _whole(0),
    "schedule": _one_of("constant", "cosine"),
    "end_fraction": _UNIT,
}

VALUE_METHODS = ("qsharp", "cd", "vas")  # of `config.algorithm`: those that learn a guide
POLICY_METHODS = ("reinforce", "ppo", "dpo", "rpo", "klq")  # those that train a copy of the reference
ON_POLICY = ("reinforce", "ppo", "klq")  # and learn from rollouts of it; the others' first rollouts are pi_ref's


def trains_policy(config: ConfigDict) -> bool:
    """Return whether the algorithm learns a policy instead of a guide."""
    return config.algorithm in POLICY_METHODS


def kl_weight(config: ConfigDict) -> float:
    """Return eta of the objective E reward - eta KL(pi || pi_ref): the algorithm's own, or `collect.eta`."""
    own = {"dpo": "beta", "rpo": "beta", "klq": "tau"}.get(config.algorithm)
    weight = config[config.algorithm][own] if own else None
    return config.collect.eta if weight is None else weight


RULES: dict[str, Rule] = {
    "seed": _whole(0),
    "algorithm": _one_of(*VALUE_METHODS, *POLICY_METHODS),
    "rounds": _whole(1),
    "ref": (_is_text, "pretrain, or the folder of a model"),
    "guide": (_is_text, "ref, scratch, or the folder of a model"),
    "dtype": (lambda v: v in (None, "float32", "bfloat16"), "float32, bfloat16, or none for a folder's own"),
    "prompt_format": _one_of("plain", "chat"),
    "generate.temperature": _TEMPERATURE,
    "generate.top_p": _SHARE,
    "generate.top_k": _whole(0),
    "generate.top_k_candidates": _whole(1),
    "generate.others": _one_of(*OTHERS),
    "generate.max_new_tokens": _whole(1),
    "generate.prompt_bucket": _whole(1),
    "collect.prompts": _whole(1),
    "collect.samples": _whole(1),
    "collect.batch_size": _whole(1),
    "collect.eta": _ETA,
    "collect.shard_rows": _whole(1),
    "collect.drop_no_variation": _TRUTH,
    "pretrain.steps": _whole(0),
    "pretrain.batch_size": _whole(1),
    "pretrain.stop_loss": _NOT_NEGATIVE,
    "pretrain.length_bucket": _whole(1),
    "pretrain.log_every": _whole(1),
    "pretrain.save_every": _whole(1),
    "fit.epochs": _whole(1),
    "fit.batch_size": _whole(1),
    "fit.accumulate": _whole(1),
    "fit.remat": _one_of("none", "dots", "full"),
    "fit.dtype": (lambda v: v in (None, "float32", "bfloat16"), "float32, bfloat16, or none for the guide's own"),
    "fit.attention": _one_of("xla", "blocks", "cudnn", "splash"),
    "fit.lora_rank": _whole(0),
    "fit.lora_alpha": _POSITIVE_FINITE,
    "fit.length_bucket": _whole(1),
    "fit.pack_length": _whole(0),
    "fit.log_every": _whole(1),
    "fit.save_every": _whole(1),
    "fit.holdout": _FRACTION,
    "fit.evaluate_every": _whole(0),
    "fit.patience": _whole(0),
    "fit.projection": _one_of("two_hot", "nearest"),
    "fit.clip_rewards": _TRUTH,
    "fit.warm_start": _TRUTH,
    "fit.future_offsets": _whole(0),
    "fit.future_weight": _NOT_NEGATIVE,
    "cd.variant": _one_of("regression", "fudge", "q"),
    "vas.td_lambda": _UNIT,
    "evaluate.problems": _whole(1),
    "evaluate.samples": _whole(1),
    "evaluate.guided_samples": _whole(1),
    "evaluate.pass_at": (
        lambda v: _is_list(v, lambda x: _is_number(x) and x >= 1 and x % 1 == 0) and len(v) == len({*v}),
        "a list of different whole numbers, at least 1",
    ),
    "evaluate.etas": _ETAS,
    "evaluate.batch_size": _whole(1),
    "value.type": _one_of("v", "q"),
    "value.distribution": _one_of("bernoulli", "categorical", "scalar"),
    "value.atoms": _ASCENDING,
    "policy.prompts": _whole(1),
    "policy.batch_size": _whole(1),
    "policy.log_prob_limit": _POSITIVE,
    "policy.detach_values": _TRUTH,
    "reinforce.baseline": _one_of("leave_one_out", "mean"),
    "reinforce.greedy": _TRUTH,
    "ppo.epochs": _whole(1),
    "ppo.clip": _WITHIN,
    "ppo.gae_lambda": _UNIT,
    "ppo.value_weight": _NOT_NEGATIVE,
    "dpo.beta": _OWN_ETA,
    "dpo.epochs": _whole(1),
    "rpo.beta": _OWN_ETA,
    "rpo.alpha": _NOT_NEGATIVE,
    "rpo.epochs": _whole(1),
    "klq.tau": _OWN_ETA,
    "klq.epochs": _whole(1),
    "klq.return_lambda": _UNIT,
    "klq.alpha": _SHARE,
    **{
        f"{section}.optimizer.{name}": rule
        for section in ("pretrain", "fit", "policy")
        for name, rule in _OPTIMIZER.items()
    },
    "compare.methods": (
        lambda v: _is_list(v, lambda x: x in VALUE_METHODS + POLICY_METHODS) and 0 < len(v) == len({*v}),
        f"a list of different ones of {', '.join(VALUE_METHODS + POLICY_METHODS)}",
    ),
    "compare.seeds": (
        lambda v: _is_list(v, lambda x: type(x) is int and x >= 0) and 0 < len(v) == len({*v}),
        "a list of different whole numbers, at least 0",
    ),
    "mesh.name": (_is_text, "a preset's name"),
    "mesh.platform": _one_of("any", "cpu", "gpu", "tpu"),
    "mesh.kind": (_is_text, "words for its devices"),
    "mesh.topology": (lambda v: isinstance(v, str), "a TPU slice, as v5e:2x4, or empty"),
    "mesh.slices": _whole(1),
    "mesh.hosts": _whole(1),
    "mesh.devices_per_host": _whole(1),
    **{f"mesh.fit.{axis}": _whole(1) for axis in ("data", "fsdp", "tensor")},
    **{f"mesh.decode.{axis}": _whole(1) for axis in ("data", "attention_data", "tensor")},
    **{f"mesh.{name}": _whole(0) for name in ("hbm_bytes", "vmem_bytes")},
    **{f"mesh.{name}": _NOT_NEGATIVE for name in ("flops", "hbm_bandwidth", "ici_bandwidth", "dcn_bandwidth")},
}


def check(config: ConfigDict) -> None:
    """Checks the ranges of the shared settings; a setting that this config does not have is passed over.

    Raises UserError naming the first setting out of range, its value and what is allowed.
    """
    for key, value in _leaves(to_json(config)):
        passes, words = RULES.get(key, (lambda _: True, ""))
        if not passes(value):
            raise UserError(f"config.{key} is {value!r}; it must be {words}")


# ---------------------------------------------------------------------------------------------------------------
# To and from JSON
# ---------------------------------------------------------------------------------------------------------------


def to_json(config: ConfigDict) -> dict:
    """The config as a plain dict that `json` can write; tuples become lists.

    Raises UserError naming a key whose value is neither a number, a text, a truth value, None, nor a list of these.
    """
    return _plain("config", config.to_dict())


def from_json(plain: dict) -> ConfigDict:
    """The locked config that `to_json` gave, with lists for tuples."""
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
    """All settings, dotted."""
    return [key for key, _ in _leaves(to_json(config))]


def differences(a: ConfigDict, b: ConfigDict, *, but: str | None = None) -> list[str]:
    """The settings in which `b` differs from `a`, each as "fit.epochs: 4 -> 5"; a tuple equals a list, 1 equals 1.0.

    `but` is a section that is left out.
    """
    old, new = (dict(_leaves(to_json(config))) for config in (a, b))
    absent = object()

    def words(value: Any) -> str:
        return "absent" if value is absent else repr(value)

    pairs = [(key, old.get(key, absent), new.get(key, absent)) for key in old | new if key.partition(".")[0] != but]
    return [f"{key}: {words(before)} -> {words(after)}" for key, before, after in pairs if before != after]
