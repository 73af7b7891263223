"""Hugging Face folders in and out: `load_ref`, `load_guide`, `load_trunk`, `export_ref`, `export_guide`.

Files: families.py (what each family's class calls things), config.py (config.json), names.py (the tensor of each leaf),
files.py (safetensors), packed.py (quantized), gguf.py, adapter.py (PEFT's), hub.py, load.py, export.py, card.py.
"""

from qsharp_jax.models.hf.config import stored_dtype
from qsharp_jax.models.hf.export import check_folder, export_adapter, export_guide, export_ref
from qsharp_jax.models.hf.load import (
    base_of,
    check_weights,
    is_guide,
    load_guide,
    load_ref,
    load_trunk,
    read_config,
    read_guide_config,
)

__all__ = [
    "base_of",
    "check_folder",
    "check_weights",
    "export_adapter",
    "export_guide",
    "export_ref",
    "is_guide",
    "load_guide",
    "load_ref",
    "load_trunk",
    "read_config",
    "read_guide_config",
    "stored_dtype",
]
