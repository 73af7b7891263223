"""AIME 2024, Qwen 2.5 7B guided by Qwen 2.5 1.5B.

In the paper: pass@1 9.3 alone, 13.5 by CD, 14.1 by Q#; maj1@8 16.7, 16.7, 20.0; KL 9.95, 9.23.
"""

from ml_collections import ConfigDict

from qsharp_jax.configs.paper import row


def get_config() -> ConfigDict:
    return row("aime", ref="Qwen2.5-7B-Instruct", guide="Qwen2.5-1.5B")
