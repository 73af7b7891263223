"""The paper's G(3, 8): see `star_graph_paper.py`."""

from ml_collections import ConfigDict

from qsharp_jax.configs.star_graph_paper import get_config as base


def get_config() -> ConfigDict:
    c = base()
    c.task.degree = 3
    c.task.path_length = 8
    c.generate.max_new_tokens = 16  # the path and its end
    c.fit.future_offsets = 7
    return c
