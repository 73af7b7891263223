"""`python -m qsharp_jax.cli`, for where the `qsharp` script is not on the path."""

import sys

from qsharp_jax.cli import console

if __name__ == "__main__":
    sys.exit(console())
