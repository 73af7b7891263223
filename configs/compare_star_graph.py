"""All algorithms on the star graph G(2, 4) of star_graph.py: `qsharp compare`. Half an hour a seed on two cores."""

from ml_collections import ConfigDict
from star_graph import get_config as run


def get_config() -> ConfigDict:
    c = run()
    c.evaluate.samples = 1
    c.compare = compare()
    return c


def compare() -> ConfigDict:
    """What a comparison has beside a run's settings."""
    c = ConfigDict()
    c.methods = ("qsharp", "cd", "vas", "reinforce", "ppo", "klq", "dpo", "rpo")
    c.seeds = (0, 1, 2)
    c.changes = ConfigDict()  # settings of single methods, as on the command line: c.changes.ppo = ("ppo.clip=0.1",)
    return c
