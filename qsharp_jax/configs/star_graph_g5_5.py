"""The paper's G(5, 5): see `star_graph_paper.py`."""

from ml_collections import ConfigDict

from qsharp_jax.configs.star_graph_paper import graph


def get_config() -> ConfigDict:
    return graph(degree=5, path_length=5)
