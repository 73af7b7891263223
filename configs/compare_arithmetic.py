"""All algorithms on the word problems of arithmetic.py: `qsharp compare`."""

from arithmetic import get_config as run
from compare_star_graph import compared
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return compared(run())
