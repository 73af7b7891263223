"""MATH, Llama 3.1 70B guided by Llama 3.2 3B.

In the paper: pass@1 60.6 alone, 64.1 by Q#; maj1@8 69.0, 72.7.
"""

from ml_collections import ConfigDict

from qsharp_jax.configs.paper import row


def get_config() -> ConfigDict:
    c = row("math", ref="Llama-3.1-70B-Instruct", guide="Llama-3.2-3B")
    c.mesh = "cuda_8"  # one that the reference fits on
    return c
