"""Policies as tables over the nodes of small token trees (tabular.py), and their sequences as the algorithms see them.

A sequence's batch row is one prompt token and then its tokens. Shapes: P sequences, M tokens at most, N nodes, V tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.algorithms.policy_based import RolloutBatch
from qsharp_jax.algorithms.policy_scores import make_batch
from qsharp_jax.data.batches import Example


class Sequences:
    """All sequences of a tree: the node that each token is chosen at [P, M], the tokens [P, M], the mask, the rewards."""

    def __init__(self, tree):
        self.tree, found = tree, []
        todo = [(0, (), ())]
        while todo:
            node, nodes, tokens = todo.pop()
            if tree.first_child[node] < 0:
                found.append((nodes, tokens, tree.reward[node]))
                continue
            todo += [(tree.first_child[node] + token, (*nodes, node), (*tokens, token)) for token in range(tree.vocab)]
        most = max(len(tokens) for _, tokens, _ in found)
        self.nodes, self.tokens = (
            np.asarray([[*sequence[part], *[0] * (most - len(sequence[part]))] for sequence in found])
            for part in (0, 1)
        )
        self.mask = np.arange(most) < np.asarray([len(tokens) for _, tokens, _ in found])[:, None]
        self.rewards = np.asarray([reward for *_, reward in found])

    def log_probs(self, table):
        """[P, M] of a table of logits [N, V]."""
        log_probs = jax.nn.log_softmax(jnp.asarray(table))[self.nodes, self.tokens]
        return jnp.where(self.mask, log_probs, 0)

    @property
    def ref_log_probs(self):
        return np.where(self.mask, np.log(self.tree.pi_ref[self.nodes, self.tokens]), 0)

    def values(self, table):
        """[P, M] of a table [N]: of the node that each token is chosen at."""
        return jnp.where(self.mask, jnp.asarray(table)[self.nodes], 0)

    def sampled(self, logits, values, which, samples=1) -> RolloutBatch:
        """Some of the sequences, as if this policy had drawn them."""
        examples = [
            Example([0], self.tokens[i][self.mask[i]].tolist(), float(self.rewards[i])) for i in which
        ]  # fmt: skip
        numbers = (self.mask, self.log_probs(logits), self.ref_log_probs, self.values(values))
        return RolloutBatch(examples, samples, *(np.asarray(x)[which] for x in numbers))

    def batch(self, numbers, which):
        """A batch of some sequences, with numbers [len(which), M]."""
        examples = [Example([0], self.tokens[i][self.mask[i]].tolist()) for i in which]
        width = 1 + self.mask.shape[1]
        return make_batch(examples, numbers, range(len(which)), rows=len(which), width=width)

    def loss(self, loss, logits, values, batch, which):
        """An algorithm's loss of a table of logits and one of values, on a batch of some sequences."""
        log_probs, values = (
            jnp.pad(x[jnp.asarray(which)], ((0, 0), (1, 0))) for x in (self.log_probs(logits), self.values(values))
        )
        return loss(log_probs, values, batch, batch)


def random_tables(rng, tree):
    """Logits [N, V] and values [N]."""
    return rng.normal(size=tree.pi_ref.shape), rng.normal(size=tree.reward.shape)
