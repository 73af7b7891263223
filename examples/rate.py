"""Convergence rate of a guide fitted to n rollouts: the loss falls as 1/n, with a constant that is known.

    python examples/rate.py        (some 20 s on a core; the picture is runs/examples/rate.png)

Z is a table: how often each reward came in those of n of pi_ref's sequences that pass a node, its maximum likelihood.
The policy that tilts by it, pi_n, loses V*_eta - V_eta(pi_n) = eta KL(pi_n || pi*_eta) (see `tabular.evaluate`), to the
leading order (delta method; d* and d_ref are the probabilities of passing a node)

    E loss = (1 / n) (eta / 2) sum_x d*(x) sum_y pi*(y|x) (1 - pi*(y|x)) CV(x, y)^2 / d_ref(xy),
    CV(x, y)^2 = Var exp(z/eta) / (E exp(z/eta))^2 under Z*(x, y).

CV is the coefficient of variation in the paper's bounds (section 4): where pi_ref's outcomes vary little, little has to
be learned. Those bounds hold for any class of guides and fall as n^(-1/2) at worst; a table's loss, which is a KL near
its minimum, ends at 1/n. A small eta makes CV^2 large, up to e^(1/eta): there 1/n only begins once n has seen the rare
rewards.
"""

import common
import matplotlib.pyplot as plt
import numpy as np
import tabular

from qsharp_jax.evaluation import statistics

ETAS = (1.0, 0.3, 0.1, 0.05)
REWARDS = (0.0,) * 9 + (1.0,)  # of a sequence, equally likely


def constant(tree: tabular.Tree, eta: float) -> float:
    """n times the expected loss for large n, by the formula above."""
    weights = np.exp(tabular.totals(tree)[0] / eta)
    laws = tabular.total_laws(tree)
    variation = laws @ weights**2 / (laws @ weights) ** 2 - 1  # CV(x, y)^2, [N] by the node xy
    optimal = tabular.soft_bellman(tree, eta)[2]
    passed, optimally = tabular.reach(tree, tree.pi_ref), tabular.reach(tree, optimal)
    inner, children = tree.inner, tree.children(tree.inner)
    pi = optimal[inner]
    return eta / 2 * np.sum(optimally[inner, None] * pi * (1 - pi) * variation[children] / passed[children])


def loss(tree: tabular.Tree, rollouts: int, eta: float, rng: np.random.Generator) -> float:
    """V*_eta less what a policy earns whose guide was fitted to so many rollouts."""
    counts = tabular.sample(tree, tree.pi_ref, rollouts, rng)  # [N, M], the table before it is normalized
    _, kl = tabular.evaluate(tree, common.guided(tree, counts, eta), base=tabular.soft_bellman(tree, eta)[2])
    return eta * kl[0]


def run(quick: bool = False) -> dict:
    """Mean losses over repetitions, with their 95% intervals, by eta and n; and the constants."""
    tree = tabular.random_tree(np.random.default_rng(1), vocab=3, depth=4, final_rewards=REWARDS)
    rollouts = np.geomspace(100, 1e6, 5 if quick else 9).astype(int)
    repetitions = 40 if quick else 150
    rng = np.random.default_rng(0)
    losses = {
        eta: np.array([[loss(tree, int(n), eta, rng) for _ in range(repetitions)] for n in rollouts]) for eta in ETAS
    }
    return {
        "rollouts": rollouts,
        "mean": {eta: x.mean(axis=1) for eta, x in losses.items()},
        "interval": {eta: np.array([statistics.bootstrap(row) for row in x]) for eta, x in losses.items()},
        "constant": {eta: constant(tree, eta) for eta in ETAS},
        "slope": {eta: slope(rollouts, x.mean(axis=1)) for eta, x in losses.items()},
        "repetitions": repetitions,
    }


def slope(rollouts: np.ndarray, losses: np.ndarray) -> float:
    """Slope of log loss against log n, by least squares over n of 10,000 and more."""
    late = rollouts >= 10_000
    return np.polyfit(np.log(rollouts[late]), np.log(losses[late]), 1)[0]


def draw(found: dict) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6.2, 4.4), layout="constrained")
    n = found["rollouts"]
    for eta, color in zip(ETAS, ("#e0a030", "#c8641e", "#4a8cc7", "#123f6d"), strict=True):
        mean, interval = found["mean"][eta], found["interval"][eta]
        axes.errorbar(n, mean, [mean - interval[:, 0], interval[:, 1] - mean], color=color, marker="o", markersize=4,
                      linestyle="none", capsize=2, label=f"eta {eta:g}: slope {found['slope'][eta]:.2f}")  # fmt: skip
        axes.plot(n, found["constant"][eta] / n, color=color, linewidth=1, linestyle="--")
    axes.plot([], [], color="#555555", linewidth=1, linestyle="--", label="theory, constant / n")
    axes.set(xscale="log", yscale="log")
    common.tidy(
        axes, xlabel="rollouts n", ylabel="V* - V of the fitted guide's policy", title="Suboptimality of a fitted table"
    )
    return figure


def words(found: dict) -> str:
    n = found["rollouts"]
    rows = [
        (eta, found["constant"][eta], found["slope"][eta], *(found["mean"][eta] / found["constant"][eta] * n))
        for eta in ETAS
    ]
    columns = ["eta", "constant", "slope", *(f"n {x:.0e}" for x in n)]
    return (
        common.table(columns, rows)
        + f"\n(slope: of log loss by log n, n >= 1e4; n ...: mean of {found['repetitions']} fits over constant / n)"
    )


if __name__ == "__main__":
    common.main("rate", run, draw, words)
