"""Reward against KL: which method buys how much reward for how much of a departure from pi_ref, all of it exact.

    python examples/frontier.py        (some 10 s on a core; the picture is runs/examples/frontier.png)

A token tree of a few thousand nodes. Its frontier is what KL-regularized control can do at all: for each eta the point
(KL, reward) of pi*_eta, by soft Bellman backups; no policy lies above it. Against it, by dynamic programming too:

    Q#            pi_ref tilted by E exp(z / eta) under the law Z* of the reward: on the frontier at every eta
    CD            pi_ref tilted by exp(E z / eta)
    expectation   pi_ref tilted by E z, as FUDGE does: one point, without a strength to choose
    best of n     the law of the best of n of pi_ref's sequences, n = 2, 4, ...: below it, and n times as dear
    fitted        Q# and CD with a table of frequencies from 1,000 rollouts in the place of Z*

By duality the frontier's reward at a KL of k is min over eta of V*_eta + eta k: how far a method is below it is exact.
"""

import common
import matplotlib.pyplot as plt
import numpy as np
import tabular
from scipy import optimize

REWARDS = (0.0,) * 14 + (0.3,) * 5 + (1.0,)  # of a sequence, equally likely: 1 is rare, 0.3 is not
ROLLOUTS = 1000
NAMES = {"exact": "pi*, exact", "qsharp": "Q#", "cd": "CD", "qsharp_fitted": "Q#, fitted", "cd_fitted": "CD, fitted"}


def run(quick: bool = False) -> dict:
    """(KL, reward) of every method, [points, 2], and by how much that is below the frontier at this KL, [points]."""
    tree = tabular.random_tree(np.random.default_rng(0), vocab=4, depth=4 if quick else 6, final_rewards=REWARDS)
    exact = tabular.total_laws(tree)
    fitted = tabular.sample(tree, tree.pi_ref, ROLLOUTS, np.random.default_rng(1))
    etas, numbers = np.geomspace(10, 0.03, 12 if quick else 40), 2 ** np.arange(1, 7)

    def place(policy: np.ndarray) -> tuple[float, float]:
        reward, kl = tabular.evaluate(tree, policy)
        return kl[0], reward[0]

    guided = {
        f"{mode}{name}": np.array([place(common.guided(tree, laws, eta, mode)) for eta in etas])
        for mode in ("qsharp", "cd")
        for name, laws in (("", exact), ("_fitted", fitted))
    }
    places = {
        "exact": np.array([place(tabular.soft_bellman(tree, eta)[2]) for eta in etas]),
        **guided,
        "best": np.array([place(tabular.best_of_n(tree, n)) for n in numbers]),
        "expectation": np.array([place(common.guided(tree, exact, 1.0, "expectation"))]),
        "pi_ref": np.array([place(tree.pi_ref)]),
    }
    below = {name: np.array([best_reward(tree, kl) - reward for kl, reward in x]) for name, x in places.items()}
    return {"nodes": len(tree.reward), "etas": etas, "numbers": numbers, "below": below, **places}


def best_reward(tree: tabular.Tree, kl: float) -> float:
    """The most that a policy of this KL earns: min over eta of V*_eta + eta kl."""

    def dual(log_eta: float) -> float:
        eta = np.exp(log_eta)
        return tabular.soft_bellman(tree, eta)[1][0] + eta * kl

    return optimize.minimize_scalar(dual, bounds=(np.log(1e-3), np.log(1e3)), method="bounded").fun


def draw(found: dict) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
    styles = {
        "exact": dict(color=common.COLORS["exact"], linewidth=1.5),
        "qsharp": dict(color=common.COLORS["qsharp"], linestyle="none", marker="o", markersize=5),
        "cd": dict(color=common.COLORS["cd"], marker="o", markersize=4),
        "qsharp_fitted": dict(color=common.COLORS["qsharp"], linestyle="--", linewidth=1),
        "cd_fitted": dict(color=common.COLORS["cd"], linestyle="--", linewidth=1),
    }
    for method, style in styles.items():
        axes.plot(*found[method].T, label=NAMES[method], **style)
    color = common.COLORS["best"]
    axes.plot(*found["best"].T, color=color, marker="^", markersize=5, linestyle=":", label="best of n")
    for n, place in zip(found["numbers"], found["best"], strict=True):
        axes.annotate(str(n), place, (5, -9), textcoords="offset points", fontsize=7, color=color)
    axes.plot(*found["expectation"].T, color=common.COLORS["expectation"], marker="D", linestyle="none",
              label="expectation (log E z)")  # fmt: skip
    axes.plot(*found["pi_ref"].T, color=common.COLORS["pi_ref"], marker="s", linestyle="none", label="pi_ref")
    common.tidy(
        axes, xlabel="KL to pi_ref (nats a sequence)", ylabel="expected reward",
        title=f"Reward against KL on a tree of {found['nodes']:,} nodes, {ROLLOUTS:,} rollouts where fitted",
    )  # fmt: skip
    return figure


def words(found: dict) -> str:
    rows = []
    for eta in (1, 0.3, 0.1, 0.03):
        i = int(np.argmin(abs(np.log(found["etas"] / eta))))
        rows += [(NAMES[m], f"{found['etas'][i]:.2g}", *found[m][i], found["below"][m][i]) for m in NAMES]
    for name in ("pi_ref", "expectation"):
        rows.append((name, "", *found[name][0], found["below"][name][0]))
    for n, place, below in zip(found["numbers"], found["best"], found["below"]["best"], strict=True):
        rows.append((f"best of {n}", "", *place, below))
    shown = [(*row[:2], *(f"{abs(x):.4f}" for x in row[2:])) for row in rows]
    return common.table(["method", "eta", "KL", "reward", "below"], shown) + (
        "\n(exact, by dynamic programming; below: the frontier's reward at this KL, less the method's)"
    )


if __name__ == "__main__":
    common.main("frontier", run, draw, words)
