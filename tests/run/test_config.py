"""The config file, the overrides, the ranges and the JSON round trip, each as a user meets them."""

import json
import math
import shutil

import pytest
from helpers import refusal
from ml_collections import ConfigDict
from repository import CONFIGS

from qsharp_jax import cli
from qsharp_jax.run import checks, schema
from qsharp_jax.run import config as configs
from qsharp_jax.system.errors import UserError, nearest

FILE = """
from ml_collections import ConfigDict, config_dict

def get_config():
    config = ConfigDict(dict(
        seed=0,
        name="words",
        generate=dict(eta=0.1, top_k=0, greedy=False),
        evaluate=dict(etas=(0.5, 0.1), sizes=[1, 2], modes=("qsharp", "cd"), extra=()),
        shape=None,
    ))
    config.limit = config_dict.placeholder(int)
    return config
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "words.py"
    path.write_text(FILE)
    return path


def test_load_gives_a_locked_config(path):
    config = configs.load(path, [])
    assert config.generate.eta == 0.1 and config.evaluate.etas == (0.5, 0.1) and config.limit is None
    with pytest.raises((KeyError, AttributeError)):
        config.generate.new = 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def get_config(:\n", "line 1: SyntaxError"),
        ("x = 1\n\nx = = 2\n", "line 3: SyntaxError"),
        ("if True:\nx = 1\n", "line 2: IndentationError"),
        ("\nimport no_such_module_of_ours\n", "line 2: ModuleNotFoundError"),
        ("def helper():\n    return 1 / 0\n\ndef get_config():\n    return helper()\n", "line 2: ZeroDivisionError"),
        ("import json\n\ndef get_config():\n    json.loads('{')\n", "line 4: JSONDecodeError"),
        ("def get_config():\n    raise ValueError\n", "line 2: ValueError: no message"),
        ("def get_config():\n    raise ValueError('one\\ntwo')\n", "line 2: ValueError: one; fix"),
        ("x = 1\n", "no get_config()"),
        ("def get_config():\n    return {}\n", "returns a dict, not an ml_collections.ConfigDict"),
        (FILE.replace("shape=None", "shape={1}"), "config.shape is of type set"),
        (FILE.replace("placeholder(int)", "required_placeholder(int)"), "words.py: RequiredValueError"),
        (b"\xff\xfe\x00", "words.py"),
        (b"x = '\x00'\n", "words.py"),
    ],
)
def test_a_broken_file_is_named_with_its_line(path, source, words):
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    message = refusal(configs.load, path, [])
    assert words in message
    assert message.startswith("config.shape" if "set" in words else str(path))


@pytest.mark.parametrize("name", ["absent.py", "", "arithmetik"])
def test_a_missing_file_a_folder_and_a_name_that_no_recipe_has_are_named(tmp_path, name):
    path = name if name == "arithmetik" else tmp_path / name
    with pytest.raises(UserError, match=f"no config file {path}.*" + "did you mean 'arithmetic'" * (path == name)):
        configs.load(path, [])


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("--config.seed=7", "seed", 7),
        ("--config.seed=-7", "seed", -7),
        ("--config.generate.eta=1", "generate.eta", 1.0),
        ("--config.generate.eta=inf", "generate.eta", math.inf),
        ("--config.generate.eta=5e-2", "generate.eta", 0.05),
        ("--config.generate.greedy=true", "generate.greedy", True),
        ("--config.generate.greedy=1", "generate.greedy", True),
        ("--config.generate.greedy=False", "generate.greedy", False),
        ("--config.generate.greedy=0", "generate.greedy", False),
        ("--config.name=a=b", "name", "a=b"),
        ("--config.name=", "name", ""),
        ("--config.name=None", "name", "None"),
        ("--config.evaluate.etas=0.5,0.2", "evaluate.etas", (0.5, 0.2)),
        ("--config.evaluate.etas=(1, 0.2)", "evaluate.etas", (1.0, 0.2)),
        ("--config.evaluate.etas=0.3", "evaluate.etas", (0.3,)),
        ("--config.evaluate.etas=(0.3,)", "evaluate.etas", (0.3,)),
        ("--config.evaluate.etas=()", "evaluate.etas", ()),
        ("--config.evaluate.sizes=[4,8]", "evaluate.sizes", [4, 8]),
        ("--config.evaluate.modes=cd", "evaluate.modes", ("cd",)),
        ("--config.evaluate.extra=1", "evaluate.extra", (1.0,)),
        ("--config.limit=5", "limit", 5),
        ("--config.limit=none", "limit", None),
        ("--config.shape=(1, 2)", "shape", (1, 2)),
        ("--config.shape=v5e", "shape", "v5e"),
    ],
)
def test_an_override_takes_the_type_of_the_present_value(path, argument, key, value):
    before = configs.load(path, [])
    for arguments in ([argument], argument.split("=", 1)):
        config = configs.load(path, arguments)
        assert config[key] == value and type(config[key]) is type(value)
        assert len(configs.differences(before, config)) == (before[key] != value)


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        (("dtype=float32", "dtype=none"), "dtype", None),
        (("dtype=none", "dtype=bfloat16"), "dtype", "bfloat16"),
        (("generate.candidate_slots=4", "generate.candidate_slots=None"), "generate.candidate_slots", None),
        (("loggers=()", "loggers=tensorboard"), "loggers", ("tensorboard",)),
    ],
)
def test_what_a_setting_may_be_it_may_become_again(changes, key, value):
    config = configs.load("arithmetic", [f"--config.{change}" for change in changes])
    configs.check(config)
    assert config[key] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a", ("a",)), ("a, b", ("a", "b")), ("()", ()), (r'["a, b", "\n\n"]', ("a, b", "\n\n")), ('["a', None),
        ("\n", None), ("Q: ", None), ("a\nb", None),
    ],
)
def test_texts_with_commas_and_line_ends_are_written_as_json(text, value):
    if value is None:
        assert "is not a list of texts, as a,b, or in JSON" in refusal(configs.load, "arithmetic", [f"--config.generate.stop={text}"])
    else:
        assert configs.load("arithmetic", [f"--config.generate.stop={text}"]).generate.stop == value


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.seed=1.5", "is not a whole number"),
        ("--config.seed=none", "is not a whole number"),
        ("--config.generate.eta=small", "is not a number"),
        ("--config.generate.eta=nan", "is not a number"),
        ("--config.generate.eta=", "is not a number"),
        ("--config.generate.greedy=2", "is not true or false"),
        ("--config.evaluate.etas=0.5,,1", "is not a list of float"),
        ("--config.evaluate.etas=0.5;1", "is not a list of float"),
        ("--config.evaluate.sizes=1,2.5", "is not a list of int"),
        ("--config.limit=x", "is not a whole number"),
        ("--config.generate.etta=1", "did you mean 'generate.eta'"),
        ("--config.eta=1", "did you mean 'generate.eta'"),
        ("--config.Seed=1", "did you mean 'seed'"),
        ("--config.zzz=1", "known: evaluate.etas, "),
        ("--config.seed.deep=1", "no setting --config.seed.deep"),
        ("--config.generate=1", "a section, with generate.eta, generate.greedy, generate.top_k"),
        ("--config.=1", "no setting --config.;"),
        ("--config.seed", "no value"),
        ("--config.mesh=v5p_8", "no setting --config.mesh"),
        ("--seed=1", "unknown argument '--seed=1'"),
        ("seed=1", "unknown argument 'seed=1'"),
    ],
)
def test_an_override_that_cannot_be_is_named(path, argument, words):
    """A wrong type with the key, the value and the type."""
    message = refusal(configs.load, path, [argument])
    words = f"{argument} {words}" if words.startswith("is not") else words
    assert words in message


# By the words of a rule: values that it allows, and values that it does not. Of "one of ..." every name is allowed.
VALUES = {
    "a whole number, at least 0": ([0, 5], [-1, 0.5, True, None]),
    "a whole number, at least 1": ([1, 64], [0, 1.5, True]),
    "a finite number, at least 0": ([0, 0.1], [-0.1, math.inf]),
    "a finite number above 0": ([1e-5, 1], [0, -1.0, math.inf, math.nan, "1", None]),
    "a finite number above 0, or none": ([None, 4, 2.5], [0, -1.0, math.inf, "1"]),
    "a number above 0": ([1e-4, math.inf], [0, -1, None]),
    "a number above 0, at most 1": ([0.1, 1], [0, 1.1]),
    "a number above 0 and below 1": ([0.2], [0, 1, -0.1]),
    "a number, at least 0 and below 1": ([0, 0.98], [1, -0.1]),
    "a number from 0 to 1": ([0, 0.05, 1], [-0.1, 1.1, None]),
    "a number, at least 1e-06": ([1e-6, 1, math.inf], [0, 1e-7, -0.1, math.nan, "0.1", True]),
    "a number, at least 1e-06, or none": ([None, 0.1], [0, -0.1]),
    "0, which is greedy, or a finite number, at least 1e-06": ([0, 0.8], [-0.1, math.inf]),
    "true or false": ([True, False], [1, 0, "no", None]),
    "float32, bfloat16, or none for the model's own": ([None, "float32", "bfloat16"], ["float16", 32]),
    "a list of finite numbers, each above the one before": (
        [(), (0, 1), [-1.5, 0, 2]], [(1, 0), (0, 0), (0, math.inf), 1, ("a", "b")],
    ),
    "a list of different whole numbers, at least 1": ([(), (1, 8), (1.0, 4.0)], [(0,), (1.5,), (2, 2), 4, ("a",)]),
    "a list of different whole numbers, at least 0": ([(0, 1)], [(), (0, 0), (-1,), (0.5,), 0]),
    "a list of finite numbers, at least 1e-06": ([(0.1, 1), [0.5]], [(0.1, 0), [-1], 0.5, ("a",), (), (0.1, math.inf)]),
    "a list of texts that are not empty": ([(), ["\n", "a b"]], [("a", ""), (1,), "a", 3, None]),
    schema.NAMES_OF_LOGGERS.words: ([(), ("wandb", "tensorboard")], [("wandb", "wandb"), ("paper",), "wandb"]),
    schema.METHODS.words: ([("qsharp", "ppo")], [(), ("ppo", "ppo"), ("sft",), "ppo"]),
    "pretrain, or a model": (["pretrain", "some/folder"], ["", 1, None]),
    "ref, scratch, or a model": (["ref", "scratch", "some/folder"], ["", None]),
    "a preset's name": (["single"], ["", None]),
    "words for its devices": (["TPU v5e"], [""]),
    "a TPU slice, as v5e:2x4, or empty": (["", "v5e:2x4"], [None, 8]),
}  # fmt: skip
# The rules of some settings, independently of the schema.
RULES = {
    "rounds": ([1], [0]), "algorithm": (["vas", "rpo"], ["sft"]), "collect.eta": ([1e-6, math.inf], [0, 1e-7]),
    "generate.top_p": ([1], [0, 1.1]), "generate.temperature": ([0], [-0.1]), "fit.holdout": ([0], [1]),
    "fit.optimizer.clip": ([math.inf], [0]), "policy.optimizer.warmup_steps": ([0], [-1]), "ppo.clip": ([0.2], [0, 1]),
    "klq.alpha": ([1], [0]), "dpo.beta": ([None, 0.1], [0]), "vas.td_lambda": ([0, 1], [1.1]),
    "cd.variant": (["fudge", "q"], ["v"]), "mesh.fit.fsdp": ([1], [0]), "mesh.hbm_bytes": ([0], [-1]),
}  # fmt: skip


def values_of(rule):
    """Values that a rule allows, and values that it does not."""
    first, _, names = rule.words.partition("one of ")
    return VALUES[rule.words] if first else (names.split(", "), ["none of these", None, 0])


@pytest.mark.parametrize(
    ("key", "allowed", "forbidden"),
    [(key, *values_of(rule)) for key, rule in schema.RULES.items()] + [(key, *values) for key, values in RULES.items()],
)
def test_check_names_the_key_and_the_value_out_of_range(key, allowed, forbidden):
    def with_value(value):
        for part in reversed(key.split(".")):
            value = {part: value}
        return ConfigDict(value)

    for value in allowed:
        configs.check(with_value(value))
    for value in forbidden:
        shown = list(value) if isinstance(value, tuple) else value
        message = refusal(configs.check, with_value(value))
        assert message.startswith(f"config.{key} is {shown!r}; it must be ")


def test_the_defaults_are_in_their_ranges():
    config = schema.default_config()
    configs.check(config)
    configs.check(ConfigDict({"model": {"layers": -1}, "generate": {}}))  # what is absent or unknown is passed over
    assert config.fit.dtype is None and config.get_type("seed") is int and config.fit.get_type("dtype") is str


def test_only_recipes_are_named():
    sentence = refusal(configs.find, "no_such_recipe_at_all")
    assert "math/llama31_8b" in sentence and "meshes" not in sentence and "paper," not in sentence


RECIPES = sorted(path.relative_to(configs.RECIPES).with_suffix("") for path in configs.RECIPES.rglob("[!_]*.py"))


@pytest.mark.parametrize("name", [str(name) for name in RECIPES if name.name not in ("meshes", "paper")])
def test_a_recipe_is_found_by_its_name_and_by_its_path(name):
    # Of the user's own task the recipe lacks the files.
    own = ["--config.task.prompts=p", "--config.task.rewards=m:f"] if name == "own" else []
    config = configs.load(name, ["--config.mesh=cuda_8", *own])
    checks.check_settings(config) if "compare" not in config else configs.check(config)
    assert config == configs.load(CONFIGS / f"{name}.py", ["--config.mesh=cuda_8", *own])


@pytest.mark.parametrize("name", [str(name) for name in RECIPES if name.name not in ("meshes", "paper")])
def test_the_policy_of_a_recipe_outlasts_its_warm_up(name):
    """REINFORCE learns once from every rollout, and so makes the fewest updates."""
    config = configs.load(name, [])
    if "compare" in config:
        configs.override(config, [f"--config.{change}" for change in config.compare.changes.get("reinforce", ())])
    updates = config.collect.prompts * config.collect.samples / config.policy.batch_size
    assert config.policy.optimizer.warmup_steps < updates / 2


@pytest.mark.parametrize("recipe", [str(name) for name in RECIPES if name.name not in ("meshes", "paper")])
def test_recipes_have_known_settings_alone(recipe):
    configs.check_known(configs.load(recipe, []), recipe)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("c.fit.learning_rate = 1e-4", "fit.learning_rate, which is not known; did you mean 'fit.optimizer.learning_rate'"),
        ("c.fit.epoch = 3", "fit.epoch, which is not known; did you mean 'fit.epochs'"),
        ("c.vlaue = dict(type='v')", "vlaue.type, which is not known; did you mean 'value.type'"),
    ],
)
def test_a_misspelt_setting_of_a_recipe_is_named(tmp_path, capsys, line, words):
    recipe = tmp_path / "mine.py"
    shutil.copy(CONFIGS / "meshes.py", tmp_path)
    lines = ["from qsharp_jax.configs import arithmetic", "def get_config():", " c = arithmetic.get_config()", f" {line}", " return c"]
    recipe.write_text("\n".join(lines))
    assert cli.main(["run", "--config", str(recipe), "--workdir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"{recipe} has the setting {words}" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_json_round_trip(path):
    config = configs.load(path, ["--config.generate.eta=inf"])
    text = json.dumps(configs.to_json(config))
    again = configs.from_json(json.loads(text))
    assert json.dumps(configs.to_json(again)) == text
    assert again.is_locked and again.evaluate.etas == [0.5, 0.1] and again.generate.eta == math.inf
    assert configs.differences(config, again) == []


def test_a_config_read_back_takes_overrides(path):
    config = configs.from_json(configs.to_json(configs.load(path, [])))
    configs.override(config, ["--config.evaluate.etas=0.2", "--config.limit=3"])
    assert config.evaluate.etas == [0.2] and config.limit == 3


def test_differences_name_both_values_and_may_leave_out_a_section():
    a = ConfigDict(
        {"seed": 0, "fit": {"epochs": 4, "clip": 1.0, "old": None}, "etas": (1, 2), "mesh": {"name": "v5e_8"}}
    )
    b = ConfigDict({"seed": 0, "fit": {"epochs": 5, "clip": 1, "new": "x"}, "etas": [1, 3]})
    expected = ["etas: [1, 2] -> [1, 3]", "fit.epochs: 4 -> 5", "fit.new: absent -> 'x'", "fit.old: None -> absent"]
    for mesh in (None, {"name": "single"}):
        b = ConfigDict(b.to_dict() | ({"mesh": mesh} if mesh else {}))
        assert sorted(configs.differences(a, b, but=("mesh",))) == expected
    assert "mesh.name: 'v5e_8' -> 'single'" in configs.differences(a, b)


def test_an_override_of_a_shared_value_reaches_every_place():
    config = ConfigDict({"batch": 8})
    config.fit = ConfigDict({"batch": config.get_ref("batch")})
    config.lock()
    configs.override(config, ["--config.batch=16"])
    assert config.fit.batch == 16


def test_nearest():
    assert nearest("ete", ["eta", "seed"]) == "did you mean 'eta'?"
    assert nearest("eta", ["fit.eta", "collect.eta"]) == "did you mean 'collect.eta' or 'fit.eta'?"
    assert nearest("zzz", ["seed", "eta"]) == "known: eta, seed"


MESHES = 'PRESETS = {"single": dict(name="single", fit=dict(fsdp=1)), "v5p_8": dict(name="v5p_8", fit=dict(fsdp=4))}\n'


@pytest.fixture
def with_mesh(path):
    path.write_text(FILE.replace("shape=None", 'mesh="single"'))
    path.with_name("meshes.py").write_text(MESHES)
    return path


V5P = {"name": "v5p_8", "fit": {"fsdp": 4}}


@pytest.mark.parametrize(
    ("arguments", "mesh"),
    [
        ([], {"name": "single", "fit": {"fsdp": 1}}),
        (["--config.mesh=v5p_8"], V5P),
        (["--config.mesh", "v5p_8"], V5P),
        (["--config.mesh=x", "--config.mesh=v5p_8"], V5P),
        (
            ["--config.seed=1", "--config.mesh.fit.fsdp=2", "--config.mesh=v5p_8", "--config.seed=3"],
            V5P | {"fit": {"fsdp": 2}},
        ),
    ],
)
def test_a_mesh_s_name_becomes_its_section_before_its_sizes_are_changed(with_mesh, arguments, mesh):
    """The presets beside the config file are used; the last override of a key wins."""
    config = configs.load(with_mesh, arguments)
    assert config.mesh.to_dict() == mesh and config.is_locked
    assert config.seed == 3 * ("--config.seed=3" in arguments)
    with_mesh.with_name("meshes.py").unlink()  # then those of the package
    assert configs.load(with_mesh, ["--config.mesh=v5p_16"]).mesh.topology == "v5p:2x2x2"


@pytest.mark.parametrize(
    ("meshes", "arguments", "words"),
    [
        (MESHES, ["--config.mesh=v5p8"], "there is no mesh 'v5p8' in .*meshes.py; did you mean 'v5p_8'"),
        (MESHES, ["--config.mesh="], "there is no mesh ''"),
        (MESHES, ["--config.mesh"], "--config.mesh has no value"),
        ("x = 1\n", [], "meshes.py: KeyError"),
        ("PRESETS = {\n", [], "meshes.py: SyntaxError"),
    ],
)
def test_a_mesh_that_is_not_known_is_named(with_mesh, meshes, arguments, words):
    with_mesh.with_name("meshes.py").write_text(meshes)
    with pytest.raises(UserError, match=words):
        configs.load(with_mesh, arguments)


def test_a_stored_config_takes_another_mesh(with_mesh):
    """A workdir that a slice made may resume on one device; without a file, names are the package's."""
    config = configs.load(with_mesh, ["--config.mesh=v5p_8"])
    configs.override_stored(config, ["--config.mesh.fit.fsdp=2"])
    assert config.mesh.fit.fsdp == 2
    with pytest.raises(UserError, match="there is no mesh 'v5p_7'"):
        configs.override_stored(config, ["--config.mesh=v5p_7"])
    configs.override_stored(config, ["--config.mesh=v5p_16", "--config.mesh.fit.tensor=4"])
    assert config.mesh.name == "v5p_16" and config.mesh.fit.tensor == 4 and config.is_locked
