"""GSM8K, Qwen 2.5 Coder 0.5B Instruct guided by itself: the paper's setting at a size for one device.

pi_ref answers 0.19 of the problems (0.09 .. 0.28, 64 responses), in 240 tokens on average. Beyond the paper's settings:
1,500 problems with 8 rollouts each, responses of at most 320 tokens, one round.
"""

from ml_collections import ConfigDict

from qsharp_jax.configs.paper import row


def get_config() -> ConfigDict:
    c = row("gsm8k", ref="Qwen2.5-Coder-0.5B-Instruct", guide="ref")
    c.rounds = 1
    c.generate.max_new_tokens = 320
    c.collect.prompts, c.collect.samples = 1500, 8
    c.collect.batch_size = c.evaluate.batch_size = 256
    c.fit.holdout = 0.05  # for the forecast
    c.fit.accumulate, c.fit.remat = 1, "dots"
    c.fit.pack_length = 1024  # the longest test problem takes more than 512 tokens with its response
    return c
