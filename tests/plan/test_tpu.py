"""Decoding and training compiled for a TPU, on a machine without one.

libtpu compiles for a named slice (`v5e:2x2`) and the program is read, not run. It does so in a process of its own,
which is this file run as a script: libtpu wants to be loaded before JAX has settled on a backend.
"""

import dataclasses
import functools
import json
import math
import re
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from repository import ROOT
from tpu_compiler import printed_by

from qsharp_jax import decoding, train
from qsharp_jax.data.batches import Batch
from qsharp_jax.models import decoder, meshes, sharding, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import Sampling

ROWS, PROMPT, NEW = 64, 1024, 1024  # of decoding: caches that do not fit into a chip's fast memory all at once
FIT_ROWS, LENGTH = 8, 256  # of training
SPLASH_LENGTH = 2048  # of training with splash attention, tokens; no other array has two axes of it
REF = DecoderConfig(
    vocab_size=1024, embed=512, layers=2, heads=8, kv_heads=4, head_dim=128, mlp=1024, max_positions=PROMPT + NEW,
    dtype="bfloat16",
)  # fmt: skip
GUIDE = ValueConfig(
    DecoderConfig(
        vocab_size=1024, embed=256, layers=2, heads=4, kv_heads=2, head_dim=128, mlp=512, max_positions=PROMPT + NEW,
        dtype="bfloat16",
    )
)  # fmt: skip


# --- In the other process: compile, and say what was compiled -------------------------------------------------------


def sharded(mesh, tree, rows):
    """Abstract arrays: what has the batch as its first axis is cut over all chips, the rest is on each of them."""

    def place(leaf):
        spec = P("data") if leaf.ndim and leaf.shape[0] == rows else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def bytes_a_chip(tree):
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def abstract(init, config, dtype):
    params = jax.eval_shape(lambda key: init(key, config), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)


def compile_decode(mesh):
    """The program that `generate` would run, for arguments of the shapes that it would give to it."""

    class Called(Exception):
        """The arguments that `decode` was called with."""

    def prefill(params, config, tokens, start, **sizes):
        real = functools.partial(decoding.prefill, config=config, **sizes)
        return jax.eval_shape(real, params, tokens=tokens, start=start)

    def decode(*arguments, settings):
        raise Called(arguments, settings)

    ref = LanguageModel(jax.eval_shape(decoder.unstack, abstract(decoder.init, REF, jnp.bfloat16)), REF)
    guide = ValueModel(jax.eval_shape(value.unstack, abstract(value.init, GUIDE, jnp.bfloat16)), GUIDE)
    sampling = Sampling(eta=0.1, top_p=0.9, max_new_tokens=NEW, stop_ids=[2])
    # This machine's memory does not matter.
    replaced = dict(decode=decode, check_memory=lambda *arguments, **sizes: None)
    filled = mock.patch.object(decoding.loop, "prefill", prefill)
    with filled, mock.patch.multiple(decoding.api, **replaced), pytest.raises(Called) as called:
        decoding.generate(ref, guide, [[1] * PROMPT] * ROWS, sampling, rng=0)
    arguments, settings = called.value.args
    arguments = sharded(mesh, arguments, ROWS)
    state = arguments[2]
    caches = [cache.keys + cache.values for cache in (state.ref_cache, state.guide_cache)]
    with jax.set_mesh(mesh):
        return decoding.decode.lower(*arguments, settings=settings).compile(), caches


def compile_fit(mesh):
    """One training step of the guide over a donated state."""
    optimizer = optax.adamw(1e-4)
    loss = functools.partial(train.value_loss, config=GUIDE)
    step = functools.partial(train.train_step, loss_fn=loss, optimizer=optimizer)
    state = jax.eval_shape(lambda params: train.init_state(params, optimizer), abstract(value.init, GUIDE, jnp.float32))
    state = sharded(mesh, state, FIT_ROWS)
    tokens, flags = np.zeros((FIT_ROWS, LENGTH), np.int32), np.zeros((FIT_ROWS, LENGTH), bool)
    batch = Batch(
        tokens=tokens, segments=tokens, positions=tokens, response_mask=flags, label_mask=flags,
        reward_to_go=np.zeros((FIT_ROWS, LENGTH), np.float32),
    )  # fmt: skip
    return jax.jit(step, donate_argnums=0).lower(state, sharded(mesh, batch, FIT_ROWS), np.float32(1)).compile(), state


def compile_splash(devices):
    """One training step with splash attention, rows over two chips and heads over two."""
    guide = dataclasses.replace(GUIDE, trunk=dataclasses.replace(GUIDE.trunk, heads=8, kv_heads=4))
    mesh = meshes.make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, sharding.FIT, devices)
    places = sharding.of_model(ValueModel(value.abstract(guide), guide), mesh, sharding.FIT).params
    params = sharding.placed(value.abstract(guide), places)
    optimizer = optax.adamw(1e-4)
    places = train.state_shardings(params, optimizer)
    state = train.TrainState(params, jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((), jnp.int32))
    number, flag = (jax.ShapeDtypeStruct((4, SPLASH_LENGTH), dtype) for dtype in (jnp.int32, jnp.bool_))
    batch = Batch(
        tokens=number, segments=number, positions=number, response_mask=flag, label_mask=flag,
        reward_to_go=jax.ShapeDtypeStruct(number.shape, jnp.float32),
    )  # fmt: skip
    batch = sharding.placed(batch, sharding.of_rows(batch, mesh, sharding.FIT))
    loss = functools.partial(train.value_loss, config=guide, attend_by="splash")
    step = functools.partial(train.train_step, loss_fn=loss, optimizer=optimizer)
    with jax.set_mesh(mesh):
        step = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        return step.lower(sharding.placed(state, places), batch, np.float32(1)).compile()


