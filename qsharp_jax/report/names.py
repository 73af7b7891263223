"""What methods are called and how they are coloured, in tables, plots and pages alike."""

import math

POLICIES = {"reinforce": "REINFORCE", "ppo": "PPO", "dpo": "DPO", "rpo": "RPO", "klq": "KLQ"}
LEARNED = {"qsharp": "Q#", "cd": "CD", "vas": "VAS"} | POLICIES
NAMES = {
    "pi_ref": "pi_ref",
    "pi_ref_greedy": "pi_ref, greedy",
    "pi_ref_top_k": "pi_ref, top-K",
    **LEARNED,
    **{f"{method}_greedy": f"{name}, greedy" for method, name in LEARNED.items()},
}
GUIDED = ("qsharp", "cd", "vas")
COLOURS = {"qsharp": "#1f5fa8", "cd": "#c8641e", "vas": "#b58a00", "pi_ref": "#555555"} | dict.fromkeys(
    POLICIES, "#2c7a4b"
)


def eta_of(guided: dict) -> float:
    """Of a guided row or sample: JSON knows no infinity."""
    return math.inf if guided["eta"] is None else guided["eta"]


def learned(rows: list[dict]) -> str:
    """The method that a run's rows are about."""
    methods = {row["method"] for row in rows}
    return next((method for method in ("qsharp", *POLICIES, "cd", "vas") if method in methods), "qsharp")
