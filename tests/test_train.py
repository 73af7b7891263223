"""Losses against numpy in float64, the optimiser's groups, and a loop that resumes as if it had never stopped."""

import functools
import itertools
import logging
import math
from types import SimpleNamespace

import flax.struct
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import tabular
from helpers import assert_trees_equal

from qsharp_jax import dataset, train
from qsharp_jax.algorithms import qsharp
from qsharp_jax.checkpoint import Checkpoints
from qsharp_jax.dataset import Batches, Example, Rollout
from qsharp_jax.errors import UserError
from qsharp_jax.models import decoder, value
from qsharp_jax.models.value import ValueConfig

V = 11
LM = helpers.random_model(V, seed=5, max_positions=64)


def make_optimizer_config(name="adamw", **changes):
    defaults = dict(
        name=name, learning_rate=0.02, adam_learning_rate=0.005, weight_decay=0.1, b2=0.98, clip=math.inf,
        warmup_steps=0, schedule="constant", end_fraction=0.1,
    )  # fmt: skip
    return SimpleNamespace(**defaults | changes)


def make_examples(rng, count=4, longest=5, rewards=(0.0, 1.0)):
    """Random sequences with labels from a random place on."""
    examples = []
    for _ in range(count):
        prompt, response = rng.integers(1, longest + 1, size=2)
        examples.append(
            Example(
                rng.integers(1, V, prompt).tolist(),
                rng.integers(1, V, response).tolist(),
                reward=float(rng.choice(rewards)),
                first_label=int(rng.integers(response)),
            )
        )
    return examples


def log_softmax(x):
    x = np.float64(x)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# --- The guide's loss -----------------------------------------------------------------------------------------------

ATOMS = (-1.0, 0.0, 0.25, 2.0)
REWARDS = {"bernoulli": (0.0, 1.0), "categorical": (-1.0, 0.0, 0.2, 1.3, 2.0), "scalar": (-3.0, 0.5, 7.0)}


def outputs_by_hand(guide, batch):
    """The head's outputs of every token, [B, T, M]: read at the token (V) or, in its own columns, before it (Q)."""
    config, params = guide.config, guide.params
    hidden, _ = decoder.forward(params["trunk"], config.trunk, batch.tokens, batch.segments, batch.positions)
    hidden, kernel, bias = (np.float64(x) for x in (hidden, params["head"]["kernel"], params["head"]["bias"]))
    if config.type == "v":
        return hidden @ kernel + bias
    outputs = np.zeros((*batch.tokens.shape, config.outputs))
    for row, place in itertools.product(*map(range, batch.tokens.shape)):
        if place:  # a row's first token has none
            columns = slice(batch.tokens[row, place] * config.outputs, (batch.tokens[row, place] + 1) * config.outputs)
            outputs[row, place] = hidden[row, place - 1] @ kernel[:, columns] + bias[columns]
    return outputs


def nll_by_hand(kind, outputs, reward):
    """One token's negative log-likelihood, and its mean."""
    if kind == "bernoulli":
        p = 1 / (1 + math.exp(-outputs[0]))
        return -math.log(p if reward == 1 else 1 - p), p
    if kind == "scalar":
        return (outputs[0] - reward) ** 2 / 2, outputs[0]
    log_p, upper = log_softmax(outputs), max(1, np.searchsorted(ATOMS, reward))
    share = (reward - ATOMS[upper - 1]) / (ATOMS[upper] - ATOMS[upper - 1])
    return -(1 - share) * log_p[upper - 1] - share * log_p[upper], np.exp(log_p) @ ATOMS


def nll_of_labels(kind, outputs, batch):
    """Mean negative log-likelihood, and mean squared error of the mean, over labelled tokens one by one."""
    found = []
    for place in zip(*np.nonzero(batch.label_mask)):
        reward = float(batch.reward_to_go[place])
        nll, mean = nll_by_hand(kind, np.float64(outputs[place]), reward)
        found.append((nll, (mean - reward) ** 2))
    return np.mean(found, axis=0)


