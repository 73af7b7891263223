"""MATH, Llama 3 8B guided by Llama 3.2 1B.

In the paper: pass@1 25.4 alone, 24.9 by CD, 27.1 by Q#; maj1@8 34.3, 34.3, 37.9; KL 15.27, 7.14.
"""

from ml_collections import ConfigDict

from qsharp_jax.configs.paper import row


def get_config() -> ConfigDict:
    return row("math", ref="Meta-Llama-3-8B-Instruct", guide="Llama-3.2-1B")
