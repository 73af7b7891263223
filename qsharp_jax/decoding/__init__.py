"""Guided decoding: `generate`, `stream` and `ContinuousBatch`, and the `prefill`, `decode_one_token` and `decode` that
they consist of.

Prompts and responses are token ids.
"""

from qsharp_jax.decoding.api import Run, cache_size, cache_sizes, for_decoding, generate, stream
from qsharp_jax.decoding.checks import by_name, caches, dequantized, guide_names, prefill_work, row_seeds, rows_that_fit
from qsharp_jax.decoding.engine import ContinuousBatch, loop_sizes
from qsharp_jax.decoding.loop import BLOCK, decode, prefill, prefill_rows
from qsharp_jax.decoding.state import (
    RECORDED,
    Controls,
    Generation,
    Guide,
    Record,
    Settings,
    State,
    first_state,
    gives_values,
)
from qsharp_jax.decoding.step import decode_one_token

__all__ = [
    "BLOCK",
    "RECORDED",
    "ContinuousBatch",
    "Controls",
    "Generation",
    "Guide",
    "Record",
    "Run",
    "Settings",
    "State",
    "by_name",
    "cache_size",
    "cache_sizes",
    "caches",
    "decode",
    "decode_one_token",
    "dequantized",
    "first_state",
    "for_decoding",
    "generate",
    "gives_values",
    "guide_names",
    "loop_sizes",
    "prefill",
    "prefill_rows",
    "prefill_work",
    "row_seeds",
    "rows_that_fit",
    "stream",
]
