"""GSM8K, Llama 3.1 8B guided by Llama 3.2 1B.

In the paper: pass@1 82.9 alone, 84.5 by CD, 85.1 by Q#; maj1@8 90.5, 90.9, 91.4; KL 7.43, 3.67.
"""

from ml_collections import ConfigDict

from qsharp_jax.configs.paper import row


def get_config() -> ConfigDict:
    return row("gsm8k", ref="Llama-3.1-8B-Instruct", guide="Llama-3.2-1B")
