"""An exact oracle for KL-regularised control of token trees, in float64 numpy.

Laws Z*(x, y) of the reward-to-go under pi_ref, soft Bellman values Q*_eta and V*_eta, the optimal policy pi*_eta, and
the expected reward and KL of any policy ("Q#", arXiv 2502.20548, sections 2 and 4). Shapes: N nodes, V vocabulary.
It knows nothing about JAX or about the package that it judges.
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tree:
    """Token sequences as a tree, level by level: node 0 is the prompt, a node is the prompt and the tokens so far.

    A node either ends its sequence or has V children, one a token; the children of a level's nodes, in order, are the
    next level. Everything below therefore goes over levels with whole arrays, never over single nodes.

    Attributes:
      first_child: [N] int, the child by token 0 (the others follow it); -1 where the sequence has ended.
      pi_ref: [N, V], the next token's probabilities; 0 where the sequence has ended.
      reward: [N], what the last token of the node paid; the prompt's is 0.
    """

    first_child: np.ndarray
    pi_ref: np.ndarray
    reward: np.ndarray

    @property
    def vocab(self) -> int:
        return self.pi_ref.shape[1]

    @functools.cached_property
    def inner(self) -> np.ndarray:
        """Nodes at which a token is chosen, prompt first."""
        return np.flatnonzero(self.first_child >= 0)

    @functools.cached_property
    def inner_by_level(self) -> list[np.ndarray]:
        """`inner` cut into levels, prompt first."""
        levels, level = [], np.zeros(1, int)
        while (inner := level[self.first_child[level] >= 0]).size:
            levels.append(inner)
            level = self.children(inner).ravel()
        return levels

    def children(self, nodes: np.ndarray) -> np.ndarray:
        """[n] inner nodes -> [n, V] nodes."""
        return self.first_child[nodes][:, None] + np.arange(self.vocab)


def random_tree(
    rng: np.random.Generator,
    vocab: int,
    depth: int,
    *,
    stop: float = 0.2,
    final_rewards: tuple[float, ...] = (0.0, 1.0),
    step_rewards: tuple[float, ...] = (0.0,),
) -> Tree:
    """A tree of at most `depth` tokens a sequence, with pi_ref uniform over the simplex at every node.

    Args:
      rng: source of everything.
      vocab: V.
      depth: tokens at which every sequence has ended.
      stop: probability that a token ends its sequence earlier (the prompt's never does).
      final_rewards: what the last token of a sequence may pay, equally likely.
      step_rewards: what every other token may pay, equally likely.
    """
    first_child, pi_ref, reward, nodes, width = [], [], [], 0, 1
    for level in range(depth + 1):
        ends = np.full(width, level == depth) | ((rng.random(width) < stop) & (level > 0))
        inner = np.cumsum(~ends) - 1  # how many inner nodes come before, within the level
        first_child.append(np.where(ends, -1, nodes + width + vocab * inner))
        pi_ref.append(np.where(ends[:, None], 0.0, rng.dirichlet(np.ones(vocab), size=width)))
        paid = np.where(ends, rng.choice(final_rewards, size=width), rng.choice(step_rewards, size=width))
        reward.append(paid * (level > 0))
        nodes, width = nodes + width, vocab * (~ends).sum()
    return Tree(*map(np.concatenate, (first_child, pi_ref, reward)))


def toy_tree() -> Tree:
    """Where CD fails (Theorems 4.1, 4.2): token 0 pays 0.1 surely; token 1 leads to 1 with probability 0.05, else 0."""
    return Tree(
        first_child=np.array([1, -1, 3, -1, -1]),
        pi_ref=np.array([[0.5, 0.5], [0, 0], [0.05, 0.95], [0, 0], [0, 0]]),
        reward=np.array([0, 0.1, 0, 1.0, 0]),
    )


class Laws:
    """Z*(x, y) for every node x and token y: where pi_ref ends from there, and what it has been paid by then.

    The leaves are laid out so that those below a node are neighbours; a law is a slice of them.
    """

    def __init__(self, tree: Tree):
        self.tree = tree
        self.reach = np.ones(len(tree.reward))  # [N] P(node | prompt)
        self.paid = tree.reward.copy()  # [N] sum of rewards from the prompt on
        self.leaves = np.where(tree.first_child < 0, 1, 0)  # [N] leaves at or below the node
        self.start = np.zeros(len(tree.reward), int)  # [N] the first of them in the layout
        for level in reversed(tree.inner_by_level):
            self.leaves[level] = self.leaves[tree.children(level)].sum(axis=1)
        for level in tree.inner_by_level:
            children = tree.children(level)
            self.reach[children] = self.reach[level, None] * tree.pi_ref[level]
            self.paid[children] += self.paid[level, None]
            before = np.cumsum(self.leaves[children], axis=1) - self.leaves[children]
            self.start[children] = self.start[level, None] + before
        ends = np.flatnonzero(tree.first_child < 0)
        self.layout = ends[np.argsort(self.start[ends])]

    def __call__(self, node: int, token: int) -> tuple[np.ndarray, np.ndarray]:
        """The law of the reward-to-go when `token` is appended to `node` and pi_ref finishes.

        Returns:
          Distinct values, increasing (those that differ by rounding are one), and their probabilities.
        """
        child = self.tree.first_child[node] + token
        ends = self.layout[self.start[child] : self.start[child] + self.leaves[child]]
        values, index = np.unique(np.round(self.paid[ends] - self.paid[node], 12), return_inverse=True)
        return values, np.bincount(index, weights=self.reach[ends] / self.reach[child])


def soft_bellman(tree: Tree, eta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q*_eta [N, V], V*_eta [N] and pi*_eta [N, V] by backups from the leaves up; 0 where the sequence has ended.

    Q(x, y) = r + V(xy) and V(x) = eta log E_{y ~ pi_ref}[exp(Q(x, y) / eta)].
    """
    q, policy, v = np.zeros_like(tree.pi_ref), np.zeros_like(tree.pi_ref), np.zeros_like(tree.reward)
    for level in reversed(tree.inner_by_level):
        children = tree.children(level)
        q[level] = tree.reward[children] + v[children]
        best = q[level].max(axis=1, keepdims=True)
        weights = tree.pi_ref[level] * np.exp((q[level] - best) / eta)
        v[level] = best[:, 0] + eta * np.log(weights.sum(axis=1))
        policy[level] = weights / weights.sum(axis=1, keepdims=True)
    return q, v, policy


def evaluate(tree: Tree, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expected reward-to-go [N] and KL(policy || pi_ref) [N] over the rest of the sequence, from every node."""
    reward, kl = np.zeros_like(tree.reward), np.zeros_like(tree.reward)
    for level in reversed(tree.inner_by_level):
        children, pi = tree.children(level), policy[level]
        with np.errstate(divide="ignore", invalid="ignore"):
            log_ratio = np.where(pi > 0, np.log(pi / tree.pi_ref[level]), 0)
        reward[level] = np.sum(pi * (tree.reward[children] + reward[children]), axis=1)
        kl[level] = np.sum(pi * (log_ratio + kl[children]), axis=1)
    return reward, kl
