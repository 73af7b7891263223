"""GSM8K, Llama 3 8B guided by Llama 3.2 1B.

In the paper: pass@1 69.1 alone, 77.8 by CD, 78.4 by Q#; maj1@8 85.8, 87.2, 88.1; KL 6.39, 2.65.
"""

from ml_collections import ConfigDict

from qsharp_jax.configs.paper import row


def get_config() -> ConfigDict:
    return row("gsm8k", ref="Meta-Llama-3-8B-Instruct", guide="Llama-3.2-1B")
