"""Guides in other programs, without JAX: a logits processor for `transformers`, and one for vLLM."""
