"""The law that a guide learns: that of the reward under pi_ref, exactly known on a token tree."""

import functools
import itertools

import helpers
import jax
import numpy as np
import tabular

from qsharp_jax import train
from qsharp_jax.data.batches import Batches, Example, from_rollout, make_batch
from qsharp_jax.data.records import Rollout
from qsharp_jax.models import value
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.train.checkpoint import Checkpoints

BOS, DEPTH, BRANCHES = 0, 3, 3


def tree_rollouts(tree, roll_in, count, rng):
    """Rollouts as `rollouts.collect` makes them, on a token tree: `roll_in` up to the switch, then pi_ref.

    Token y of the tree is id y + 1.
    """
    switches = rng.integers(1, DEPTH, size=count)
    nodes, tokens = np.zeros(count, int), np.zeros((count, DEPTH), int)
    for place in range(DEPTH):
        policy = np.where((place < switches)[:, None], roll_in[nodes], tree.pi_ref[nodes])
        tokens[:, place] = (rng.random(count)[:, None] > policy.cumsum(axis=1)).sum(axis=1)
        nodes = tree.first_child[nodes] + tokens[:, place]
    return [
        Rollout("p", 2, [BOS], (path + 1).tolist(), int(switch), reward, True, 0.3, 0, "")
        for path, switch, reward in zip(tokens, switches, tree.reward[nodes].tolist(), strict=True)
    ]


def exact_probabilities(tree):
    """For every sequence of tokens: the probability of reward 1 when pi_ref finishes it."""
    laws, found = tabular.Laws(tree), {}
    todo = [(0, ())]
    while todo:
        node, tokens = todo.pop()
        if tree.first_child[node] >= 0:
            for token in range(BRANCHES):
                values, probabilities = laws(node, token)
                found[(*tokens, token)] = float(probabilities[values == 1].sum())
                todo.append((tree.first_child[node] + token, (*tokens, token)))
    return found


def fitted_probabilities(rollouts, folder):
    """The guide's P(reward 1) after every sequence of tokens, fitted to rollouts as a run would."""
    model = helpers.random_model(BRANCHES + 1, max_positions=8, positions="learned", layers=2)
    config = ValueConfig(model.config)
    batches = Batches([from_rollout(rollout) for rollout in rollouts], rows=256, bucket=4, seed=0)
    steps = 400
    settings = helpers.optimizer_config(
        learning_rate=0.01, weight_decay=0.0, schedule="cosine", end_fraction=0.01, clip=1.0
    )
    optimizer = train.make_optimizer(settings)
    state = train.fit(
        train.init_state(value.init(jax.random.key(0), config, model.params), optimizer), batches, optimizer=optimizer,
        loss_fn=functools.partial(train.value_loss, config=config), checkpoints=Checkpoints(folder),
        schedule=train.make_schedule(settings, steps), loop=train.Loop(
            total_steps=steps, log_every=100, save_every=10**6, name="toy", log=lambda line: None
        ),
    )  # fmt: skip
    leaves = list(itertools.product(range(BRANCHES), repeat=DEPTH))
    batch = make_batch([Example([BOS], [t + 1 for t in leaf]) for leaf in leaves], rows=len(leaves), width=4)
    outputs, _ = value.forward(state.params, config, batch.tokens, batch.segments, batch.positions)
    p = 1 / (1 + np.exp(-np.asarray(outputs)[..., 0]))
    return {leaf[:length]: float(row[length]) for leaf, row in zip(leaves, p) for length in range(1, DEPTH + 1)}


def test_the_fitted_guide_gives_the_rewards_law_under_pi_ref(tmp_path):
    """Algorithm 1 on a token tree: Z(x, y) = P(reward 1 | pi_ref finishes), though a tilted policy rolled in.

    20,000 rollouts of a round 2. Every prefix that 200 of them reach is within 0.1, all of them within 0.03 on average;
    labels on all the roll-in's tokens would be off by more than 0.2, which is what the switch is recorded for.
    """
    tree = tabular.random_tree(np.random.default_rng(8), vocab=BRANCHES, depth=DEPTH, stop=0.0)
    exact = exact_probabilities(tree)
    _, _, tilted = tabular.soft_bellman(tree, eta=0.3)
    rollouts = tree_rollouts(tree, tilted, 20_000, np.random.default_rng(0))

    labelled, everywhere = {}, {}
    for rollout in rollouts:
        for length in range(1, DEPTH + 1):
            prefix = tuple(token - 1 for token in rollout.response_tokens[:length])
            everywhere.setdefault(prefix, []).append(rollout.reward)
            if length > rollout.first_label:
                labelled.setdefault(prefix, []).append(rollout.reward)
    often = [prefix for prefix, rewards in labelled.items() if len(rewards) >= 200]
    assert len(often) > 20
    naive = {prefix: np.mean(rewards) for prefix, rewards in everywhere.items()}
    assert max(abs(naive[prefix] - exact[prefix]) for prefix in often) > 0.2

    fitted = fitted_probabilities(rollouts, tmp_path)
    errors = [abs(fitted[prefix] - exact[prefix]) for prefix in often]
    assert max(errors) < 0.1 and np.mean(errors) < 0.03
