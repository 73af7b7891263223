"""`python -m qsharp_jax.cli`, for where the `qsharp` script is not on the path."""

import sys

from qsharp_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
