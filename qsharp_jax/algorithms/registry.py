"""The algorithms by name, in the order in which they are displayed.

Records are imported by name ("FILE:RECORD"), not by `import`, since an algorithm's functions import the modules of a
run, which read the records. Reading them must not import JAX, for `--help` and the recipes.
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
DEFAULT = "qsharp"  # the default of `config.algorithm`; the others are compared to it


def names(learns: str) -> list[str]:
    """Return the algorithms that learn a "guide" or a "policy"."""
    return [name for name, algorithm in ALGORITHMS.items() if algorithm.learns == learns]
