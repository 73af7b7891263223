"""All algorithms on the word problems of arithmetic.py: `qsharp compare`."""

from ml_collections import ConfigDict

from qsharp_jax.configs.arithmetic import get_config as run
from qsharp_jax.configs.compare_star_graph import compared


def get_config() -> ConfigDict:
    c = compared(run())
    # Of a round's updates: 38 by REINFORCE, which learns once from every rollout, and about 200 or more by the others.
    c.policy.optimizer.warmup_steps = 50
    c.compare.changes.reinforce = ("policy.optimizer.warmup_steps=4",)
    return c
