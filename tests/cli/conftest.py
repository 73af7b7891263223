import shutil
from pathlib import Path

import bpe
import pytest
from text_models import make_guide, make_ref

from qsharp_jax.models import hf


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a reference and a guide that go together, which the tests leave as they are."""
    ref, guide = (tmp_path_factory.mktemp(name) for name in ("ref", "guide"))
    hf.export_ref(make_ref(), ref, tokenizer=bpe.make(), stop_ids=[bpe.EOS, bpe.EOT])
    hf.export_guide(make_guide(), guide, tokenizer=bpe.make())
    return ref, guide


@pytest.fixture
def light(models, tmp_path) -> tuple[Path, Path]:
    """Copies without the weights: what is refused here is refused before any are read."""
    return tuple(
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        for folder, name in zip(models, ("ref", "guide"))
    )
