"""All algorithms on the word problems of arithmetic.py: `qsharp compare`."""

from ml_collections import ConfigDict

from qsharp_jax.configs.arithmetic import get_config as run
from qsharp_jax.configs.compare_star_graph import compared


def get_config() -> ConfigDict:
    return compared(run())
