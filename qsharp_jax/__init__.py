"""Q# in JAX: a small value model, learned from rollouts, that steers a frozen language model while it decodes."""

__version__ = "0.1.0"
