"""Limits of decoding that configs, the command line and `generate` share. Free of JAX: `--help` is quick."""

LEAST_ETA = 1e-6  # below it float32 does not tell two tokens' values apart any more, once divided by eta
LEAST_TEMPERATURE = 1e-6  # below it, but for 0 itself, log-probabilities of unlikely tokens leave float32's range
OTHERS = ("mass", "prefix", "zero")  # log-weights of the tokens that a guide does not score, see `guidance.py`
