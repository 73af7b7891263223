"""GSM8K, Qwen 2.5 7B guided by Qwen 2.5 1.5B.

In the paper: pass@1 76.1 alone, 79.0 by CD, 83.5 by Q#; maj1@8 92.9, 93.1, 93.8; KL 5.37, 4.10.
"""

from ml_collections import ConfigDict

from qsharp_jax.configs.paper import row


def get_config() -> ConfigDict:
    return row("gsm8k", ref="Qwen2.5-7B-Instruct", guide="Qwen2.5-1.5B")
