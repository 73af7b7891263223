"""The type hints of the public modules hold, as mypy.ini checks them."""

import subprocess
import sys

from repository import ROOT


def test_public_modules_have_no_type_errors():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
