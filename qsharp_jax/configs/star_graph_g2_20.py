"""The paper's G(2, 20): see `star_graph_paper.py`."""

from ml_collections import ConfigDict

from qsharp_jax.configs.star_graph_paper import get_config as base


def get_config() -> ConfigDict:
    c = base()
    c.task.degree = 2
    c.task.path_length = 20
    c.generate.max_new_tokens = 24  # the path and its end
    c.fit.future_offsets = 19
    return c
