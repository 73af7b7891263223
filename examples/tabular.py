"""An exact oracle for KL-regularized control of token trees, in float64 numpy, which tests and examples share.

Laws Z*(x, y) of the reward-to-go under pi_ref, soft Bellman values Q*_eta and V*_eta, the optimal policy pi*_eta, and
the expected reward and KL of any policy ("Q#", arXiv 2502.20548, sections 2 and 4). Trees of 10^5 nodes take well under
a second. Shapes: N nodes, V vocabulary, M distinct rewards of whole sequences.
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
    def ends(self) -> np.ndarray:
        """Nodes at which a sequence has ended."""
        return np.flatnonzero(self.first_child < 0)

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

    @functools.cached_property
    def paid(self) -> np.ndarray:
        """[N] sum of rewards from the prompt to each node."""
        paid = self.reward.copy()
        for level in self.inner_by_level:
            paid[self.children(level)] += paid[level, None]
        return paid


# --- Trees ----------------------------------------------------------------------------------------------------------


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
    """A tree where CD fails (Theorems 4.1, 4.2): token 0 pays 0.1 surely; token 1 pays 1 with probability 0.05."""
    return Tree(
        first_child=np.array([1, -1, 3, -1, -1]),
        pi_ref=np.array([[0.5, 0.5], [0, 0], [0.05, 0.95], [0, 0], [0, 0]]),
        reward=np.array([0, 0.1, 0, 1.0, 0]),
    )


# --- What pi_ref leads to -------------------------------------------------------------------------------------------


class Laws:
    """Z*(x, y) for every node x and token y that pi_ref may choose: where it ends, and what it has been paid by then.

    The leaves are laid out so that those below a node are neighbors; a law is a slice of them.
    """

    def __init__(self, tree: Tree):
        self.tree = tree
        self.reach = reach(tree, tree.pi_ref)
        self.leaves = np.where(tree.first_child < 0, 1, 0)  # [N] leaves at or below the node
        self.start = np.zeros(len(tree.reward), int)  # [N] the first of them in the layout
        for level in reversed(tree.inner_by_level):
            self.leaves[level] = self.leaves[tree.children(level)].sum(axis=1)
        for level in tree.inner_by_level:
            children = tree.children(level)
            before = np.cumsum(self.leaves[children], axis=1) - self.leaves[children]
            self.start[children] = self.start[level, None] + before
        self.layout = tree.ends[np.argsort(self.start[tree.ends])]

    def __call__(self, node: int, token: int) -> tuple[np.ndarray, np.ndarray]:
        """The law of the reward-to-go when `token` is appended to `node` and pi_ref finishes.

        Returns:
          Distinct values, increasing (those that differ by rounding are one), and their probabilities.
        """
        child = self.tree.first_child[node] + token
        ends = self.layout[self.start[child] : self.start[child] + self.leaves[child]]
        values, index = np.unique(np.round(self.tree.paid[ends] - self.tree.paid[node], 12), return_inverse=True)
        return values, np.bincount(index, weights=self.reach[ends] / self.reach[child])


def totals(tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """Rewards that whole sequences may have, [M] increasing, and which of them each node's is, [N] (-1 if inner)."""
    values, index = np.unique(np.round(tree.paid[tree.ends], 12), return_inverse=True)
    of_node = np.full(len(tree.reward), -1)
    of_node[tree.ends] = index
    return values, of_node


def total_laws(tree: Tree) -> np.ndarray:
    """[N, M]: the law, on `totals`, of the whole sequence's reward when pi_ref finishes from a node; for few totals.

    Z*(x, y) is that of the node xy less what x has been paid. That is one number for all y, so that a tilt by either
    gives the same policy; where sequences are paid at their ends alone it is 0.
    """
    values, of_node = totals(tree)
    laws = (of_node[:, None] == np.arange(len(values))).astype(float)
    for level in reversed(tree.inner_by_level):
        laws[level] = np.einsum("nv,nvm->nm", tree.pi_ref[level], laws[tree.children(level)])
    return laws


def reach(tree: Tree, policy: np.ndarray) -> np.ndarray:
    """[N]: the probability that a policy's sequence passes the node."""
    found = np.ones(len(tree.reward))
    for level in tree.inner_by_level:
        found[tree.children(level)] = found[level, None] * policy[level]
    return found


