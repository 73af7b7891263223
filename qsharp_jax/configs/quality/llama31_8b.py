"""QuALITY, Llama 3.1 8B guided by Llama 3.2 1B.

In the paper: pass@1 73.5 alone, 75.1 by CD, 75.9 by Q#; maj1@8 79.3, 79.3, 81.1; KL 9.23, 8.88.
"""

from ml_collections import ConfigDict

from qsharp_jax.configs.paper import row


def get_config() -> ConfigDict:
    return row("quality", ref="Llama-3.1-8B-Instruct", guide="Llama-3.2-1B")
