"""Functions for notebooks and scripts, with models, prompts and rewards as Python objects."""