def make_guide(type, kind):
    return helpers.random_guide(LM.config, type=type, distribution=kind, atoms=ATOMS if kind == "categorical" else ())


@functools.cache
def jitted_value_loss(config):
    loss = functools.partial(train.value_loss, config=config)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("kind", REWARDS)
def test_value_loss_is_the_mean_nll_of_labelled_tokens(monkeypatch, kind):
    """Over all labelled tokens of the batch alike, whatever the head put out; a row of padding is no row."""
    rng = np.random.default_rng(1)
    batch = dataset.make_batch(make_examples(rng, rewards=REWARDS[kind]), rows=5, width=10)
    config = make_guide("v", kind).config
    outputs = np.float32(3 * rng.normal(size=(5, 10, config.outputs)))
    monkeypatch.setattr(value, "forward", lambda *arguments: (jnp.asarray(outputs), None))
    loss, metrics = jax.jit(functools.partial(train.value_loss, config=config))({}, batch)
    nll, brier = nll_of_labels(kind, outputs, batch)
    np.testing.assert_allclose([loss, metrics["nll"], metrics["brier"]], [nll, nll, brier], rtol=1e-5)


@pytest.mark.parametrize(("type", "kind"), [("v", "bernoulli"), ("q", "categorical")])
def test_the_value_of_a_token_is_read_where_it_belongs(type, kind):
    """The same through the model: V-type at the token itself, Q-type before it, in the token's own columns."""
    guide = make_guide(type, kind)
    batch = dataset.make_batch(make_examples(np.random.default_rng(1), rewards=REWARDS[kind]), rows=5, width=10)
    (loss, _), _ = jitted_value_loss(guide.config)(guide.params, batch)
    np.testing.assert_allclose(loss, nll_of_labels(kind, outputs_by_hand(guide, batch), batch)[0], rtol=2e-5)


@pytest.mark.parametrize(("type", "kind"), [("v", "bernoulli"), ("q", "categorical")])
def test_tokens_without_a_label_and_padding_change_nothing(type, kind):
    """Neither the reward-to-go that stands there, nor the padding's tokens: loss and gradient are the same bits."""
    guide = make_guide(type, kind)
    rng = np.random.default_rng(2)
    batch = dataset.make_batch(make_examples(rng, rewards=REWARDS[kind]), rows=5, width=10)
    other = batch.replace(
        reward_to_go=np.where(batch.label_mask, batch.reward_to_go, rng.choice(REWARDS[kind], batch.tokens.shape)),
        tokens=np.where(batch.segments > 0, batch.tokens, rng.integers(1, V, batch.tokens.shape)),
        positions=np.where(batch.segments > 0, batch.positions, 3),
    )
    assert (other.reward_to_go[batch.response_mask] != batch.reward_to_go[batch.response_mask]).any()
    step = jitted_value_loss(guide.config)
    (loss, _), gradient = step(guide.params, batch)
    (other_loss, _), other_gradient = step(guide.params, jax.tree.map(jnp.asarray, other))
    assert float(loss) == float(other_loss)
    assert_trees_equal(other_gradient, gradient)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))  # and everything learns


def test_a_batch_without_labels_has_loss_and_gradient_zero():
    guide = make_guide("v", "bernoulli")
    batch = dataset.make_batch([], rows=5, width=10)
    (loss, _), gradient = jitted_value_loss(guide.config)(guide.params, batch)
    assert loss == 0 and not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_rewards_that_the_guide_cannot_learn_are_refused_before_training():
    """Inside jit a reward out of range would be clipped in silence."""
    bernoulli, categorical, scalar = (make_guide("v", kind).config for kind in REWARDS)
    train.check_rewards(np.asarray([0, 1, 0.5]), bernoulli, clip=False)
    train.check_rewards(np.asarray([-1.0, 2.0]), categorical, clip=False)
    train.check_rewards(np.asarray([-1e9]), scalar, clip=False)
    train.check_rewards(np.asarray([3.0]), categorical, clip=True)
    for rewards, config, clip in [([0, 2], bernoulli, False), ([0, 2], bernoulli, True), ([3], categorical, False)]:
        with pytest.raises(UserError, match=f"{config.distribution} guide cannot learn.*reward {rewards[-1]} "):
            train.check_rewards(np.asarray(rewards, float), config, clip=clip)
    with pytest.raises(UserError, match="nan"):
        train.check_rewards(np.asarray([np.nan]), bernoulli, clip=False)


