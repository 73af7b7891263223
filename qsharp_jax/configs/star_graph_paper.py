"""The paper's star graphs for an accelerator: a GPT-2-small-sized pi_ref and guide, 50 node ids, correct paths.

Run `star_graph_g2_5.py` and its siblings; this file holds what they share.
"""

from ml_collections import ConfigDict

from qsharp_jax.configs.star_graph import adamw
from qsharp_jax.configs.star_graph import get_config as small


def get_config() -> ConfigDict:
    return graph(degree=2, path_length=5)


def graph(degree: int, path_length: int) -> ConfigDict:
    c = small()
    c.rounds = 2
    c.task.degree = degree
    c.task.path_length = path_length
    c.task.num_nodes = 50

    c.model = ConfigDict()
    c.model.size = "gpt2-small"
    c.model.dtype = "bfloat16"
    c.model.token_shift = False

    c.pretrain.steps = 4000
    c.pretrain.stop_loss = 0.0  # off: a large model follows edges long before these steps are over
    c.pretrain.batch_size = 256
    c.pretrain.log_every = 50
    adamw(c.pretrain.optimizer, 2.5e-4)

    c.generate.max_new_tokens = -(-(path_length + 1) // 8) * 8  # the path and its end

    c.collect.prompts = 50_000
    c.collect.samples = 4
    c.collect.shard_rows = 16_384
    c.collect.batch_size = 4096

    c.fit.epochs = 5
    c.fit.batch_size = 256
    c.fit.future_offsets = path_length - 1
    c.fit.warm_start = False
    adamw(c.fit.optimizer, 1e-4)

    c.evaluate.problems = 1000
    c.evaluate.batch_size = 4096
    return c
