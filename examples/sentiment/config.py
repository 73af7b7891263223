"""SmolLM2-135M-Instruct and its first five layers as the guide, on the openings of `task.py`; two CPU cores.

    qsharp run --config examples/sentiment/config.py --config.ref=MODEL --workdir runs/sentiment

MODEL is a folder, a GGUF file, or HuggingFaceTB/SmolLM2-135M-Instruct. The reward is VADER's compound score, a number
in [-1, 1], and Z categorical. With `--config.collect.samples=32`, twice the rollouts, the same KL gives 0.045 more.
"""

from pathlib import Path

from ml_collections import ConfigDict

from qsharp_jax.configs import own


def get_config() -> ConfigDict:
    c = own.get_config()
    c.rounds = 1
    c.dtype = "float32"
    c.prompt_format = "plain"
    c.task.file = str(Path(__file__).absolute().with_name("task.py"))
    c.task.rewards, c.task.weights = (), ()
    c.value.layers = 5

    c.generate.temperature, c.generate.top_p = 0.8, 0.9
    c.generate.max_new_tokens = 32
    c.generate.prompt_bucket = 16
    c.collect.prompts, c.collect.samples = 240, 16  # all prompts for training
    c.collect.batch_size = c.evaluate.batch_size = 64

    c.fit.optimizer.learning_rate = 1e-3
    c.fit.optimizer.b2 = 0.99
    c.fit.optimizer.warmup_steps = 20
    c.fit.epochs = 2
    c.fit.pack_length, c.fit.batch_size = 256, 8  # some 50 rollouts a step
    c.fit.evaluate_every = 50
    c.fit.remat = "none"

    c.evaluate.problems = 144  # all prompts for the test
    c.evaluate.guided_samples = 2
    c.evaluate.etas = (0.5, 0.2, 0.1)
    return c
