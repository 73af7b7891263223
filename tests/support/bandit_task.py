"""A task with a known optimum: the first letter of at most two decides the reward, whatever the prompt."""

import types

import helpers
import jax
import numpy as np
from tokenizers import Regex, decoders, pre_tokenizers

from qsharp_jax.data.batches import Example, make_batch
from qsharp_jax.models import decoder
from qsharp_jax.run import config as configs
from qsharp_jax.run import models
from qsharp_jax.tasks import base
from qsharp_jax.tasks.base import Problem

ARMS = {"a": 1.0, "b": 0.7, "c": 0.2, "d": 0.0, "e": 0.0, "f": 0.0}


def problems(config, split, count, seed):
    return [Problem(f"{split}{seed}{index}", "?", "") for index in range(count)]


TASK = types.SimpleNamespace(
    FINITE=False,
    SYMBOLIC=False,
    check=lambda config: None,
    make_tokenizer=lambda config: base.word_level_tokenizer(
        [*ARMS, "?"], pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    ),
    problems=problems,
    parse=lambda response: response[:1] or None,
    reward=lambda problem, response: ARMS.get(response[:1], 0.0),
)
SMALL = (
    "rounds=1", "generate.max_new_tokens=2", "collect.prompts=320", "collect.samples=4", "collect.eta=0.2",
    "collect.batch_size=64", "policy.batch_size=64", "policy.prompts=16", "policy.optimizer.warmup_steps=0",
    "policy.optimizer.learning_rate=0.01",
    "fit.length_bucket=8", "generate.prompt_bucket=8", "evaluate.problems=60", "evaluate.samples=1",
    "evaluate.batch_size=60",
)  # fmt: skip


def session(folder, name, *changes):
    """In a workdir, while the task is among the tasks."""
    return helpers.session(folder, *SMALL, f"algorithm={name}", *changes, task=dict(name="bandit"))


def reference(session):
    return helpers.random_model(models.tokenizer(session).vocab_size, seed=2, scale=0.5)


def exact_objective(session, ref, policy):
    """E reward - eta KL of a policy at the config's temperature, and the best there is, by enumeration."""
    text, temperature = models.tokenizer(session), session.config.generate.temperature
    eta = configs.kl_weight(session.config)
    prompt = text.encode_prompt("?")
    every = np.arange(text.vocab_size)
    batch = make_batch([Example(prompt, [token]) for token in every], len(every), len(prompt) + 1)

    def laws(model):
        """Log-probabilities of the first token [V], and of the second after each first [V, V]."""
        hidden, _ = decoder.forward(model.params, model.config, batch.tokens, batch.segments, batch.positions)
        log_probs = jax.nn.log_softmax(decoder.logits(model.params, model.config, hidden) / temperature)
        return np.float64(log_probs[0, len(prompt) - 1]), np.float64(log_probs[:, -1])

    (first, second), (ref_first, ref_second) = laws(policy), laws(ref)
    ends = np.isin(every, text.stop_ids)[:, None]
    rewards = np.asarray(
        [[TASK.reward(None, text.decode([a] if end else [a, b])) for b in every] for a, end in zip(every, ends)]
    )
    # An end is as if any second token followed, drawn by both alike.
    second, ref_second = np.where(ends, -np.log(len(every)), second), np.where(ends, -np.log(len(every)), ref_second)
    log_ratio = (first - ref_first)[:, None] + second - ref_second
    found = (np.exp(first[:, None] + second) * (rewards - eta * log_ratio)).sum()
    return found, eta * np.log(np.exp(ref_first[:, None] + ref_second + rewards / eta).sum())
