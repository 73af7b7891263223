"""Runs whose reference and guide come out of folders: what they start from, what they leave alone, what is refused."""

import dataclasses
import datetime
import json
import os
import shutil
from pathlib import Path

import bpe
import helpers
import hf_folders
import jax
import numpy as np
import pytest
import safetensors.numpy
from commands import CONFIG, PROMPT, SMALL, refused, results, stdout_lines

from qsharp_jax import cli, train
from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.models import hf, meshes, quantized, sharding, value
from qsharp_jax.run import checks, models
from qsharp_jax.run import config as configs
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError

FEW = [*SMALL, "--config.rounds=1", "--config.generate.max_new_tokens=7", "--config.fit.future_offsets=0"]
ATOMS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The folders "ref", "guide" and "categorical", of one tokenizer, which the tests leave as they are."""
    root = tmp_path_factory.mktemp("folders")
    made = helpers.session(root / "run")
    made.workdir.close()
    ref, tokenizer = helpers.reference(), models.tokenizer(made).for_export()
    hf.export_ref(ref, root / "ref", tokenizer=tokenizer, stop_ids=models.tokenizer(made).stop_ids)
    hf.export_guide(helpers.random_guide(ref.config, seed=3), root / "guide", tokenizer=tokenizer)
    categorical = helpers.random_guide(ref.config, seed=4, distribution="categorical", atoms=ATOMS)
    hf.export_guide(categorical, root / "categorical", tokenizer=tokenizer)
    return root


@pytest.fixture(scope="module")
def finished(folders) -> Path:
    """A whole run of one round, of folders that were given by relative paths."""
    workdir, before = folders / "workdir", Path.cwd()
    os.chdir(folders)
    try:
        assert run(workdir, "ref=./ref", "guide=guide") == 0
    finally:
        os.chdir(before)
    return workdir


def run(workdir, *changes: str) -> int:
    return cli.main(command(workdir, *changes))


def command(workdir, *changes: str) -> list[str]:
    given = [f"--config.{change}" for change in changes]
    return ["run", "--config", CONFIG, "--workdir", str(workdir), *FEW, *given]


def session(*changes: str) -> Session:
    return Session(Workdir(Path(), configs.load(CONFIG, [*FEW, *(f"--config.{change}" for change in changes)])))


@pytest.mark.slow
def test_a_run_from_folders_ends_with_results_and_keeps_their_paths(finished, folders, capfd):
    assert {("pi_ref", 0), ("qsharp", 1), ("cd", 1)} <= {(row["method"], row["round"]) for row in results(finished)}
    config = json.loads((finished / "config.json").read_text())
    assert (config["ref"], config["guide"]) == (str(folders / "ref"), str(folders / "guide"))
    assert not (finished / "ref").exists(), "no copy of the reference"
    (line,) = stdout_lines(capfd, "generate", "--workdir", finished, PROMPT, "--eta", "0.1")
    assert None not in line["ref_log_probs"]
    out = finished / "exported"
    assert cli.main(["export", "--workdir", str(finished), "--what", "guide", "--out", str(out)]) == 0
    assert Tokenizer.load(out).entries == Tokenizer.load(folders / "ref").entries
    sentence = refused(capfd, "export", "--workdir", finished, "--what", "ref", "--out", finished / "other")
    assert f"this run's reference is the model in {folders / 'ref'}" in sentence


def test_fit_starts_from_exactly_the_weights_of_the_guide_s_folder(finished, folders, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(workdir / "guide")
    monkeypatch.setattr(train, "fit", lambda state, *_, **__: (_ for _ in ()).throw(StopAsyncIteration(state)))
    with pytest.raises(StopAsyncIteration) as stopped:
        cli.main(["fit", "--workdir", str(workdir)])
    (state,) = stopped.value.args
    want = hf.load_guide(folders / "guide", dtype="float32", unstacked=False).params
    assert int(state.step) == 0
    helpers.assert_trees_equal(state.params, want)


@pytest.mark.parametrize("guide", ["ref", "folder"])
def test_a_language_model_s_trunk_gets_a_head_of_zeros_and_float32_masters(folders, tmp_path, guide):
    half = helpers.reference()
    half = half.replace(params=jax.tree.map(lambda leaf: leaf.astype("bfloat16"), half.params))
    tokenizer = Tokenizer.load(folders / "ref").hf_tokenizer
    hf.export_ref(half, tmp_path / "half", tokenizer=tokenizer)
    changes = {"ref": (f"ref={tmp_path / 'half'}",), "folder": (f"ref={folders / 'ref'}", f"guide={tmp_path / 'half'}")}
    made = session(*changes[guide])
    params = models.first_guide(made, None)
    trunk = {name: leaf for name, leaf in half.params.items() if name != "head"}
    helpers.assert_trees_equal(params["trunk"], jax.tree.map(lambda leaf: leaf.astype("float32"), trunk))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(params["head"]))
    assert models.guide_config(made).trunk.dtype == "bfloat16", "computed as the folder has it"
    assert jax.tree.structure(params) == jax.tree.structure(value.abstract(models.guide_config(made)))
    assert models.guide_config(session(*changes[guide], "dtype=float32")).trunk.dtype == "float32"


@pytest.mark.parametrize("guide", ["ref", "guide"])
def test_folders_are_read_onto_meshes(folders, tmp_path, guide):
    """Every leaf where the rules have it (the meshes have one device), with the values that it has without."""
    quantize = {"ref": "none", "guide": "int8"}[guide]
    changes = f"ref={folders / 'ref'}", f"guide={folders / guide}", f"quantize={quantize}"
    workdir = helpers.session(tmp_path, *changes).workdir
    made = Session(workdir)
    decode = meshes.make_mesh({"tensor": 1}, sharding.DECODE, jax.devices()[:1])
    fit = meshes.make_mesh({"fsdp": 1}, sharding.FIT, jax.devices()[:1])
    meshed = Session(workdir)
    vars(meshed).update(decode_mesh=decode, fit_mesh=fit)  # a preset of one device has none
    ref = models.load_ref(meshed)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(ref)} == {decode}
    helpers.assert_trees_equal(ref.params, models.load_ref(made).params)
    first = [models.first_guide(session, None) for session in (meshed, made)]
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(first[0]["trunk"])} == {fit}
    helpers.assert_trees_equal(*first)


@pytest.mark.slow
def test_a_run_of_quantized_models(tmp_path, folders):
    """A whole run whose reference is pre-trained: guides are fitted in float32 and start from its own weights."""
    assert run(tmp_path / "run", "quantize=int4", "ref=pretrain", "guide=ref") == 0
    with Workdir.open(tmp_path / "run") as workdir:
        made = Session(workdir)
        ref, guide = models.load_ref(made), models.load_guide(made)
        trained = models.pretrained(made).params
        first = models.first_guide(made, ref)
    assert quantized.is_quantized(ref.params["layers"]["up"]["kernel"])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(guide.params)} == {"float32"}
    helpers.assert_trees_equal(first["trunk"]["layers"], trained["layers"])


def test_a_guide_from_scratch_has_the_shape_of_the_model_section(folders):
    made = session(f"ref={folders / 'ref'}", "guide=scratch", "model.layers=2", "model.token_shift=false")
    assert (models.ref_config(made).layers, models.guide_config(made).trunk.layers) == (1, 2)
    assert jax.tree.leaves(models.first_guide(made, None)["trunk"]["layers"])[0].shape[0] == 2


def test_a_guide_of_the_first_layers_is_that_of_a_folder_cut_by_hand(folders, tmp_path):
    shape = dataclasses.replace(hf_folders.LLAMA, vocab_size=300, layers=3)
    hf.export_ref(hf_folders.ref(shape), tmp_path / "whole", tokenizer=bpe.make())
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    tensors = safetensors.numpy.load_file(cut / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.2.")}
    assert len(kept) < len(tensors)
    safetensors.numpy.save_file(kept, cut / "model.safetensors")
    made = session(f"ref={tmp_path / 'whole'}", "value.layers=2")
    assert (models.ref_config(made).layers, models.guide_config(made).trunk.layers) == (3, 2)
    of_folder = session(f"ref={tmp_path / 'whole'}", f"guide={cut}")
    assert models.guide_config(made) == models.guide_config(of_folder)
    helpers.assert_trees_equal(models.first_guide(made, None), models.first_guide(of_folder, None))
    for changes, words in (
        (["value.layers=4"], "config.value.layers is 4, but the guide starts from one of 3 layers; give 0"),
        (
            [f"guide={folders / 'guide'}", "value.layers=1"],
            "config.value.layers is 1, but the guide starts from a guide",
        ),
    ):
        with pytest.raises(UserError, match=words):
            models.guide_config(session(f"ref={tmp_path / 'whole'}", *changes))


def test_prompts_are_encoded_by_the_folder_s_tokenizer_in_the_config_s_format(tmp_path):
    hf.export_ref(helpers.random_model(320, max_positions=64), tmp_path, tokenizer=bpe.make(), stop_ids=[bpe.EOT])
    for prompt_format in ("plain", "chat"):
        made = session(f"ref={tmp_path}", f"prompt_format={prompt_format}")
        checks.check(made.config)
        assert models.tokenizer(made).encode_prompt(PROMPT) == Tokenizer.load(
            tmp_path, prompt_format=prompt_format
        ).encode_prompt(PROMPT)
        sampling = models.sampling(made)
        assert sampling.vocab_size == Tokenizer(bpe.make()).vocab_size < models.ref_config(made).vocab_size
        assert bpe.EOT in sampling.stop_ids


def test_a_run_draws_no_special_tokens_past_the_embedding(tmp_path):
    tokenizer = bpe.make()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|image|>"]})
    hf.export_ref(helpers.random_model(rows, max_positions=64), tmp_path, tokenizer=tokenizer)
    begun = session(f"ref={tmp_path}", f"generate.top_k_candidates={rows + 5}")
    checks.check(begun.config)
    sampling = models.sampling(begun)
    assert (sampling.vocab_size, sampling.top_k_candidates) == (rows, rows)
    tokenizer.add_tokens([f"dragon{n}" for n in range(9)])  # the tokenizer of another model
    tokenizer.save_pretrained(tmp_path)
    message = helpers.refusal(checks.check, session(f"ref={tmp_path}").config)
    assert f"the reference has {rows} tokens in its embedding, but the tokenizer in {tmp_path} has ids up to" in message


def test_an_adapter_with_a_tokenizer_of_its_own_stops_as_its_base_does(tmp_path):
    """PEFT and TRL save the tokenizer, and no generation_config.json."""
    base, adapter = tmp_path / "base", bpe.save(tmp_path / "adapter")
    hf.export_ref(helpers.random_model(320, max_positions=64), base, tokenizer=bpe.make(), stop_ids=[7, 9])
    entries = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(entries))
    assert {7, 9} <= set(models.tokenizer(session(f"ref={adapter}")).stop_ids)


def test_a_run_goes_on_with_the_date_that_its_prompts_have(tmp_path):
    template = "{{ strftime_now('%d %b %Y') }} " + bpe.TEMPLATE
    hf.export_ref(helpers.random_model(320, max_positions=96), tmp_path / "ref", tokenizer=bpe.make(template=template))
    config = session(f"ref={tmp_path / 'ref'}", "prompt_format=chat").config
    for day in (5, 6):
        with Workdir.open(tmp_path / "run", config, date=datetime.date(2026, 1, day)) as workdir:
            text = models.tokenizer(Session(workdir))
            assert text.decode(text.encode_prompt(PROMPT)).startswith("05 Jan 2026 user")


def test_with_both_folders_the_sections_of_what_is_made_on_the_spot_may_be_absent(folders):
    config = session(f"ref={folders / 'ref'}", f"guide={folders / 'guide'}").config
    with config.unlocked():
        del config["model"], config["pretrain"]
    checks.check(config)
    config.guide = "scratch"
    with pytest.raises(UserError, match="lacks the setting model.size"):
        checks.check(config)
    config.ref, config.guide = "pretrain", "ref"
    with pytest.raises(UserError, match="lacks the setting pretrain.steps"):
        checks.check(config)


def test_folders_that_cannot_be_are_refused_before_anything_is_made(folders, tmp_path, capsys):
    ref, guide = f"ref={folders / 'ref'}", f"guide={folders / 'guide'}"
    light = shutil.copytree(folders / "guide", tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    other = tmp_path / "other"
    hf.export_guide(helpers.random_guide(helpers.random_model(320).config), other, tokenizer=bpe.make())
    (adapter := tmp_path / "adapter").mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "IA3", "base_model_name_or_path": "base"}')
    small = tmp_path / "small"
    hf.export_guide(helpers.random_guide(helpers.random_model(5).config), small)
    for changes, words in [
        (("ref=pretrian",), "config.ref is 'pretrian', which is not a folder; give pretrain, or a model's folder"),
        ((ref, "guide=none"), "config.guide is 'none', which is not a folder; give ref, scratch, or a model's folder"),
        ((f"ref={tmp_path}",), "has no tokenizer"),
        ((f"ref={adapter}",), "holds an adapter of the type IA3, and only LORA is applied"),
        ((ref, f"guide={adapter}"), "holds an adapter of the type IA3, and only LORA is applied"),
        ((f"ref={folders / 'guide'}",), "holds a guide or another token classifier"),
        ((ref, f"guide={light}"), "has no weights; it needs model.safetensors"),
        ((ref, f"guide={other}"), "the guide's vocabulary is not the reference's"),
        ((f"guide={other}",), "the guide's vocabulary is not the reference's"),
        ((ref, f"guide={small}"), "the guide has 5 tokens in its embedding"),
        ((ref, guide, "value.type=q"), "config.value.type is 'q', but the guide in"),
        ((ref, guide, "value.distribution=scalar"), "config.value.distribution is 'scalar', but the guide in"),
        (
            (ref, f"guide={folders / 'categorical'}", "value.distribution=categorical", "value.atoms=0,1"),
            "config.value.atoms is (0.0, 1.0), but the guide in",
        ),
        ((ref, guide, "prompt_format=chat"), "has no chat template"),
        (("prompt_format=chat",), "has no chat template"),
        ((ref, guide, "dtype=float16"), "config.dtype is 'float16'"),
        ((ref, guide, "generate.max_new_tokens=23"), "must be below the model's 23 positions"),
    ]:
        assert words in refused(capsys, *command(tmp_path / "new", *changes)), changes
        assert not (tmp_path / "new").exists()
    checks.check(
        session(ref, f"guide={folders / 'categorical'}", "value.distribution=categorical", "value.atoms=0,0.5,1").config
    )


def test_a_folder_that_changed_is_refused_by_every_command(finished, folders, capfd):
    other = folders / "ref" / "added_tokens.json"
    other.write_text("{}")
    try:
        for arguments in (["report"], ["generate", PROMPT]):
            assert "added_tokens.json changed since" in refused(capfd, *arguments, "--workdir", finished)
    finally:
        other.unlink()
    assert cli.main(["report", "--workdir", str(finished)]) == 0
