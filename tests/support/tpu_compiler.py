"""Scripts that compile for a TPU slice, run in processes of their own."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from repository import PYTHONPATH


def printed_by(*command):
    """The JSON object that a script prints last."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('the TPU compiler is not installed: pip install "jax[tpu]"')
    # CPU for all that is not compiled for the slice; two processes may have libtpu loaded at once.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    path = os.pathsep.join([PYTHONPATH, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
