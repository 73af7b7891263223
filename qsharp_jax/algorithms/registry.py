"""The algorithms by name, in the order in which they are displayed.

A line is "FILE:RECORD". Records are imported by these names, and not by `import`, since an algorithm's functions import
the modules of a run, which read the records. To read them must take no JAX: `--help` and the recipes do so.
"""

import pkgutil

from qsharp_jax.algorithms.base import Algorithm

RECORDS = (
    "qsharp:QSHARP",
    "cd:CD",
    "vas:VAS",
    "reinforce:REINFORCE",
    "ppo:PPO",
    "dpo:DPO",
    "dpo:RPO",
    "klq:KLQ",
)

_RECORDS = [pkgutil.resolve_name(f"qsharp_jax.algorithms.{record}") for record in RECORDS]
ALGORITHMS: dict[str, Algorithm] = {record.name: record for record in _RECORDS}
DEFAULT = "qsharp"  # of `config.algorithm`; the others are compared to it


def names(learns: str) -> list[str]:
    """Return the algorithms that learn a "guide" or a "policy"."""
    return [name for name, algorithm in ALGORITHMS.items() if algorithm.learns == learns]