def sample(tree: Tree, policy: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[N, M]: of `count` sequences drawn from a policy, how many pass each node, by their total reward."""
    values, of_node = totals(tree)
    probabilities = reach(tree, policy)[tree.ends]
    counts = np.zeros((len(tree.reward), len(values)))
    drawn = rng.multinomial(count, probabilities / probabilities.sum())
    counts[tree.ends, of_node[tree.ends]] = drawn
    return _added_up(tree, counts)


def _added_up(tree: Tree, at_ends: np.ndarray) -> np.ndarray:
    """Sum what lies at the ends, [N, ...], for every node that they are below."""
    for level in reversed(tree.inner_by_level):
        at_ends[level] = at_ends[tree.children(level)].sum(axis=1)
    return at_ends


# --- Policies, [N, V], 0 where the sequence has ended ---------------------------------------------------------------


def soft_bellman(tree: Tree, eta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q*_eta [N, V], V*_eta [N] and pi*_eta [N, V] by backups from the leaves up; 0 where the sequence has ended.

    Q(x, y) = r + V(xy) and V(x) = eta log E_{y ~ pi_ref}[exp(Q(x, y) / eta)].
    """
    q, policy, v = np.zeros_like(tree.pi_ref), np.zeros_like(tree.pi_ref), np.zeros_like(tree.reward)
    for level in reversed(tree.inner_by_level):
        children = tree.children(level)
        q[level] = tree.reward[children] + v[children]
        possible = np.where(tree.pi_ref[level] > 0, q[level], -np.inf)
        best = possible.max(axis=1, keepdims=True)
        weights = tree.pi_ref[level] * np.exp((possible - best) / eta)
        v[level] = best[:, 0] + eta * np.log(weights.sum(axis=1))
        policy[level] = weights / weights.sum(axis=1, keepdims=True)
    return q, v, policy


def tilted(tree: Tree, log_weights: np.ndarray) -> np.ndarray:
    """pi(y | x) ∝ pi_ref(y | x) exp(w(xy)), from the nodes' log-weights w [N]; those of inner nodes' children count."""
    policy = np.zeros_like(tree.pi_ref)
    children = tree.children(tree.inner)
    best = log_weights[children].max(axis=1, keepdims=True)
    weights = tree.pi_ref[tree.inner] * np.exp(log_weights[children] - best)
    policy[tree.inner] = weights / weights.sum(axis=1, keepdims=True)
    return policy


def best_of_n(tree: Tree, n: int) -> np.ndarray:
    """The policy whose sequences are the best of n of pi_ref's, the first of equal ones.

    The best has a total of at most t with probability F(t)^n, F being pi_ref's distribution function; of one total, the
    sequences are as likely as under pi_ref (Beirami et al., arXiv 2401.01879). Where it never comes it is pi_ref.
    """
    law, (_, of_node) = total_laws(tree)[0], totals(tree)
    upto = np.cumsum(law) / law.sum()
    ratio = np.divide(np.diff(upto**n, prepend=0), law, out=np.zeros_like(law), where=law > 0)
    mass = np.zeros(len(tree.reward))
    mass[tree.ends] = reach(tree, tree.pi_ref)[tree.ends] * ratio[of_node[tree.ends]]
    mass = _added_up(tree, mass)
    policy, inner = tree.pi_ref.copy(), tree.inner[mass[tree.inner] > 0]
    policy[inner] = mass[tree.children(inner)] / mass[inner, None]
    return policy


def evaluate(tree: Tree, policy: np.ndarray, base: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Expected reward-to-go [N] and KL(policy || base) [N] over the rest of the sequence, from every node.

    `base` is another policy, by default pi_ref. What a policy earns is known by its KL to the optimal one:
    V*_eta - (E reward - eta KL(policy || pi_ref)) = eta KL(policy || pi*_eta).
    """
    base = tree.pi_ref if base is None else base
    reward, kl = np.zeros_like(tree.reward), np.zeros_like(tree.reward)
    for level in reversed(tree.inner_by_level):
        children, pi = tree.children(level), policy[level]
        with np.errstate(divide="ignore", invalid="ignore"):
            log_ratio = np.where(pi > 0, np.log(pi / base[level]), 0)
        reward[level] = np.sum(pi * (tree.reward[children] + reward[children]), axis=1)
        kl[level] = np.sum(pi * (log_ratio + kl[children]), axis=1)
    return reward, kl
