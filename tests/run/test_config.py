"""The config file, the overrides, the ranges and the JSON round trip, each as a user meets them."""

import json
import math

import pytest
from ml_collections import ConfigDict
from repository import CONFIGS

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
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, source, words):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(UserError) as caught:
        configs.load(path, [])
    assert str(caught.value).startswith(str(path)) and words in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "broken.py"
    for content in (b"\xff\xfe\x00", b"x = '\x00'\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="broken.py"):
            configs.load(path, [])


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    for path in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(UserError, match=f"no config file {path}"):
            configs.load(path, [])


def test_a_value_that_json_cannot_keep_is_named(tmp_path):
    path = tmp_path / "object.py"
    path.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'a': {'b': {1}}})\n"
    )
    with pytest.raises(UserError, match="config.a.b is of type set"):
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


def test_the_last_override_wins(path):
    assert configs.load(path, ["--config.seed=1", "--config.seed", "2"]).seed == 2


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.seed=1.5", "a whole number"),
        ("--config.seed=none", "a whole number"),
        ("--config.generate.eta=small", "a number"),
        ("--config.generate.eta=nan", "a number"),
        ("--config.generate.eta=", "a number"),
        ("--config.generate.greedy=2", "true or false"),
        ("--config.evaluate.etas=0.5,,1", "a list of float"),
        ("--config.evaluate.etas=0.5;1", "a list of float"),
        ("--config.evaluate.sizes=1,2.5", "a list of int"),
        ("--config.limit=x", "a whole number"),
    ],
)
def test_a_wrong_type_is_named_with_key_value_and_type(path, argument, expected):
    with pytest.raises(UserError) as caught:
        configs.load(path, [argument])
    assert str(caught.value).startswith(f"{argument} is not {expected}")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.generate.etta=1", "did you mean 'generate.eta'"),
        ("--config.eta=1", "did you mean 'generate.eta'"),
        ("--config.Seed=1", "did you mean 'seed'"),
        ("--config.zzz=1", "known: evaluate.etas, "),
        ("--config.seed.deep=1", "no setting --config.seed.deep"),
        ("--config.generate=1", "a section, with generate.eta, generate.greedy, generate.top_k"),
        ("--config.=1", "no setting --config.;"),
        ("--config.seed", "no value"),
        ("--seed=1", "unknown argument '--seed=1'"),
        ("seed=1", "unknown argument 'seed=1'"),
    ],
)
def test_an_unknown_key_or_argument_is_named(path, argument, words):
    with pytest.raises(UserError) as caught:
        configs.load(path, [argument])
    assert words in str(caught.value)


