"""QuALITY, Qwen 2.5 7B guided by Qwen 2.5 1.5B.

In the paper: pass@1 64.5 alone, 64.2 by CD, 68.1 by Q#; maj1@8 72.0, 66.3, 73.3; KL 12.32, 7.90.
"""

from ml_collections import ConfigDict

from qsharp_jax.configs.paper import row


def get_config() -> ConfigDict:
    return row("quality", ref="Qwen2.5-7B-Instruct", guide="Qwen2.5-1.5B")
