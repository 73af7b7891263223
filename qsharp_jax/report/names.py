"""Names and colors of methods, in tables, plots and pages alike."""

import math

from qsharp_jax.algorithms import registry
from qsharp_jax.algorithms.registry import ALGORITHMS

LEARNED = {name: algorithm.label for name, algorithm in ALGORITHMS.items()}
NAMES = {
    "pi_ref": "pi_ref",
    "pi_ref_greedy": "pi_ref, greedy",
    "pi_ref_top_k": "pi_ref, top-K",
    **LEARNED,
    **{f"{method}_greedy": f"{name}, greedy" for method, name in LEARNED.items()},
    **{f"{method}_power": f"{name}, power" for method, name in LEARNED.items()},
}
GUIDED, POLICIES = registry.names("guide"), registry.names("policy")
COLORS = {"pi_ref": "#555555"} | {name: algorithm.color for name, algorithm in ALGORITHMS.items()}
COLORS |= {f"{name}_power": algorithm.color for name, algorithm in ALGORITHMS.items()}


def eta_of(guided: dict) -> float:
    """Return the eta of a guided row or sample: JSON has no infinity."""
    return math.inf if guided["eta"] is None else guided["eta"]


def name_of(row: dict) -> str:
    """Return the name of a row's method, with the power of its tilt where it has one."""
    name = NAMES.get(row["method"], row["method"])
    return f"{name} {row['power']:g}" if "power" in row else name


def learned(rows: list[dict]) -> str:
    """Return the method that a run's rows are about."""
    methods = {row["method"] for row in rows}
    return next((method for method in ALGORITHMS if method in methods), registry.DEFAULT)