def test_masked_mean():
    """Of the true entries alone, with nan elsewhere, and 0 where there is none; the gradient too."""
    x, mask = jnp.asarray([[1.0, jnp.nan], [4.0, 2.5]]), jnp.asarray([[True, False], [True, False]])
    assert train.masked_mean(x, mask) == 2.5
    assert jax.grad(train.masked_mean)(x, mask).tolist() == [[0.5, 0], [0.5, 0]]
    assert train.masked_mean(x, jnp.zeros_like(mask)) == 0
    assert not jax.grad(train.masked_mean)(x, jnp.zeros_like(mask)).any()


# --- The language model's losses ------------------------------------------------------------------------------------


def test_language_model_loss_is_cross_entropy_of_response_tokens():
    """Each response token, the stop token and the first one among them, from the hidden state before it."""
    batch = dataset.make_batch(make_examples(np.random.default_rng(4)), rows=5, width=10)
    loss, metrics = jax.jit(functools.partial(train.language_model_loss, config=LM.config))(LM.params, batch)
    hidden, _ = decoder.forward(LM.params, LM.config, batch.tokens, batch.segments, batch.positions)
    log_p = log_softmax(np.float64(hidden) @ np.float64(LM.params["head"]))
    places = list(zip(*np.nonzero(batch.response_mask)))
    tokens = [batch.tokens[row, place] for row, place in places]
    before = [log_p[row, place - 1] for row, place in places]
    np.testing.assert_allclose(loss, -np.mean([p[token] for p, token in zip(before, tokens)]), rtol=2e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean([p.argmax() == t for p, t in zip(before, tokens)]))


@pytest.mark.parametrize("offsets", [1, 3, 12])  # 12: further than the batch is wide
def test_future_token_loss_predicts_later_response_tokens_of_successes(offsets):
    """From every response token of a rewarded response, each of the next F tokens that it has; nothing else."""
    rng = np.random.default_rng(6)
    examples = [
        Example([1, 2], [3, 4, 5, 6, 7], reward=1.0),
        Example([1], [8, 9, 10], reward=0.0),
        Example([3, 3, 3], [4, 1], reward=0.5, first_label=1),
        Example([5], [2], reward=1.0),  # nothing comes later
        Example([5], [6, 7], reward=-1.0),
    ]
    batch = dataset.make_batch(examples, rows=6, width=8)
    hidden, heads = rng.normal(size=(6, 8, 4)), rng.normal(size=(offsets, 4, V))
    losses = []
    for row, example in enumerate(examples):
        for place, offset in itertools.product(range(len(example.response)), range(1, offsets + 1)):
            if example.reward > 0 and place + offset < len(example.response):
                log_p = log_softmax(hidden[row, len(example.prompt) + place] @ heads[offset - 1])
                losses.append(-log_p[example.response[place + offset]])
    assert len(losses) == {1: 4 + 1, 3: 4 + 3 + 2 + 1, 12: 4 + 3 + 2 + 1 + 1}[offsets]
    loss = jax.jit(train.future_token_loss)(jnp.float32(heads), jnp.float32(hidden), batch)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


def test_without_a_success_there_is_nothing_to_predict():
    batch = dataset.make_batch([Example([1], [2, 3, 4], reward=0.0)], rows=1, width=5)
    heads, hidden = jnp.ones((2, 3, V)), jnp.ones((1, 5, 3))
    loss, gradient = jax.jit(jax.value_and_grad(train.future_token_loss, (0, 1)))(heads, hidden, batch)
    assert loss == 0 and not any(leaf.any() for leaf in gradient)


