import json
import shutil

import pytest
from hf_folders import CONFIGS, guide, ref

from qsharp_jax.models import hf


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folders of references by name, and "guide", made once; tests change copies."""
    root = tmp_path_factory.mktemp("made")
    for name, config in CONFIGS.items():
        hf.export_ref(ref(config), root / name)
    hf.export_guide(guide(distribution="categorical", atoms=(0.0, 0.5, 1.0)), root / "guide")
    hf.export_guide(guide(type="q"), root / "q-guide")
    return root


@pytest.fixture
def copy(made, tmp_path):
    """copy(name, **entries) -> a folder of one's own, with some entries of its config.json changed (None: taken out)."""

    def copy(name="llama", **entries):
        folder = shutil.copytree(made / name, tmp_path / name)
        config = json.loads((folder / "config.json").read_text()) | entries
        config = {name: entry for name, entry in config.items() if entry is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy
