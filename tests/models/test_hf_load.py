"""Loading a folder: into sharded arrays slice by slice, and through no more memory than needed."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from qsharp_jax.models import decoder
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.hf import files
from qsharp_jax.system.errors import UserError

SHARDED = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from helpers import assert_trees_equal
from qsharp_jax.models import hf
from qsharp_jax.models.hf import files

mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
read = files.Tensors.read
count = []
files.Tensors.read = lambda self, *args: (values := read(self, *args), count.append(values.nbytes))[0]

for name in ("llama", "gpt2"):
    folder = Path(sys.argv[1]) / name
    for unstacked in (True, False):
        plain = hf.load_ref(folder, dtype="float32", unstacked=unstacked).params
        def spec(path, leaf):
            # Every axis that two or four devices divide, but for a stacked leaf's layers.
            stacked = not unstacked and path[0].key == "layers"
            axes = ["fsdp", "tensor"][: leaf.ndim - stacked] if leaf.ndim - stacked > 1 else ["tensor"]
            shape = leaf.shape[stacked:]
            spec = [axis if size % 2 == 0 else None for axis, size in zip(axes, shape)]
            return NamedSharding(mesh, P(*[None] * stacked, *spec))
        shardings = jax.tree.map_with_path(spec, plain)
        count.clear()
        sharded = hf.load_ref(folder, dtype="float32", unstacked=unstacked, shardings=shardings).params
        for leaf, sharding in zip(jax.tree.leaves(sharded), jax.tree.leaves(shardings)):
            assert leaf.sharding == sharding, (leaf.sharding, sharding)
        assert_trees_equal(sharded, plain)
        # Every byte of the weights once, though each lies on one device or on several.
        assert sum(count) == sum(leaf.nbytes for leaf in jax.tree.leaves(plain)), sum(count)
    everywhere = hf.load_ref(folder, dtype="float32", shardings=NamedSharding(mesh, P())).params
    assert_trees_equal(everywhere, hf.load_ref(folder, dtype="float32").params)
print("right")
"""


def run(program, *args):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", program, *map(str, args)], capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_sharded_parameters_are_read_slice_by_slice_each_byte_once(made):
    done = run(SHARDED, made)
    assert done.stdout.endswith("right\n"), done.stderr


def test_what_the_system_reads_in_parts_is_read_whole(tmp_path, monkeypatch):
    """Linux gives 2 GiB at once, at most, which a whole tensor may exceed."""
    want = np.arange(3000, dtype=np.float32).reshape(60, 50)
    save_file({"a": want}, tmp_path / "model.safetensors")
    preadv = os.preadv
    monkeypatch.setattr(files.os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:999]], at))
    with files.Tensors(tmp_path) as tensors:
        np.testing.assert_array_equal(tensors.read("a", (slice(None), slice(None))), want)
        np.testing.assert_array_equal(tensors.read("a", (slice(3, 40), slice(7, 49))), want[3:40, 7:49])
        assert tensors.read("a", (slice(3, 3), slice(7, 49))).shape == (0, 42)
        os.truncate(tmp_path / "model.safetensors", 5000)
        with pytest.raises(UserError, match="was truncated while a was read; download it again"):
            tensors.read("a", (slice(None), slice(None)))


# 4.6 GB in bfloat16: a model made in minutes, loaded as it is and in the other form.
BIG = DecoderConfig(
    vocab_size=64_000, embed=4096, layers=8, heads=32, kv_heads=8, head_dim=128, mlp=14_336, max_positions=32,
    dtype="bfloat16",
)  # fmt: skip
MEASURE = """
import resource, sys
import jax, jax.numpy as jnp
from qsharp_jax.models import hf

jnp.zeros(3).block_until_ready()
def now():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
before = now()
params = hf.load_ref(sys.argv[1], dtype="bfloat16", unstacked=sys.argv[2] == "unstacked").params
model = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
assert model > 4e9
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(peak - before - model)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["unstacked", "stacked"])
def test_loading_takes_no_more_than_the_weights_and_one_tensor(form, tmp_path):
    """On a CPU the device's memory is the host's: what is above the model itself is what loading takes."""
    from qsharp_jax.models.hf import config as configs
    from qsharp_jax.models.hf import files, load, names

    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), BIG))
    expected = load._expected(shapes, names.decoder_places("llama", BIG))
    dtype = np.dtype(jax.numpy.bfloat16)
    noise = np.random.default_rng(0).normal(size=2**20).astype(dtype)

    def tensor(name, shape):
        return files.Tensor(name, dtype, shape, lambda: np.resize(noise, shape))

    try:
        files.write(tmp_path, files.split([tensor(*item) for item in expected.items()], largest_file=2 * 10**9))
        entries = configs.entries(BIG, "llama", classifier=False, tied=False, dtype="bfloat16")
        (tmp_path / "config.json").write_text(json.dumps(entries))
        done = run(MEASURE, tmp_path, form)
        assert done.returncode == 0, done.stderr
    finally:
        shutil.rmtree(tmp_path)
    largest = max(2 * np.prod(shape) for shape in expected.values())
    print(f"{form}: {int(done.stdout) / 1e9:.2f} GB beyond the weights")
    assert int(done.stdout) < largest + 1e9
