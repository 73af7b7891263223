"""The script for an H200, with tiny models on the CPU."""

import os
import re
import subprocess
import sys

import pytest
from repository import ROOT


@pytest.mark.slow
def test_the_script_prints_every_table_and_keeps_them(tmp_path):
    results = tmp_path / "RESULTS.md"
    results.write_text("# Results\n")
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "h200.sh", "--small", "--results", results],
        env=os.environ | {"QSHARP_PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = results.read_text()
    assert written.startswith("# Results\n\n## Decoding and fitting") and written.removeprefix("# Results\n") == done.stdout
    assert written.count("| float32  |") == written.count("| bfloat16 |") == 2
    steps = re.findall(r"\| (run|bare) +\| +([12]) \| ours, (unguided|guided) +\| +[\d.]+ \| +[\d.]+ \|", written)
    assert len(set(steps)) == 8 and len(steps) == 9, "once more in 8 bits"
    assert len(re.findall(r"- (?:run|bare), batch [12], ours, \w+: .*decode \d", written)) == 9
    assert "MFU" in written and "compiled in" in written
