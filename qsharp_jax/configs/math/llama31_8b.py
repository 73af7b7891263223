"""MATH, Llama 3.1 8B guided by Llama 3.2 1B.

In the paper: pass@1 43.9 alone, 45.3 by CD, 46.7 by Q#; maj1@8 57.0, 59.0, 60.1; KL 26.8, 8.69.
"""

from ml_collections import ConfigDict

from qsharp_jax.configs.paper import row


def get_config() -> ConfigDict:
    return row("math", ref="Llama-3.1-8B-Instruct", guide="Llama-3.2-1B")
