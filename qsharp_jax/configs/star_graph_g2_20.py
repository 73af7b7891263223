"""The paper's G(2, 20): see `star_graph_paper.py`."""

from ml_collections import ConfigDict

from qsharp_jax.configs.star_graph_paper import graph


def get_config() -> ConfigDict:
    return graph(degree=2, path_length=20)