def test_the_auxiliary_loss_is_added_with_its_weight(monkeypatch):
    """From the same hidden states as the value, which learn from both."""
    rng = np.random.default_rng(1)
    batch = dataset.make_batch(make_examples(rng), rows=5, width=10)
    config = make_guide("v", "bernoulli").config
    # A "model" whose trunk is the hidden states themselves.
    monkeypatch.setattr(value, "forward", lambda params, *rest: (params["trunk"] @ params["head"], params["trunk"]))
    params = {"trunk": jnp.float32(rng.normal(size=(5, 10, 32))), "head": jnp.float32(rng.normal(size=(32, 1)))}
    future = jnp.float32(rng.normal(size=(2, 32, V)))

    def loss(params, **options):
        return train.value_loss(params, batch, config=config, **options)

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    grad_both = jax.jit(jax.value_and_grad(functools.partial(loss, future_weight=0.3), has_aux=True))
    (nll, _), by_nll = grad(params)
    (both, metrics), by_both = grad_both(params | {"future": future})
    grad_auxiliary = jax.jit(jax.value_and_grad(train.future_token_loss, (0, 1)))
    auxiliary, by_auxiliary = grad_auxiliary(future, params["trunk"], batch)
    np.testing.assert_allclose(both, nll + 0.3 * auxiliary, rtol=1e-6)
    np.testing.assert_allclose([metrics["nll"], metrics["future_nll"]], [nll, auxiliary], rtol=1e-6)
    np.testing.assert_allclose(by_both["future"], 0.3 * by_auxiliary[0], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(by_both["trunk"], by_nll["trunk"] + 0.3 * by_auxiliary[1], rtol=1e-4, atol=1e-8)


# --- The optimiser --------------------------------------------------------------------------------------------------


def names_of(tree):
    """The leaves by their path, as "lm/layers/up/kernel"."""
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def all_parameters():
    """One tree with every kind of parameter that the program trains, all far from zero."""
    everything = dict(bias=True, qk_norm=True, token_shift=True, positions="learned", norm="layer", layers=2)
    config = helpers.random_model(V, **everything).config

    def init(key):
        head = value.init(key, ValueConfig(config, type="q"))["head"]
        return {"lm": decoder.init(key, config), "guide": {"head": head}, "future": train.init_future(key, 2, config)}

    shapes, rng = jax.eval_shape(init, jax.random.key(0)), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.float32(1 + rng.random(leaf.shape)), shapes)


def first_update(optimizer, gradients, params):
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(gradients, params)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_shrinks_matrices_alone(name):
    """With gradient zero, a step takes learning rate * decay of each matrix, and leaves norms and biases as they are."""
    params = all_parameters()
    config = make_optimizer_config(name)
    optimizer = train.make_optimizer(config, 10)
    updates = first_update(optimizer, jax.tree.map(np.zeros_like, params), params)
    kept = set()
    for path, update in names_of(updates).items():
        if path.rpartition("/")[2] in ("bias", "scale", "token_shift"):
            assert not np.asarray(update).any(), f"{path} decays"
            kept.add(path.rpartition("/")[2])
        else:
            blocks = name == "muon" and "layers/" in path
            rate = config.learning_rate if blocks or name == "adamw" else config.adam_learning_rate
            np.testing.assert_allclose(
                update, -rate * config.weight_decay * names_of(params)[path], rtol=1e-5, err_msg=path
            )
    assert kept == {"bias", "scale", "token_shift"}


def test_muon_treats_each_layers_matrix_on_its_own():
    """Three steps on a stacked tree equal optax's Muon on each layer's 2-D matrices, wide and tall ones."""
    rng = np.random.default_rng(0)
    shapes = {"query": (3, 6, 6), "up": (3, 6, 16), "down": (3, 16, 6)}

    def draw():
        return {name: {"kernel": np.float32(rng.normal(size=shape))} for name, shape in shapes.items()}

    def train_on(optimizer, params, gradients):
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    params, gradients = draw(), [draw() for _ in range(3)]
    config = make_optimizer_config("muon")
    stacked = jax.jit(functools.partial(train_on, train.make_optimizer(config, 10)))(
        {"layers": params}, [{"layers": gradient} for gradient in gradients]
    )
    plain = jax.jit(
        functools.partial(train_on, optax.contrib.muon(config.learning_rate, weight_decay=config.weight_decay))
    )
    alone = [plain(*jax.tree.map(lambda leaf, i=i: leaf[i], (params, gradients))) for i in range(3)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), stacked["layers"], expected)


