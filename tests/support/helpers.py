"""Small parts for the tests of whole runs: a config shrunk to seconds, a reference that has learned something, a guide.

The task is G(2, 3) on 6 nodes: prompts of 16 tokens, and responses of about 4, at most 7, that are sometimes right. The
models' context is 23 tokens, so that they just fit. Compiling takes most of the tests' time: models are of one shape
where they can be, and are drawn by numpy.
"""

import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from repository import CONFIGS

from qsharp_jax import train
from qsharp_jax.data.batches import Batches, Example
from qsharp_jax.models import decoder, value
from qsharp_jax.models.config import DecoderConfig, make
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.run import config as configs
from qsharp_jax.run import models
from qsharp_jax.run.problems import task
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError

ARITHMETIC = CONFIGS / "arithmetic.py"
TINY = dict(embed=32, layers=1, heads=2, kv_heads=2, head_dim=16, mlp=64, max_positions=23)
STAR_GRAPH = dict(name="star_graph", degree=2, path_length=3, num_nodes=6, pretrain_on="paths")


def session(folder, *overrides: str, task=STAR_GRAPH, model=TINY) -> Session:
    """A session in a new or old workdir: configs/arithmetic.py with everything shrunk, then "KEY=VALUE" overrides."""
    small = (
        "generate.max_new_tokens=7", "generate.top_k_candidates=4", "generate.prompt_bucket=24",
        "generate.temperature=1.3",
        "collect.prompts=12", "collect.samples=2", "collect.batch_size=8", "collect.shard_rows=6",
        "fit.epochs=2", "fit.batch_size=8", "fit.length_bucket=24", "fit.holdout=0.2",
        "fit.optimizer.name=adamw", "fit.optimizer.learning_rate=0.003", "fit.optimizer.warmup_steps=2",
        "evaluate.problems=10", "evaluate.samples=3", "evaluate.etas=0.5,0.1", "evaluate.batch_size=8",
    )  # fmt: skip
    config = configs.load(ARITHMETIC, [f"--config.{change}" for change in small])
    with config.unlocked():
        config.task = {**task}
        config.model.update(model)
    configs.override(config, [f"--config.{change}" for change in overrides])
    return Session(Workdir.open(folder, config))


def optimizer_config(name="adamw", **changes):
    """Settings of `train.make_optimizer` and `make_schedule`, without clipping and with a constant rate."""
    defaults = dict(
        name=name, learning_rate=0.02, adam_learning_rate=0.005, weight_decay=0.1, b2=0.98, clip=math.inf,
        warmup_steps=0, schedule="constant", end_fraction=0.1,
    )  # fmt: skip
    return SimpleNamespace(**defaults | changes)


def random_examples(rng, vocab_size=11, count=4, longest=5, rewards=(0.0, 1.0)):
    """Random sequences with labels from a random place on."""
    examples = []
    for _ in range(count):
        prompt, response = rng.integers(1, longest + 1, size=2)
        examples.append(
            Example(
                rng.integers(1, vocab_size, prompt).tolist(),
                rng.integers(1, vocab_size, response).tolist(),
                reward=float(rng.choice(rewards)),
                first_label=int(rng.integers(response)),
            )
        )
    return examples


def random_params(shapes, seed: int):
    """Random parameters of the shapes in a tree: norms near 1, biases near 0, the rest by the width that it reads."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "token_shift"):
            return np.float32(1 + 0.1 * rng.normal(size=leaf.shape))
        if name == "bias":
            return np.float32(0.1 * rng.normal(size=leaf.shape))
        width = leaf.shape[-1 if name in ("embedding", "positions") else -2]
        return np.float32(rng.normal(size=leaf.shape) * width**-0.5)

    return jax.tree.map(jax.numpy.asarray, jax.tree.map_with_path(draw, shapes))


def random_model(vocab_size: int, seed: int = 0, scale: float = 1.0, **changes) -> LanguageModel:
    """A reference with random weights; a large `scale` makes its distributions peaked."""
    config = make("tiny", **{**TINY, "vocab_size": vocab_size, **changes})
    params = random_params(jax.eval_shape(lambda key: decoder.init(key, config), jax.random.key(0)), seed)
    return LanguageModel(params | {"head": params["head"] * scale}, config)


def random_guide(trunk: DecoderConfig, seed: int = 0, scale: float = 1.0, **changes) -> ValueModel:
    """A guide that has learned nothing but does steer: its head is random, not zero."""
    config = ValueConfig(trunk, **changes)
    params = random_params(jax.eval_shape(lambda key: value.init(key, config), jax.random.key(0)), seed)
    head = params["head"] | {"kernel": params["head"]["kernel"] * scale}
    return ValueModel(params | {"head": head}, config)


@functools.cache
def reference() -> LanguageModel:
    """A reference that knows how a response looks and finds the right arm now and then; made once, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        made = session(folder)
        made.workdir.close()
    steps, rows = 100, 32
    texts = task(made).pretraining_texts(made.config.task, steps * rows, seed=0)
    examples = [
        Example(models.tokenizer(made).encode_prompt(prompt), models.tokenizer(made).encode_response(answer))
        for prompt, answer in texts
    ]
    batches = Batches(examples, rows=rows, bucket=24, seed=0)
    with made.config.unlocked():
        made.config.fit.optimizer.update(learning_rate=0.01)
    optimizer = train.make_optimizer(made.config.fit.optimizer)
    schedule = train.make_schedule(made.config.fit.optimizer, steps)
    loss_fn = functools.partial(train.language_model_loss, config=models.ref_config(made))
    step_fn = jax.jit(functools.partial(train.train_step, loss_fn=loss_fn, optimizer=optimizer))
    state = train.init_state(random_model(models.tokenizer(made).vocab_size).params, optimizer)
    for step in range(steps):
        state, _ = step_fn(state, batches[step], schedule(step))
    return LanguageModel(state.params, models.ref_config(made))


def refusal(call: Callable, *arguments, **settings) -> str:
    """The message of the UserError that a call ends with."""
    with pytest.raises(UserError) as error:
        call(*arguments, **settings)
    return str(error.value)


def wrapped_error(error: Exception) -> Exception:
    """The form in which Orbax wraps what TensorStore raises for one array."""
    outer = Exception("Encountered error while reading array index: (slice(0, 2, 1),)")
    outer.__cause__ = error
    return outer


def assert_trees_equal(actual, expected) -> None:
    """The same structure, and the same bits in every leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{name: figure for name, figure in row.items() if name != "seconds"} for row in rows]


def assert_same_rows(actual: list[dict], expected: list[dict], numbers: Sequence[str], atol: float) -> None:
    """The same but for seconds; numbers, which depend on when a response was decoded, by a rounding of float32."""
    for row, other in zip(without_seconds(actual), without_seconds(expected), strict=True):
        for name in numbers:
            np.testing.assert_allclose(*(np.asarray(each.pop(name), float) for each in (row, other)), atol=atol)
        assert row == other
