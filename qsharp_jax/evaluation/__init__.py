"""Samples of every method on held-out problems, and the measures made of them."""
