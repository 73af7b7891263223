"""The star graph G(2, 4) on a CPU, pi_ref pre-trained on correct paths as in the paper. About six minutes on two cores.

pi_ref learns to follow edges and that the last node is the goal, and stays at 1/d at the first branch. The value of the
first step depends on the path three nodes ahead: with the likelihood alone the guide stays at chance for thousands of
steps; the auxiliary loss on later tokens of successful rollouts breaks the plateau.
"""

from ml_collections import ConfigDict

from qsharp_jax.run.schema import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.rounds = 1

    c.task.name = "star_graph"
    c.task.degree = 2
    c.task.path_length = 4  # nodes, including the start
    c.task.num_nodes = 12  # node ids
    c.task.pretrain_on = "paths"  # correct paths; "walks": down a random arm

    c.model.size = "tiny"
    c.model.embed = 64
    c.model.layers = 4
    c.model.heads = 4
    c.model.kv_heads = 4
    c.model.head_dim = 16
    c.model.mlp = 128
    c.model.max_positions = 64
    c.model.positions = "learned"
    c.model.token_shift = True

    c.pretrain.steps = 1500
    c.pretrain.stop_loss = 0.17  # nats per token; certain of all but the first branch, it would be log(2) / 5 = 0.139
    c.pretrain.batch_size = 64
    c.pretrain.length_bucket = 8
    c.pretrain.log_every = 25
    adamw(c.pretrain.optimizer, 2e-3)
    c.pretrain.optimizer.schedule = "constant"

    c.generate.max_new_tokens = 8
    c.generate.prompt_bucket = 8

    c.collect.prompts = 12_288
    c.collect.samples = 2
    c.collect.batch_size = 1024
    c.collect.shard_rows = 4096
    c.collect.drop_no_variation = False

    c.fit.epochs = 6
    c.fit.batch_size = 64
    c.fit.length_bucket = 8
    c.fit.holdout = 0.02
    c.fit.future_offsets = 3
    adamw(c.fit.optimizer, 2e-3)

    c.evaluate.problems = 600
    c.evaluate.batch_size = 600
    return c


def adamw(optimizer: ConfigDict, learning_rate: float) -> None:
    optimizer.name = "adamw"
    optimizer.learning_rate = learning_rate
    optimizer.warmup_steps = 20
    optimizer.end_fraction = 0.3
