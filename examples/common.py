"""Code that the examples share: the library's tilt on token trees, their command line, tables and pictures.

Shapes: N nodes of a tree, V vocabulary, M distinct rewards of whole sequences.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tabular

from qsharp_jax import guidance, values

matplotlib.use("Agg")  # pictures go to files, and need no screen
import matplotlib.pyplot as plt  # noqa: E402

COLORS = {
    "exact": "#111111", "qsharp": "#1f5fa8", "cd": "#c8641e", "expectation": "#2e8b57", "best": "#8a4fa0",
    "pi_ref": "#777777",
}  # fmt: skip


def guided(tree: tabular.Tree, laws: np.ndarray, eta: float, mode: str = "qsharp") -> np.ndarray:
    """The policy [N, V] that the library makes of pi_ref and of laws [N, M] of the sequences' rewards, at every node.

    Every token is a candidate; one whose law is not known (zeros alone) keeps pi_ref's logit. Where every token has
    weight 0, as a sure 0 has in the mode "expectation", it is pi_ref.
    """
    inner, policy = tree.inner, np.zeros_like(tree.pi_ref)
    with jax.enable_x64(True), np.errstate(divide="ignore"):
        policy[inner] = _tilted(
            np.log(tree.pi_ref[inner]), np.log(laws[tree.children(inner)]), tabular.totals(tree)[0],
            np.full(len(inner), eta), mode,
        )  # fmt: skip
    return policy


@functools.partial(jax.jit, static_argnames="mode")
def _tilted(ref_logits: jax.Array, logits: jax.Array, atoms: jax.Array, eta: jax.Array, mode: str) -> jax.Array:
    """Next-token probabilities, from [B, V], [B, V, M], [M], [B] to [B, V]."""
    known = (logits > -jnp.inf).any(-1)
    z = values.Categorical(jnp.where(known[..., None], logits, 0), atoms)
    log_weights = jnp.where(known, guidance.log_weights(z, eta, mode), 0)
    candidates = jnp.broadcast_to(jnp.arange(ref_logits.shape[1]), ref_logits.shape)
    logits = guidance.tilt(ref_logits, candidates, log_weights)
    return jax.nn.softmax(jnp.where((logits > -jnp.inf).any(-1, keepdims=True), logits, ref_logits))


def objective(tree: tabular.Tree, policy: np.ndarray, eta: float) -> float:
    """E reward - eta KL(policy || pi_ref), of whole sequences."""
    reward, kl = tabular.evaluate(tree, policy)
    return reward[0] - eta * kl[0]


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers with three digits, in columns that line up."""
    cells = [[x if isinstance(x, str) else f"{x:.3g}" for x in row] for row in [columns, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def tidy(axes: plt.Axes, **labels: str) -> None:
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)


def main(name: str, run: Callable[..., Any], draw: Callable[[Any], plt.Figure], words: Callable[[Any], str]) -> None:
    """The command line of an example: computes, writes NAME.png, prints the table."""
    parser = argparse.ArgumentParser(prog=f"examples/{name}.py")
    parser.add_argument("--out", metavar="DIR", default="runs/examples", help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="fewer points, in some seconds")
    options = parser.parse_args()
    result = run(quick=options.quick)
    path = Path(options.out) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(result).savefig(path, dpi=130)
    print(f"{words(result)}\n\n{path}")
