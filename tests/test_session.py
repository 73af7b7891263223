"""Settings that do not go together are refused before anything is computed."""

import helpers
import pytest

from qsharp_jax import session
from qsharp_jax.errors import UserError


def changed(tmp_path, *overrides):
    return helpers.session(tmp_path, *overrides).config


def test_a_batch_that_its_parts_do_not_divide(tmp_path):
    """With both numbers."""
    config = changed(tmp_path, "fit.batch_size=8", "fit.accumulate=3")
    with pytest.raises(UserError, match="fit.accumulate is 3.*fit.batch_size, which is 8"):
        session.check(config)
    config.fit.accumulate = 4
    session.check(config)


def test_a_workdir_of_before_there_were_meshes(tmp_path):
    """It is one device's; a mesh, once there, is whole."""
    config = helpers.session(tmp_path).config
    with config.unlocked():
        del config.mesh.hosts
        with pytest.raises(UserError, match="lacks the setting mesh.hosts"):
            session.check(config)
        del config.mesh
    session.check(config)


def test_packed_rows_that_a_rollout_may_not_fit_into(tmp_path):
    """Prompts of 16 tokens and up to 7 new ones: 22 are too few, 23 are enough, and 0 packs nothing."""
    config = changed(tmp_path, "fit.pack_length=22")
    with pytest.raises(UserError, match="fit.pack_length is 22; it must be at least 23"):
        session.check_problems(config)
    for enough in (23, 0):
        config.fit.pack_length = enough
        session.check_problems(config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("fit.patience=3",), "fit.patience is 3 and config.fit.evaluate_every 0"),
        (("fit.evaluate_every=5", "fit.holdout=0"), "fit.evaluate_every is 5 and config.fit.holdout 0"),
    ],
)
def test_evaluations_that_would_never_come_or_have_nothing_to_measure(tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        session.check(changed(tmp_path, *overrides))