def test_muon_is_for_the_blocks_matrices_and_adamw_for_the_rest():
    """A step on a block's matrix has singular values near one rate; all else moves by the other, each entry alike."""
    params = all_parameters()
    config = make_optimizer_config("muon", weight_decay=0.0)
    optimizer = train.make_optimizer(config, 10)
    rng = np.random.default_rng(1)
    gradients = jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape)), params)
    updates = first_update(optimizer, gradients, params)
    seen = 0
    for path, update in names_of(updates).items():
        gradient = names_of(gradients)[path]
        if "layers/" in path and path.endswith("kernel"):
            scale = config.learning_rate * math.sqrt(max(1, update.shape[2] / update.shape[1]))
            singular = np.linalg.svd(update, compute_uv=False) / scale
            assert 0.7 < np.median(singular) and singular.max() < 1.3, path
            seen += 1
        else:  # Adam's first step, Nesterov's correction included
            np.testing.assert_allclose(np.abs(update), np.abs(update).max(), rtol=1e-3, err_msg=path)
            assert config.adam_learning_rate <= np.abs(update).max() <= 1.5 * config.adam_learning_rate, path
        assert (np.sum(update * gradient)) < 0, path
    assert seen == 7  # query, key, value, output, up, gate, down


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_gradient_is_clipped_by_its_global_norm(name):
    """Scaled as one vector: with clip 1, a gradient of norm 1000 is the same as one of norm 1."""
    params = {"layers": {"up": {"kernel": jnp.ones((1, 3, 4))}}, "embedding": jnp.ones((2, 3))}
    gradient = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape), params)
    unit = jax.tree.map(lambda leaf: leaf / optax.tree.norm(gradient), gradient)
    optimizer = train.make_optimizer(make_optimizer_config(name, clip=1.0), 10)
    state_after = jax.jit(lambda g: optimizer.update(g, optimizer.init(params), params)[1])
    big, small = state_after(jax.tree.map(lambda leaf: 1000 * leaf, unit)), state_after(unit)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-12), big, small)


