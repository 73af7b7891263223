"""Settings that do not go together are refused before anything is computed."""

from pathlib import Path

import helpers
import pytest
import small_data

from qsharp_jax.run import checks, models, problems
from qsharp_jax.system.errors import UserError


def changed(tmp_path, *overrides):
    return helpers.session(tmp_path, *overrides).config


def test_a_batch_that_its_parts_do_not_divide(tmp_path):
    """With both numbers."""
    config = changed(tmp_path, "fit.batch_size=8", "fit.accumulate=3")
    with pytest.raises(UserError, match="fit.accumulate is 3.*fit.batch_size, which is 8"):
        checks.check(config)
    config.fit.accumulate = 4
    checks.check(config)


def test_a_setting_that_is_not_there(tmp_path):
    """The sections of other algorithms are not needed."""
    config = helpers.session(tmp_path).config
    with config.unlocked():
        del config.cd, config.vas
        checks.check(config)
        config.algorithm = "vas"
    with pytest.raises(UserError, match="lacks the setting vas.td_lambda"):
        checks.check(config)


def test_packed_rows_that_a_rollout_may_not_fit_into(tmp_path):
    """Prompts of 16 tokens and up to 7 new ones: 22 are too few, 23 are enough, and 0 packs nothing."""
    config = changed(tmp_path, "fit.pack_length=22")
    with pytest.raises(UserError, match="fit.pack_length is 22; it must be at least 23"):
        checks.check_problems(config)
    for enough in (23, 0):
        config.fit.pack_length = enough
        checks.check_problems(config)


def test_a_budget_that_the_longest_prompt_leaves_no_room_for(tmp_path):
    """Prompts of 16 tokens in models of 23 positions: 7 new ones fit, 8 do not."""
    config = changed(tmp_path, "generate.max_new_tokens=8")
    with pytest.raises(UserError, match="16 tokens, which with config.generate.max_new_tokens = 8 are more than the"):
        checks.check_problems(config)
    config.generate.max_new_tokens = 7
    checks.check_problems(config)


def test_every_round_uses_a_fixed_data_set_whole(tmp_path):
    """As the paper does, where endless problems are new ones in each round."""
    folder = small_data.write_gsm8k(tmp_path / "data")
    made = helpers.session(tmp_path / "run", "rounds=2")
    first, second = problems.train_problems(made, 1), problems.train_problems(made, 2)
    assert len(first) == len(second) == 12 and not {p.problem_id for p in first} & {p.problem_id for p in second}
    data_set = dict(name="gsm8k", data=str(folder), evaluate_on="test", split_seed=0)
    made = helpers.session(tmp_path / "other", "rounds=2", "collect.prompts=36", task=data_set)
    assert len(problems.train_problems(made, 1)) == 36 and problems.train_problems(made, 2) == problems.train_problems(made, 1)
    assert len(problems.test_problems(made)) == 10 and not set(problems.test_problems(made)) & set(problems.train_problems(made, 1))
    made = helpers.session(tmp_path / "more", "collect.prompts=37", task=data_set)
    with pytest.raises(UserError, match="gsm8k: there are 36 train problems, not the 37 asked for"):
        problems.train_problems(made, 1)


def test_a_task_without_a_model_of_its_own(tmp_path):
    """Its reference comes from a folder; data that are relative to where the command was typed are not kept so."""
    config = changed(tmp_path)
    with config.unlocked():
        config.task = dict(name="gsm8k", data="data", evaluate_on="test", split_seed=0)
    with pytest.raises(UserError, match="config.ref is pretrain, but gsm8k has no texts to pre-train on"):
        checks.check(config)
    models.make_absolute(config)
    assert config.task.data == str(Path.cwd() / "data")
    config.task.data = "hub"
    models.make_absolute(config)
    assert config.task.data == "hub"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("fit.patience=3",), "fit.patience is 3 and config.fit.evaluate_every 0"),
        (("fit.evaluate_every=5", "fit.holdout=0"), "fit.evaluate_every is 5 and config.fit.holdout 0"),
    ],
)
def test_evaluations_that_would_never_come_or_have_nothing_to_measure(tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        checks.check(changed(tmp_path, *overrides))
