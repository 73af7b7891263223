import os
import subprocess
import sys

import bpe
import pytest
from repository import PYTHONPATH, ROOT
from small_server import CONTEXT, QUEUE, ROWS, Running, wait_until_ready
from text_models import make_guide, make_ref

from qsharp_jax.models import hf


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`qsharp serve` on a free port, with small models, a chat template and a guide."""
    folder = tmp_path_factory.mktemp("server")
    ref, guide = folder / "small", folder / "guide"
    hf.export_ref(make_ref(), ref, tokenizer=bpe.make(), stop_ids=[bpe.EOS, bpe.EOT])
    hf.export_guide(make_guide(), guide, tokenizer=bpe.make())
    log = folder / "log"
    programs = tmp_path_factory.getbasetemp() / "programs"  # of all servers of these tests
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": PYTHONPATH, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(programs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    words = ["serve", "--ref", str(ref), "--guide", f"good={guide}", "--port", "0", "--rows", str(ROWS)]
    words += ["--queue", str(QUEUE), "--context", str(CONTEXT), "--log-prompts", "--dtype", "float32"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "qsharp_jax.cli", *words], env=environment, cwd=ROOT, stderr=file
        )
    try:
        yield Running(process, wait_until_ready(process, log), log, ref, guide)
    finally:
        process.kill()
        process.wait()