def test_schedules_by_closed_form():
    """Linear warm-up from 0; then 1, or half a cosine that ends at `end_fraction` at the last step and stays there."""
    total, warmup, end = 100, 20, 0.05

    def course(**changes):
        config = make_optimizer_config(**{"warmup_steps": warmup, "end_fraction": end} | changes)
        return np.asarray([train.make_schedule(config, total)(step) for step in range(total + 10)])

    steps = np.arange(total + 10)
    constant = np.minimum(steps / warmup, 1)
    share = np.clip((steps - warmup) / (total - warmup), 0, 1)
    cosine = np.where(steps < warmup, constant, end + (1 - end) * (1 + np.cos(np.pi * share)) / 2)
    np.testing.assert_allclose(course(schedule="constant"), constant, atol=1e-6)
    np.testing.assert_allclose(course(schedule="cosine"), cosine, atol=1e-6)
    np.testing.assert_allclose(course(schedule="constant", warmup_steps=0), 1)
    without = course(schedule="cosine", warmup_steps=0)
    np.testing.assert_allclose(without[[0, total // 2, total]], [1, (1 + end) / 2, end], atol=1e-6)
    assert np.isfinite(course(schedule="cosine", warmup_steps=2 * total)).all()  # never past the warm-up


# --- Step and loop --------------------------------------------------------------------------------------------------


class Numbers:
    """A batch source of plain numbers for toy losses: the batch of a step is the step. Counts what it was asked."""

    def __init__(self, ending=None):
        self.asked, self.ending = [], ending

    def __getitem__(self, step):
        if step == self.ending:
            raise KeyboardInterrupt
        self.asked.append(step)
        return SimpleBatch(jnp.float32(step), np.ones((1, 3), np.int32))


@flax.struct.dataclass
class SimpleBatch:
    step: jax.Array
    segments: np.ndarray


SGD = optax.sgd(0.1)


def toy_loss(params, batch):
    return jnp.sum((params["x"] - batch.step) ** 2), {"accuracy": batch.step / 10}


def toy_state():
    return train.init_state({"x": jnp.zeros(2)}, SGD)


def make_loop(lines=None, **changes):
    log = (lambda line: None) if lines is None else lines.append
    return train.Loop(**dict(total_steps=20, log_every=5, save_every=4, name="toy", log=log) | changes)


def toy_fit(folder, batches=None, loss_fn=toy_loss, lines=None, **changes):
    return train.fit(
        toy_state(), Numbers() if batches is None else batches, loss_fn=loss_fn, optimizer=SGD,
        checkpoints=Checkpoints(folder), loop=make_loop(lines, **changes),
    )  # fmt: skip


def test_init_state_copies(tmp_path):
    """The caller's arrays, often pi_ref's own, are whole after the state was donated, step after step."""
    params = {"x": jnp.arange(4.0)}
    optimizer = optax.adam(0.1)
    state = train.init_state(params, optimizer)
    train.fit(
        state, Numbers(), loss_fn=toy_loss, optimizer=optimizer, checkpoints=Checkpoints(tmp_path), loop=make_loop()
    )
    assert not params["x"].is_deleted() and params["x"].tolist() == [0, 1, 2, 3]
    assert state.params["x"].is_deleted()  # it was donated: nothing is held twice


def bag_params():
    """A small model with every group of the optimiser: Muon's matrices, decayed ones, and a bias."""
    rng = np.random.default_rng(0)
    shapes = {"embedding": (V, 8), "layers": {"up": {"kernel": (2, 8, 8)}}, "head": {"kernel": (8, 1), "bias": (1,)}}
    return jax.tree.map(lambda shape: jnp.float32(rng.normal(size=shape)), shapes, is_leaf=lambda x: type(x) is tuple)


def bag_loss(params, batch):
    x = params["embedding"][batch.tokens]
    for kernel in params["layers"]["up"]["kernel"]:
        x = x + jnp.tanh(x @ kernel)
    logits = (x @ params["head"]["kernel"] + params["head"]["bias"])[..., 0]
    return train.masked_mean(optax.sigmoid_binary_cross_entropy(logits, batch.reward_to_go), batch.label_mask), {}


def bag_fit(folder, batches, name="muon", **changes):
    config = make_optimizer_config(name, warmup_steps=3, schedule="cosine", clip=1.0)
    optimizer = train.make_optimizer(config, 20)
    return train.fit(
        train.init_state(bag_params(), optimizer), batches, loss_fn=bag_loss, optimizer=optimizer,
        checkpoints=Checkpoints(folder), loop=make_loop(**changes),
    )  # fmt: skip


def test_the_step_compiles_once_for_a_shape(tmp_path, caplog):
    """Steps on two widths compile two programs, from fresh parameters and from a checkpoint alike."""
    examples = [Example([1] * length, [2, 3], 1.0) for length in (2, 2, 2, 12, 12, 12)]
    batches = Batches(examples, rows=1, bucket=8, seed=0)

    def compiled():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return sum("Finished XLA compilation of jit(train_step)" in message for message in messages)

    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        with pytest.raises(Killed):
            bag_fit(tmp_path, killed_at(10, batches), "adamw")
        assert compiled() == 2
        bag_fit(tmp_path, batches, "adamw")
        assert compiled() == 2


class Killed(Exception):
    pass


class killed_at:
    """Batches that end a training at a step, as a kill would."""

    def __init__(self, step, batches):
        self._step, self._batches = step, batches

    def __getitem__(self, step):
        if step == self._step:
            raise Killed
        return self._batches[step]


def test_a_training_that_was_stopped_ends_bit_for_bit_the_same(tmp_path):
    """20 steps at once, or killed at step 11 and started again: the same parameters and moments, over three epochs."""
    batches = Batches(make_examples(np.random.default_rng(0), count=14), rows=2, bucket=12, seed=1)
    assert 20 > 2 * batches.steps_per_epoch
    straight = bag_fit(tmp_path / "straight", batches)
    with pytest.raises(Killed):
        bag_fit(tmp_path / "stopped", killed_at(11, batches))
    assert int(Checkpoints(tmp_path / "stopped").restore(straight).step) == 8
    resumed = bag_fit(tmp_path / "stopped", batches)
    assert int(resumed.step) == 20
    assert_trees_equal(resumed, straight)
    assert_trees_equal(Checkpoints(tmp_path / "stopped").restore(straight), straight)
    assert_trees_equal(Checkpoints(tmp_path / "stopped").restore_params(straight.params), straight.params)
    for leaf, before in zip(jax.tree.leaves(straight.params), jax.tree.leaves(bag_params()), strict=True):
        assert np.abs(leaf - before).max() > 0.01  # all of them have learned


def test_a_resumed_training_asks_for_the_steps_that_are_left(tmp_path):
    """The position in the data is the step."""
    with pytest.raises(KeyboardInterrupt):
        toy_fit(tmp_path, Numbers(ending=11))
    batches = Numbers()
    toy_fit(tmp_path, batches)
    assert batches.asked == list(range(8, 20))


def test_a_finished_training_returns_at_once(tmp_path):
    state = toy_fit(tmp_path)
    batches, lines = Numbers(ending=0), []
    again = toy_fit(tmp_path, batches, lines=lines, total_steps=30)
    assert_trees_equal(again, state)
    assert not batches.asked and not lines


def test_the_update_is_the_optimisers(tmp_path):
    """SGD by hand: x <- x - 0.1 * 2 (x - step)."""
    x = 0.0
    for step in range(20):
        x -= 0.1 * 2 * (x - step)
    np.testing.assert_allclose(toy_fit(tmp_path).params["x"], [x, x], rtol=1e-5)


def test_metrics_lines(tmp_path):
    """At every log and save and at the end: means since the last line, by name; then what was measured at the end."""
    lines = []
    toy_fit(tmp_path, lines=lines, total_steps=11, measure=lambda params: {"brier": float(params["x"][0])})
    steps = [line["step"] for line in lines]
    assert steps == [4, 5, 8, 10, 11, 11]
    required = {"phase", "step", "loss", "gradient_norm", "accuracy", "tokens_per_second"}
    assert all(required <= set(line) <= required | {"peak_bytes"} for line in lines[:-1])
    x, expected = 0.0, []
    for step in range(11):
        expected.append((2 * (x - step) ** 2, 2 * abs(x - step) * math.sqrt(2), step / 10))
        x -= 0.1 * 2 * (x - step)
    for first, line in zip([0, *steps], lines[:-1]):
        loss, norm, accuracy = np.mean(expected[first : line["step"]], axis=0)
        found = [line["loss"], line["gradient_norm"], line["accuracy"]]
        np.testing.assert_allclose(found, [loss, norm, accuracy], rtol=1e-4)
        assert line["phase"] == "toy" and line["tokens_per_second"] > 0
    np.testing.assert_allclose(lines[-1].pop("brier"), x, rtol=1e-5)
    assert lines[-1] == {"phase": "toy", "step": 11}


def bad_from(step, what):
    """A loss that goes wrong at a step: nan itself, or finite with a gradient that is nan."""

    def loss_fn(params, batch):
        loss, metrics = toy_loss(params, batch)
        if what == "loss":
            return jnp.where(batch.step >= step, jnp.nan, loss), metrics
        # sqrt has an infinite slope at 0, and 0 * inf is nan.
        return loss + 0 * jnp.sqrt(jnp.where(batch.step >= step, 0.0, 1.0) + 0 * jnp.sum(params["x"])), metrics

    return loss_fn


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(("step", "seen"), [(6, 8), (7, 8), (8, 10), (19, 20)])
def test_a_loss_that_is_not_finite_stops_and_the_last_good_checkpoint_stays(tmp_path, what, step, seen):
    """With the phase, the step and what to do; also where the last step before saving is the first bad one."""
    with pytest.raises(UserError) as caught:
        toy_fit(tmp_path, loss_fn=bad_from(step, what), name="round 2: fit")
    message = str(caught.value)
    assert "round 2: fit" in message and f"step {seen}" in message and "learning rate" in message
    kept = Checkpoints(tmp_path)
    state = kept.restore(toy_state())
    assert int(state.step) == step // 4 * 4 and np.isfinite(state.params["x"]).all() and not kept.finished()
    assert int(toy_fit(tmp_path).step) == 20  # and training goes on from it


def test_training_stops_early_when_told_to(tmp_path):
    """Asked at every line with its averages; then it is finished, and is not taken up again."""
    asked = []

    def stop(means):
        asked.append(means["accuracy"])
        return means["accuracy"] > 0.55

    state = toy_fit(tmp_path, stop=stop)
    assert int(state.step) == 8
    np.testing.assert_allclose(asked, [0.15, 0.4, 0.6], rtol=1e-5)  # steps 0 to 3, 4, and 5 to 7
    batches = Numbers()
    assert int(toy_fit(tmp_path, batches, stop=stop).step) == 8 and not batches.asked


# --- What is learned ------------------------------------------------------------------------------------------------

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
    model = helpers.random_model(BRANCHES + 1, max_positions=8)
    config = ValueConfig(model.config)
    batches = Batches([dataset.from_rollout(rollout) for rollout in rollouts], rows=256, bucket=4, seed=0)
    steps = 400
    settings = dict(learning_rate=0.01, weight_decay=0.0, schedule="cosine", end_fraction=0.01, clip=1.0)
    optimizer = train.make_optimizer(make_optimizer_config(**settings), steps)
    state = train.fit(
        train.init_state(value.init(jax.random.key(0), config, model.params), optimizer), batches, optimizer=optimizer,
        loss_fn=functools.partial(train.value_loss, config=config), checkpoints=Checkpoints(folder),
        loop=make_loop(total_steps=steps, log_every=100, save_every=10**6),
    )  # fmt: skip
    leaves = list(itertools.product(range(BRANCHES), repeat=DEPTH))
    batch = dataset.make_batch([Example([BOS], [t + 1 for t in leaf]) for leaf in leaves], rows=len(leaves), width=4)
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


# --- A run's fit ----------------------------------------------------------------------------------------------------


def write_rollouts(session, number, prompts=30):
    """Rollouts of fixed length whose reward is told by their first token."""
    rng = np.random.default_rng(number)
    made = []
    for index in range(prompts):
        response, name = [*rng.integers(3, 9, 4).tolist(), 2], f"p{number}-{index}"
        made.append(Rollout(name, number, [1, 3, 4], response, number - 1, float(response[0] % 2), True, 0.5, 0, ""))
    dataset.write_shard(session.workdir.rollouts(number), 0, made)


def test_the_fit_of_a_run(tmp_path):
    """pi_ref's arrays survive; the guide is fitted to all rounds but held-out prompts, is measured on those, and is
    what is loaded later: without the auxiliary heads, which lie in the checkpoint for resuming alone."""
    session = helpers.session(tmp_path, "fit.future_offsets=2")
    ref = helpers.random_model(session.text.vocab_size)
    before = jax.tree.map(np.array, ref.params)
    for number in (1, 2):
        write_rollouts(session, number)
    data = qsharp.aggregate(session, 2)
    guide = qsharp.fit(session, 2, ref, data)
    assert_trees_equal(jax.tree.map(np.asarray, ref.params), before)
    assert set(guide.params) == {"trunk", "head"} and guide.params["head"]["kernel"].any()
    assert_trees_equal(session.load_guide(2).params, guide.params)

    first, *_, last = session.workdir.read_metrics()
    assert first["phase"] == last["phase"] == "round 2: fit"
    assert {"nll", "brier", "future_nll"} <= set(first)
    assert {"brier", "calibration_error", "ranking"} <= set(last)
    # 60 rollouts less those held out, in batches of 8, twice over.
    assert 2 * math.ceil(40 / 8) <= last["step"] < 2 * math.ceil(60 / 8)
