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
