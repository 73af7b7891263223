"""The precision of float32 products: GPUs compute them as TF32 and TPUs in bfloat16, unless told otherwise."""

from contextlib import AbstractContextManager

import jax


def of(*dtypes: str) -> AbstractContextManager:
    """Return a context in which to trace a program that computes in these dtypes.

    With float32 among them, float32 products are computed in float32 on every device. Products of bfloat16 have no
    other precision.
    """
    return jax.default_matmul_precision("highest" if "float32" in dtypes else None)
