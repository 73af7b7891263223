"""The paper's G(2, 5): see `star_graph_paper.py`."""

from qsharp_jax.configs.star_graph_paper import get_config

__all__ = ["get_config"]
