"""All algorithms on the star graph G(2, 4) of star_graph.py: `qsharp compare`. Some 18 minutes a seed on two cores."""

from ml_collections import ConfigDict

from qsharp_jax.configs.star_graph import get_config as run


def get_config() -> ConfigDict:
    return compared(run())


def compared(c: ConfigDict) -> ConfigDict:
    """A run's settings, with what a comparison has beside them."""
    c.evaluate.samples = 1
    c.compare = ConfigDict()
    c.compare.methods = ("qsharp", "cd", "vas", "reinforce", "ppo", "klq", "dpo", "rpo")
    c.compare.seeds = (0, 1, 2)
    # Settings of single methods, as on the command line. These two take several steps on each lot of rollouts, and at
    # the others' 1e-3 they leave pi_ref in the first lots, KLQ for objectives far below 0.
    c.compare.changes = ConfigDict()
    c.compare.changes.ppo = c.compare.changes.klq = ("policy.optimizer.learning_rate=1e-4",)
    return c


def compared_on_paper_graph(c: ConfigDict) -> ConfigDict:
    """Settings of `compared`, with what the larger policies of star_graph_paper.py need."""
    c = compared(c)
    c.compare.changes = ConfigDict()
    c.policy.optimizer.learning_rate = 1e-5
    c.policy.batch_size = 256
    c.policy.prompts = 256
    c.policy.log_prob_limit = 0.5  # nats: sampler and trainer compute in bfloat16
    return c
