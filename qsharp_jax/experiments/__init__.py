"""Whole runs, built from everything below: one algorithm, several compared, a model exported."""
