"""MATH, Qwen 2.5 7B guided by Qwen 2.5 1.5B.

In the paper: pass@1 58.6 alone, 60.7 by CD, 61.9 by Q#; maj1@8 72.8, 74.2, 74.8; KL 7.07, 6.46.
"""

from ml_collections import ConfigDict

from qsharp_jax.configs.paper import row


def get_config() -> ConfigDict:
    return row("math", ref="Qwen2.5-7B-Instruct", guide="Qwen2.5-1.5B")
