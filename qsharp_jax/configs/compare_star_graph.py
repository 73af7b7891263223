"""All algorithms on the star graph G(2, 4) of star_graph.py: `qsharp compare`. 18 minutes per seed on two cores."""

from ml_collections import ConfigDict

from qsharp_jax.configs.star_graph import get_config as run


def get_config() -> ConfigDict:
    return compared(run())


def compared(c: ConfigDict) -> ConfigDict:
    """Add the settings of a comparison to those of a run."""
    c.evaluate.samples = 1
    c.compare = ConfigDict()
    c.compare.methods = ("qsharp", "cd", "vas", "reinforce", "ppo", "klq", "dpo", "rpo")
    c.compare.seeds = (0, 1, 2)
    # Settings of single methods, as on the command line. PPO and KLQ take several steps on each batch of rollouts; at
    # the others' 1e-3 they leave pi_ref within the first batches, KLQ for objectives far below 0.
    c.compare.changes = ConfigDict()
    c.compare.changes.ppo = c.compare.changes.klq = ("policy.optimizer.learning_rate=1e-4",)
    return c


def compared_on_paper_graph(c: ConfigDict) -> ConfigDict:
    """Add the settings of a comparison, and those that the larger policies of star_graph_paper.py need."""
    c = compared(c)
    c.compare.changes = ConfigDict()
    c.policy.optimizer.learning_rate = 1e-5
    c.policy.batch_size = 256
    c.policy.prompts = 256
    return c