OPTIMIZER = {
    "name": (["adamw", "adafactor", "muon"], ["sgd", None]),
    "learning_rate": ([1e-5, 1], [0, -1.0, math.inf, math.nan, "1"]),
    "adam_learning_rate": ([1e-5], [0]),
    "b2": ([0, 0.98], [1, -0.1]),
    "weight_decay": ([0, 0.1], [-0.1, math.inf]),
    "clip": ([0.5, math.inf], [0, -1]),
    "warmup_steps": ([0, 10], [-1, 0.5]),
    "schedule": (["constant", "cosine"], ["linear"]),
    "end_fraction": ([0, 0.05, 1], [-0.1, 1.1]),
}
RANGES = {  # key: (allowed, forbidden)
    "seed": ([0, 5], [-1, 0.5, True, None]),
    "algorithm": (["qsharp", "vas", "rpo"], ["sft", None]),
    "rounds": ([1], [0]),
    "ref": (["pretrain", "some/folder"], ["", 1, None]),
    "guide": (["ref", "scratch", "some/folder"], ["", None]),
    "dtype": ([None, "float32", "bfloat16"], ["float16", 32]),
    "prompt_format": (["plain", "chat"], ["poem"]),
    "generate.temperature": ([0, 0.8], [-0.1, math.inf]),
    "generate.top_p": ([0.1, 1], [0, 1.1]),
    "generate.top_k": ([0, 20], [-1]),
    "generate.top_k_candidates": ([1], [0]),
    "generate.others": (["mass", "prefix", "zero"], ["none", 0]),
    "generate.max_new_tokens": ([1], [0]),
    "generate.prompt_bucket": ([1], [0]),
    "collect.prompts": ([1], [0]),
    "collect.samples": ([1], [0]),
    "collect.batch_size": ([1], [0]),
    "collect.eta": ([1e-6, 1, math.inf], [0, 1e-7, -0.1, math.nan, "0.1", True]),
    "collect.shard_rows": ([1], [0]),
    "collect.drop_no_variation": ([True, False], [1, "no"]),
    "pretrain.steps": ([0], [-1]),
    "pretrain.batch_size": ([1], [0]),
    "pretrain.stop_loss": ([0, 0.2], [-1]),
    "pretrain.length_bucket": ([1], [0]),
    "pretrain.log_every": ([1], [0]),
    "pretrain.save_every": ([1], [0]),
    "fit.epochs": ([1], [0]),
    "fit.batch_size": ([1], [0]),
    "fit.accumulate": ([1, 4], [0, 1.5]),
    "fit.remat": (["none", "dots", "full"], ["some", None, True]),
    "fit.dtype": ([None, "float32", "bfloat16"], ["float16", 16]),
    "fit.attention": (["xla", "blocks", "cudnn", "splash"], ["flash", None]),
    "fit.lora_rank": ([0, 8], [-1, 2.5, None]),
    "fit.lora_alpha": ([0.5, 16], [0, -1, math.inf, None]),
    "fit.length_bucket": ([1], [0]),
    "fit.pack_length": ([0, 1024], [-1, None]),
    "fit.log_every": ([1], [0]),
    "fit.save_every": ([1], [0]),
    "fit.holdout": ([0, 0.5], [-0.1, 1]),
    "fit.evaluate_every": ([0, 100], [-1, 0.5]),
    "fit.patience": ([0, 3], [-1, True]),
    "fit.projection": (["two_hot", "nearest"], ["mean"]),
    "fit.clip_rewards": ([True, False], [1, "no"]),
    "fit.warm_start": ([True, False], [0, "yes"]),
    "fit.future_offsets": ([0, 4], [-1]),
    "fit.future_weight": ([0, 0.5], [-1]),
    "cd.variant": (["regression", "fudge", "q"], ["v", None]),
    "vas.td_lambda": ([0, 0.95, 1], [-0.1, 1.1, None]),
    "policy.prompts": ([1], [0]),
    "policy.batch_size": ([1], [0]),
    "policy.log_prob_limit": ([1e-4, math.inf], [0, None]),
    "policy.detach_values": ([True, False], [1, None]),
    "reinforce.baseline": (["leave_one_out", "mean"], ["none", None]),
    "reinforce.greedy": ([True, False], [1]),
    "ppo.epochs": ([1], [0]),
    "ppo.clip": ([0.2], [0, 1, -0.1]),
    "ppo.gae_lambda": ([0, 1], [-0.1, 1.1]),
    "ppo.value_weight": ([0, 0.5], [-1, math.inf]),
    **{f"{name}.beta": ([None, 0.1], [0, -0.1, math.inf]) for name in ("dpo", "rpo")},
    "dpo.epochs": ([1], [0]),
    "rpo.alpha": ([0, 1], [-1]),
    "rpo.epochs": ([1], [0]),
    "klq.tau": ([None, 0.05], [0, -0.1, math.inf]),
    "klq.epochs": ([1], [0]),
    "klq.return_lambda": ([0, 0.95, 1], [-0.1, 1.1]),
    "klq.alpha": ([0.5, 1], [0, 1.1]),
    "compare.methods": ([("qsharp", "ppo")], [(), ("ppo", "ppo"), ("sft",), "ppo"]),
    "compare.seeds": ([(0, 1)], [(), (0, 0), (-1,), (0.5,), 0]),
    "evaluate.problems": ([1], [0]),
    "evaluate.samples": ([1], [0]),
    "evaluate.guided_samples": ([1, 8], [0, 1.5]),
    "evaluate.pass_at": ([(), (1, 8), (1.0, 4.0)], [(0,), (1.5,), (2, 2), 4, ("a",)]),
    "evaluate.etas": ([(0.1, 1), [0.5]], [(0.1, 0), [-1], 0.5, ("a",), (), (0.1, math.inf)]),
    "evaluate.batch_size": ([1], [0]),
    "value.type": (["v", "q"], ["V", ""]),
    "value.distribution": (["bernoulli", "categorical", "scalar"], ["normal"]),
    "value.atoms": ([(), (0, 1), [-1.5, 0, 2]], [(1, 0), (0, 0), (0, math.inf), 1, ("a", "b")]),
    **{
        f"{section}.optimizer.{name}": values
        for section in ("pretrain", "fit", "policy")
        for name, values in OPTIMIZER.items()
    },
    "mesh.name": (["single"], ["", None]),
    "mesh.platform": (["any", "cpu", "gpu", "tpu"], ["cuda", None]),
    "mesh.kind": (["TPU v5e"], [""]),
    "mesh.topology": (["", "v5e:2x4"], [None, 8]),
    **{f"mesh.{name}": ([1, 64], [0, 1.5]) for name in ("slices", "hosts", "devices_per_host")},
    **{f"mesh.fit.{axis}": ([1, 64], [0, True]) for axis in ("data", "fsdp", "tensor")},
    **{f"mesh.decode.{axis}": ([1, 64], [0, 0.5]) for axis in ("data", "attention_data", "tensor")},
    "mesh.hbm_bytes": ([0, 16 * 2**30], [-1, 0.5]),
    "mesh.vmem_bytes": ([0, 128 * 2**20], [-1, 0.5]),
    **{
        f"mesh.{name}": ([0, 1e12], [-1, math.inf])
        for name in ("flops", "hbm_bandwidth", "ici_bandwidth", "dcn_bandwidth")
    },
}


