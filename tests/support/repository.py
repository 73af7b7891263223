"""Where the repository lies, and what a process started by a test needs on its path."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PYTHONPATH = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
