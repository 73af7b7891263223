"""SmolLM2-135M-Instruct and its first five layers as the guide, on the constraints of `task.py`; two CPU cores.

    qsharp run --config examples/constraints/config.py --config.ref=MODEL --workdir runs/constraints

MODEL is a folder, a GGUF file, or HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from pathlib import Path

from ml_collections import ConfigDict

from qsharp_jax.configs import own


def get_config() -> ConfigDict:
    c = own.get_config()
    c.rounds = 1
    c.dtype = "float32"
    c.prompt_format = "chat"
    c.task.file = str(Path(__file__).absolute().with_name("task.py"))
    c.task.rewards, c.task.weights = (), ()
    c.value.layers = 5
    c.value.distribution = "bernoulli"

    c.generate.temperature, c.generate.top_p = 0.8, 0.9
    c.generate.max_new_tokens = 64
    c.collect.prompts, c.collect.samples = 470, 8  # all prompts for training
    c.collect.batch_size = c.evaluate.batch_size = 64

    # 1e-3 is ten times what fits whole models: few layers have to change much in few steps.
    c.fit.optimizer.learning_rate = 1e-3
    c.fit.optimizer.b2 = 0.99
    c.fit.optimizer.warmup_steps = 20
    c.fit.epochs = 2
    c.fit.pack_length, c.fit.batch_size = 256, 8  # some 26 rollouts a step
    c.fit.evaluate_every = 100
    c.fit.remat = "none"

    c.evaluate.problems = 315  # all prompts for the test
    c.evaluate.etas = (0.1,)
    return c
