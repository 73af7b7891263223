"""Your own prompts and reward with a pretrained model. `qsharp run` takes this recipe where it is given no other.

    qsharp run --ref DIR --prompts prompts.jsonl --reward rewards.py:short --workdir runs/short

What fits the model's size, the prompts and the device (the guide's layers, rows, learning rate, prompt format) is set
by `run/fitting.py` and printed.
"""

from ml_collections import ConfigDict

from qsharp_jax.run.schema import default_config


def get_config() -> ConfigDict:
    c = default_config()
    del c.model, c.pretrain  # nothing is made on the spot
    c.ref = "--ref"  # a model's folder
    c.task.name = "own"  # the settings are explained in qsharp_jax/tasks/own.py
    c.task.file = ""
    c.task.prompts = ""
    c.task.rewards = ("",)
    c.task.weights = (1.0,)
    c.task.reward_workers = -1
    c.task.reward_seconds = 60.0
    c.task.most_failures = 0.1

    c.value.distribution = "auto"
    c.generate.max_new_tokens = 128
    c.generate.prompt_bucket = 32
    c.collect.prompts = 400  # at most, in every round the same; the run prints how many there are
    c.collect.shard_rows = 200

    c.fit.epochs = 3
    c.fit.holdout = 0.1
    c.fit.evaluate_every = 50
    c.fit.patience = 4
    c.fit.length_bucket = 64
    c.fit.clip_rewards = True  # later rounds may leave the range of the first
    c.fit.optimizer.name = "adamw"
    c.fit.optimizer.b2 = 0.99
    c.fit.optimizer.warmup_steps = 20
    c.fit.log_every = 10
    c.policy.optimizer.warmup_steps = 5  # of the few updates that so many rollouts give

    c.evaluate.problems = 100  # at most
    c.evaluate.samples = 4
    return c
