"""Settings that do not go together are refused before anything is computed."""

from pathlib import Path

import helpers
import jax.numpy as jnp
import pytest
import small_data

from qsharp_jax.run import checks, models, problems, sources
from qsharp_jax.run import config as configs
from qsharp_jax.system import loggers
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.tensorboard import EventFiles
from qsharp_jax.train.checkpoint import Checkpoints, DamagedError
from qsharp_jax.train.step import TrainState


# Prompts have 16 tokens and responses up to 7 in models of 23 positions.
@pytest.mark.parametrize(
    ("bad", "words", "good"),
    [
        (["fit.batch_size=8", "fit.accumulate=3"], "fit.accumulate is 3.*fit.batch_size, which is 8", ["fit.accumulate=4"]),
        (["fit.pack_length=22"], "fit.pack_length is 22; it must be at least 23", ["fit.pack_length=23"]),
        (["fit.pack_length=22"], "fit.pack_length is 22; it must be at least 23", ["fit.pack_length=0"]),
        (["generate.max_new_tokens=8"], "16 tokens, which with config.generate.max_new_tokens = 8 are more than the", ["generate.max_new_tokens=7"]),
        (["fit.patience=3"], "fit.patience is 3 and config.fit.evaluate_every 0", ["fit.evaluate_every=5"]),
        (["fit.evaluate_every=5", "fit.holdout=0"], "fit.evaluate_every is 5 and config.fit.holdout 0", ["fit.holdout=0.1"]),
        (["evaluate.pass_at=1,4", "evaluate.samples=3"], "pass_at has 4 and config.evaluate.samples is 3; pass@k needs at least k", ["evaluate.samples=4"]),
        (["generate.candidate_slots=4.5", "generate.top_k_candidates=4"], "candidate_slots is 4.5; it must be at most config.generate.top_k_candidates, which is 4", ["generate.candidate_slots=4"]),
        (["value.distribution=auto", "value.atoms=0,1"], "atoms are given, and .* is auto", ["value.distribution=categorical"]),
        (["fit.evaluate_every=5", "fit.holdout=1e-9"], "holds out none of the 24 training prompts", ["algorithm=reinforce"]),
        (["generate.candidate_slots=4", "value.type=q"], "candidate_slots is for guides of type v", ["value.type=v"]),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(tmp_path, bad, words, good):
    config = helpers.session(tmp_path, *bad).config
    with pytest.raises(UserError, match=words):
        checks.check_settings(config)
        checks.check_problems(config)
    configs.override(config, [f"--config.{change}" for change in good])
    checks.check_settings(config)
    checks.check_problems(config)


@pytest.mark.parametrize(
    ("changes", "model", "words"),
    [
        (["quantize=int8", "algorithm=ppo"], {}, "quantize is int8, but ppo trains a copy of the reference's weights"),
        (["quantize=int4"], {"mlp": 72}, "72 inputs of down, which groups of 32 do not divide"),
        ([], {"quantize": "int8"}, "model.quantize is config.quantize; remove it"),
    ],
)  # fmt: skip
def test_quantized_weights_where_they_cannot_be(tmp_path, changes, model, words):
    config = helpers.session(tmp_path, *changes, model=helpers.TINY | model).config
    with pytest.raises(UserError, match=words):
        checks.check(config)


def test_loggers_start_before_the_last_round_is_learned(tmp_path, monkeypatch):
    workdir, started = helpers.session(tmp_path, "rounds=2").workdir, []
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda *_: started.append(1) or EventFiles(tmp_path / "events"))
    for learned, count in ((2, 0), (1, 1)):
        monkeypatch.setattr(models, "fitted_rounds", lambda _, learned=learned: learned)
        checks.check_loggers(workdir)
        assert len(started) == count
    workdir.close()


def test_loggers_start_where_a_damaged_checkpoint_is_to_be_learned_again(tmp_path, monkeypatch):
    """`qsharp run` resumes from the checkpoint before, so the check must not stop it."""
    workdir, started = helpers.session(tmp_path, "rounds=1").workdir, []
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda *_: started.append(1) or EventFiles(tmp_path / "events"))
    checkpoints = Checkpoints(workdir.guide_folder(1))
    for step in (5, 9):
        checkpoints.save(TrainState({"x": jnp.ones(3)}, {}, jnp.int32(step)), final=step == 9)
    checkpoints.wait()
    assert models.fitted_rounds(workdir) == 1
    for path in (workdir.guide_folder(1) / "9" / "progress").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(DamagedError):
        models.fitted_rounds(workdir)
    checks.check_loggers(workdir)
    assert started
    workdir.close()


def test_a_setting_that_is_not_there(tmp_path):
    """The sections of other algorithms are not needed."""
    config = helpers.session(tmp_path).config
    with config.unlocked():
        del config.cd, config.vas
        checks.check(config)
        config.algorithm = "vas"
    with pytest.raises(UserError, match="lacks the setting vas.td_lambda"):
        checks.check(config)


def test_every_round_uses_a_fixed_data_set_whole(tmp_path):
    """As the paper does, where endless problems are new ones in each round."""
    folder = small_data.write_gsm8k(tmp_path / "data")
    made = helpers.session(tmp_path / "run", "rounds=2")
    first, second = problems.train_problems(made, 1), problems.train_problems(made, 2)
    assert len(first) == len(second) == 12 and not {p.problem_id for p in first} & {p.problem_id for p in second}
    data_set = dict(name="gsm8k", data=str(folder), evaluate_on="test", split_seed=0)
    made = helpers.session(tmp_path / "other", "rounds=2", "collect.prompts=36", task=data_set)
    assert len(problems.train_problems(made, 1)) == 36 and problems.train_problems(made, 2) == problems.train_problems(
        made, 1
    )
    assert len(problems.test_problems(made)) == 10 and not set(problems.test_problems(made)) & set(
        problems.train_problems(made, 1)
    )
    made = helpers.session(tmp_path / "more", "collect.prompts=37", task=data_set)
    with pytest.raises(UserError, match="gsm8k: there are 36 train problems, not the 37 asked for"):
        problems.train_problems(made, 1)


def test_a_task_without_a_model_of_its_own(tmp_path):
    """Its reference comes from a folder; data that are relative to where the command was typed are not kept so."""
    config = helpers.session(tmp_path).config
    with config.unlocked():
        config.task = dict(name="gsm8k", data="data", evaluate_on="test", split_seed=0)
    with pytest.raises(UserError, match="config.ref is pretrain, but gsm8k has no texts to pre-train on"):
        checks.check(config)
    sources.make_absolute(config)
    assert config.task.data == str(Path.cwd() / "data")
    config.task.data = "hub"
    sources.make_absolute(config)
    assert config.task.data == "hub"


def test_devices_that_a_run_leaves_idle_are_told(tmp_path, monkeypatch, capsys):
    session = helpers.session(tmp_path)
    checks.check_devices(session)
    assert "devices here" not in capsys.readouterr().out
    monkeypatch.setattr(checks.jax, "device_count", lambda: 8)
    checks.check_devices(session)
    assert "1 of the 8 devices here is used; --config.mesh=NAME" in capsys.readouterr().out