def test_every_rule_is_tried():
    assert set(RANGES) == set(schema.RULES)


@pytest.mark.parametrize("key", RANGES)
def test_check_names_the_key_and_the_value_out_of_range(key):
    def with_value(value):
        nested = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        return ConfigDict(nested)

    allowed, forbidden = RANGES[key]
    for value in allowed:
        configs.check(with_value(value))
    for value in forbidden:
        shown = list(value) if isinstance(value, tuple) else value
        with pytest.raises(UserError) as caught:
            configs.check(with_value(value))
        assert str(caught.value).startswith(f"config.{key} is {shown!r}; it must be ")


def test_the_defaults_are_in_their_ranges():
    config = schema.default_config()
    configs.check(config)
    assert config.fit.dtype is None and config.get_type("seed") is int and config.fit.get_type("dtype") is str


RECIPES = sorted(path.relative_to(configs.RECIPES).with_suffix("") for path in configs.RECIPES.rglob("[!_]*.py"))


@pytest.mark.parametrize("name", [str(name) for name in RECIPES if name.name not in ("meshes", "paper")])
def test_a_recipe_is_found_by_its_name_and_by_its_path(name):
    config = configs.load(name, ["--config.mesh=cuda_8"])
    checks.check_settings(config) if "compare" not in config else configs.check(config)
    assert config == configs.load(CONFIGS / f"{name}.py", ["--config.mesh=cuda_8"])


def test_a_name_that_no_recipe_has_is_refused():
    with pytest.raises(UserError, match="no config file arithmetik.*did you mean 'arithmetic'"):
        configs.load("arithmetik", [])


def test_check_passes_over_what_is_absent_or_unknown():
    configs.check(ConfigDict({"model": {"layers": -1}, "generate": {}}))


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


def test_differences_name_both_values():
    a = ConfigDict({"seed": 0, "fit": {"epochs": 4, "clip": 1.0, "old": None}, "etas": (1, 2)})
    b = ConfigDict({"seed": 0, "fit": {"epochs": 5, "clip": 1, "new": "x"}, "etas": [1, 3]})
    assert sorted(configs.differences(a, b)) == [
        "etas: [1, 2] -> [1, 3]",
        "fit.epochs: 4 -> 5",
        "fit.new: absent -> 'x'",
        "fit.old: None -> absent",
    ]


