"""Checks of `qsharp collect` and `fit`, the separate steps of a round."""

import helpers
import pytest

from qsharp_jax.cli import rounds
from qsharp_jax.data.records import Rollout, write_shard
from qsharp_jax.system.errors import UserError


def test_a_round_whose_collection_was_stopped_is_not_fitted(tmp_path):
    """12 problems with 2 rollouts each, in shards of any size; none at all is another refusal."""
    session = helpers.session(tmp_path, "rounds=2")

    def write(number, shard, count):
        rollout = Rollout("p", number, [1], [2, 3], 0, 1.0, True, 0.5, 0, "a")
        write_shard(session.workdir.rollouts(number), shard, [rollout] * count)

    write(1, 0, 6)
    with pytest.raises(UserError, match=r"round 1 has 6 of its 24 rollouts; run qsharp collect .*--skip-damaged"):
        rounds.check_collected(session, 1)
    write(1, 3, 18)
    rounds.check_collected(session, 1)
    rounds.check_collected(session, 2)
    write(2, 0, 23)
    with pytest.raises(UserError, match="round 2 has 23 of its 24 rollouts"):
        rounds.check_collected(session, 2)
    shard = session.workdir.rollouts(1) / "shard-00003.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match="shard-00003.parquet is damaged"):
        rounds.check_collected(session, 1)