def main():
    """Prints a JSON object a program: bytes on a chip, and the instructions as wide as what is updated in place."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    if sys.argv[1:] == ["splash"]:
        text = compile_splash(devices).as_text()
        square = rf"\w+\[[\d,]*{SPLASH_LENGTH},{SPLASH_LENGTH}[\d,]*\]"
        print(json.dumps(dict(kernels=text.count("tpu_custom_call"), scores=re.findall(square, text))))
        return
    mesh = Mesh(devices, ("data",))
    facts = {}
    for name, compile_one in {"decode": compile_decode, "fit": compile_fit}.items():
        begin = time.monotonic()
        compiled, updated = compile_one(mesh)
        memory, text = compiled.memory_analysis(), compiled.as_text()
        facts[name] = dict(
            updated=bytes_a_chip(updated),
            aliased=memory.alias_size_in_bytes,
            temporary=memory.temp_size_in_bytes,
            kernels=text.count('"tpu_custom_call"'),
            instructions=instructions(text, updated),
            seconds=time.monotonic() - begin,
        )
    print(json.dumps(facts))


def instructions(text, arrays):
    """The program's lines whose result, or the first part of it, has one of the arrays' shapes, in whatever order."""
    shapes = {tuple(sorted(leaf.sharding.shard_shape(leaf.shape))) for leaf in jax.tree.leaves(arrays)}
    found = []
    for line in text.splitlines():
        if match := re.match(r" +(?:ROOT )?%[\w.-]+ = \(?\w+\[([\d,]+)\]", line):
            if tuple(sorted(map(int, match[1].split(",")))) in shapes:
                found.append(line.strip())
    return found


if __name__ == "__main__":
    main()


# --- In the tests: read it ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs():
    return printed_by(__file__)


def test_decoding_updates_its_caches_in_place(programs):
    decode = programs["decode"]
    assert decode["aliased"] >= decode["updated"]
    assert decode["temporary"] < decode["updated"] / 4, "the caches are not held twice"


def test_no_cache_is_copied_in_the_loop_or_around_it(programs):
    assert programs["decode"]["instructions"], "the caches are found in the program's text"
    assert not [line for line in programs["decode"]["instructions"] if " copy(" in line or " transpose(" in line]


def test_attention_of_each_layer_is_a_kernel(programs):
    assert programs["decode"]["kernels"] == REF.layers + GUIDE.trunk.layers


def test_a_training_step_updates_its_state_in_place(programs):
    fit = programs["fit"]
    assert fit["aliased"] >= fit["updated"]


@pytest.mark.slow
def test_a_training_step_with_splash_attention_has_no_scores_in_memory():
    splash = printed_by(__file__, "splash")
    assert splash["kernels"] >= 3, "forward, and backward for the queries and for keys and values"
    assert splash["scores"] == []


@pytest.mark.slow
def test_an_8b_with_a_1b_guide_decodes_on_eight_v5e():
    facts = printed_by(ROOT / "benchmarks" / "tpu.py", "--only", "8b-v5e", "--json")["8b-v5e"]
    assert facts["peak"] < facts["hbm"]
    assert facts["aliased"] >= facts["cache"], "caches and carry are updated in place"
    assert facts["copies"] == [], "no weight or cache is copied in the loop"
    # Of the last layers' caches some wait in fast memory until they are written, and go back as a whole.
    assert facts["write_back_bytes"] < 0.05 * facts["bound_bytes"]
    # Two embeddings and the tokens, beside two a layer: the rows' vocabularies are on one chip each.
    assert len(facts["reductions"]) <= 2 * facts["layers"] + 3
    assert facts["repeated"] == 0, "no chip waits for the others within a search over the vocabulary"
    assert facts["hbm_bytes"] < 1.1 * facts["bound_bytes"]


@pytest.mark.slow
def test_rows_that_fill_a_quarter_of_their_caches_have_a_quarter_read():
    """With rows over four parts of sixteen chips, and kv heads over the four chips of each."""
    name = "8b-v5e-16-quarter"
    facts = printed_by(ROOT / "benchmarks" / "tpu.py", "--only", name, "--json")[name]
    assert facts["kernels"] == facts["layers"]
    assert facts["aliased"] >= facts["cache"], "caches and carry are updated in place"
    assert facts["copies"] == [], "no weight or cache is copied, nor laid out otherwise for the kernel"
    assert facts["write_back_bytes"] < 0.01 * facts["bound_bytes"]
    assert facts["hbm_bytes"] < 1.15 * facts["bound_bytes"]


@pytest.mark.slow
def test_keys_and_values_in_8_bits_are_read_by_the_kernel():
    """With two layers each; some weights then stay in fast memory from step to step."""
    name = "8b-v5e-16-quarter"
    command = ("--only", name, "--layers", 2, "--quantize", "int8", "--json")
    facts = printed_by(ROOT / "benchmarks" / "tpu.py", *command)[name]
    assert facts["kernels"] == facts["layers"]
    assert facts["aliased"] >= facts["cache"], "caches and carry are updated in place"
    caches = "[16,2,2048"  # rows, kv heads and positions of a chip
    assert not [copy for copy in facts["copies"] + facts["write_backs"] if caches in copy], "nor are scales copied"
    # Where all positions are read it is 0.92 of the bound.
    assert facts["hbm_bytes"] < 0.75 * facts["bound_bytes"]