def test_an_override_of_a_shared_value_reaches_every_place():
    config = ConfigDict({"batch": 8})
    config.fit = ConfigDict({"batch": config.get_ref("batch")})
    config.lock()
    configs.override(config, ["--config.batch=16"])
    assert config.fit.batch == 16


def test_a_required_placeholder_is_named_with_the_file(tmp_path):
    path = tmp_path / "required.py"
    path.write_text(
        "from ml_collections import config_dict\n"
        "def get_config():\n    return config_dict.create(a=config_dict.required_placeholder(int))\n"
    )
    with pytest.raises(UserError, match="required.py: RequiredValueError"):
        configs.load(path, [])


def test_nearest():
    assert nearest("ete", ["eta", "seed"]) == "did you mean 'eta'?"
    assert nearest("eta", ["fit.eta", "collect.eta"]) == "did you mean 'collect.eta' or 'fit.eta'?"
    assert nearest("zzz", ["seed", "eta"]) == "known: eta, seed"


# --- The mesh -------------------------------------------------------------------------------------------------------


MESHES = 'PRESETS = {"single": dict(name="single", fit=dict(fsdp=1)), "v5p_8": dict(name="v5p_8", fit=dict(fsdp=4))}\n'


@pytest.fixture
def with_mesh(path):
    path.write_text(FILE.replace("shape=None", 'mesh="single"'))
    path.with_name("meshes.py").write_text(MESHES)
    return path


def test_a_mesh_s_name_becomes_its_section(with_mesh):
    assert configs.load(with_mesh, []).mesh.to_dict() == {"name": "single", "fit": {"fsdp": 1}}
    for arguments in (["--config.mesh=v5p_8"], ["--config.mesh", "v5p_8"], ["--config.mesh=x", "--config.mesh=v5p_8"]):
        config = configs.load(with_mesh, arguments)
        assert config.mesh.to_dict() == {"name": "v5p_8", "fit": {"fsdp": 4}} and config.is_locked


def test_a_mesh_s_name_comes_before_its_sizes(with_mesh):
    config = configs.load(with_mesh, ["--config.mesh.fit.fsdp=2", "--config.mesh=v5p_8", "--config.seed=3"])
    assert config.mesh.name == "v5p_8" and config.mesh.fit.fsdp == 2 and config.seed == 3


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


def test_a_config_without_a_mesh_needs_no_presets_and_takes_none(path):
    assert "mesh" not in configs.load(path, [])
    with pytest.raises(UserError, match="no setting --config.mesh"):
        configs.load(path, ["--config.mesh=v5p_8"])


def test_a_stored_config_takes_another_mesh(with_mesh):
    """A workdir that a slice made may resume on one device; without a file, names are the package's."""
    config = configs.load(with_mesh, ["--config.mesh=v5p_8"])
    configs.override_mesh(config, ["--config.mesh.fit.fsdp=2"])
    assert config.mesh.fit.fsdp == 2
    with pytest.raises(UserError, match="there is no mesh 'v5p_7'"):
        configs.override_mesh(config, ["--config.mesh=v5p_7"])
    configs.override_mesh(config, ["--config.mesh=v5p_16", "--config.mesh.fit.tensor=4"])
    assert config.mesh.name == "v5p_16" and config.mesh.fit.tensor == 4 and config.is_locked


def test_a_mesh_is_looked_up_in_the_package_where_the_config_file_has_none_beside_it(with_mesh):
    with_mesh.with_name("meshes.py").unlink()
    assert configs.load(with_mesh, ["--config.mesh=v5p_16"]).mesh.topology == "v5p:2x2x2"


def test_differences_may_leave_out_a_section():
    a, b = (ConfigDict({"seed": seed, "mesh": {"name": name}}) for seed, name in ((0, "v5e_8"), (1, "single")))
    assert configs.differences(a, b, but="mesh") == ["seed: 0 -> 1"]
    with b.unlocked():
        del b.mesh
    assert configs.differences(a, b, but="mesh") == ["seed: 0 -> 1"]
