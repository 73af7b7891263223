"""Recipes: the settings of a run in which it differs from the defaults of `run/schema.py`, and presets of meshes."""
