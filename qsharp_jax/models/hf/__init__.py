"""Hugging Face folders in and out: `load_ref`, `load_guide`, `load_trunk`, `export_ref`, `export_guide`.

config.py (what config.json means), names.py (which tensor is which leaf), files.py (safetensors), load.py, export.py,
card.py. It knows nothing about workdirs, tasks or prompts.
"""

from qsharp_jax.models.hf.config import check_no_adapter
from qsharp_jax.models.hf.export import check_folder, export_guide, export_ref
from qsharp_jax.models.hf.load import (
    check_weights,
    is_guide,
    load_guide,
    load_ref,
    load_trunk,
    read_config,
    read_guide_config,
)

__all__ = [
    "check_folder",
    "check_no_adapter",
    "check_weights",
    "export_guide",
    "export_ref",
    "is_guide",
    "load_guide",
    "load_ref",
    "load_trunk",
    "read_config",
    "read_guide_config",
]
