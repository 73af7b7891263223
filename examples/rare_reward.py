"""Theorems 4.1 and 4.2: a small sure reward on the left, a large rare one on the right; CD keeps left, Q# goes right.

    python examples/rare_reward.py        (seconds; the picture is runs/examples/rare_reward.png)

Left pays 0.1 surely. Right pays 1 with probability 0.05 under pi_ref, else 0: its mean is 0.05. A tilt by the mean over
eta therefore goes left, the more so the smaller eta is, and earns 0.1. The optimal policy weighs right by
E exp(z / eta), sees that pi_ref can reach 1 there, and steers to it: as eta falls it earns 1.
"""

import common
import matplotlib.pyplot as plt
import numpy as np
import tabular

METHODS = {"exact": "pi*, exact", "qsharp": "Q#", "cd": "CD"}
LEFT, RIGHT = 0, 1


def run(quick: bool = False) -> dict:
    """For every method, by eta: the probability of going right, reward, KL, and the objective."""
    tree = tabular.toy_tree()
    laws = tabular.total_laws(tree)  # Z* under pi_ref: one for every eta
    etas = np.geomspace(1, 0.005, 9 if quick else 60)
    found = {method: {name: [] for name in ("right", "reward", "kl", "objective")} for method in METHODS}
    for eta in etas:
        for method, rows in found.items():
            policy = tabular.soft_bellman(tree, eta)[2] if method == "exact" else common.guided(tree, laws, eta, method)
            reward, kl = tabular.evaluate(tree, policy)
            rows["right"].append(policy[0, RIGHT])
            rows["reward"].append(reward[0])
            rows["kl"].append(kl[0])
            rows["objective"].append(reward[0] - eta * kl[0])
    return {"etas": etas, **{method: {n: np.array(x) for n, x in rows.items()} for method, rows in found.items()}}


def draw(found: dict) -> plt.Figure:
    figure, (choice, earned) = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained")
    for axes, name in ((choice, "right"), (earned, "reward")):
        for method, label in METHODS.items():
            style = dict(linestyle="none", marker="o", markersize=5, markevery=4) if method == "qsharp" else {}
            style |= dict(linestyle="--") if method == "cd" else {}
            axes.plot(found["etas"], found[method][name], color=common.COLORS[method], label=label, **style)
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(-0.03, 1.03)
    earned.axhline(0.1, color="#999999", linewidth=1, linestyle=":")
    earned.annotate("the sure reward, 0.1", (0.03, 0.05), fontsize=8, color="#555555")
    x = "eta, the weight of the KL (falling: stronger guidance)"
    common.tidy(choice, xlabel=x, ylabel="probability of going right", title="Right: 1 with probability 0.05, else 0")
    common.tidy(earned, xlabel=x, ylabel="expected reward", title="What it earns")
    return figure


def words(found: dict) -> str:
    some = [int(np.argmin(abs(found["etas"] - eta))) for eta in (1, 0.3, 0.1, 0.05, 0.02, 0.005)]
    rows = [
        (found["etas"][i], *(found[m][name][i] for name in ("right", "reward", "objective") for m in METHODS))
        for i in some
    ]
    columns = [f"{name} {m}" for name in ("right", "reward", "V") for m in ("pi*", "Q#", "CD")]
    return common.table(["eta", *columns], rows) + "\n(right: probability; V: E reward - eta KL; all exact)"


if __name__ == "__main__":
    common.main("rare_reward", run, draw, words)
