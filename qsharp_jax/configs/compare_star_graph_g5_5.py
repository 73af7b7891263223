"""All algorithms on the paper's G(5, 5): `qsharp compare`, on an accelerator."""

from ml_collections import ConfigDict

from qsharp_jax.configs.compare_star_graph import compared_on_paper_graph
from qsharp_jax.configs.star_graph_g5_5 import get_config as run


def get_config() -> ConfigDict:
    return compared_on_paper_graph(run())
