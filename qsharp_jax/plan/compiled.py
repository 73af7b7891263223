"""A step of the fit and guided decoding, compiled by the TPU compiler for a slice that need not exist here.

libtpu compiles `train.train_step` and `decoding.decode` for a named topology, on abstract arrays with shardings.
Nothing is allocated and nothing runs.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qsharp_jax.plan.program as program
from qsharp_jax import decoding, train
from qsharp_jax.models import decoder, meshes, sharding, value
from qsharp_jax.models.sharding import placed
from qsharp_jax.models.value import ValueModel
from qsharp_jax.plan.job import Job, abstract_batch, attention_of, learned
from qsharp_jax.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's report on a program."""

    bytes: int  # on a chip at the peak: arguments, temporaries, and results that are not updated in place
    # arguments, temporaries: parts of these bytes
    arguments: int
    temporaries: int
    flops: float  # of a chip per step, as far as the compiler counts them
    collectives: Counter[str]  # bytes that arrive on a chip per step, by kind
    text: str  # the program


def devices(section: Any) -> list[Any]:
    """Return the devices of a preset's slices; a UserError for a preset without TPUs, or without the compiler."""
    if not section["topology"]:
        raise UserError(f"--compile is for TPU meshes, not {section['name']}; give one, as --config.mesh=v5e_8")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('--compile needs the TPU compiler; install it with: pip install ".[tpu]"')
    from jax.experimental import topologies

    sides = {"chips_per_host_bounds": (2, 4, 1)} if section["devices_per_host"] == 8 else {}
    # On chips with two TensorCores, both are one device.
    cores = {"chip_config_name": "megacore"} if section["topology"].startswith("v4") else {}
    with _quiet():
        return topologies.get_topology_desc(
            platform="tpu", topology_name=section["topology"], num_slices=section["slices"], **sides, **cores
        ).devices


def fit(job: Job, section: Any, rows: int) -> Compiled:
    """Compile one step of the guide's fit, its state updated in place."""
    config, guide = job.config.fit, job.guide.config
    mesh = meshes.preset_mesh(section, "fit", devices(section))
    params = placed(job.fitted, sharding.of_model(ValueModel(job.fitted, guide), mesh, sharding.FIT).params)
    optimizer = train.make_optimizer(config.optimizer)
    changed, frozen = learned(job, params)
    places = train.state_shardings(changed, optimizer)
    places = places.replace(frozen=jax.tree.map(lambda leaf: leaf.sharding, frozen))
    moments, count = jax.eval_shape(optimizer.init, changed), jax.ShapeDtypeStruct((), jnp.int32)
    shapes = train.TrainState(changed, moments, count, frozen)
    batch = abstract_batch(rows, job.fit_tokens)
    loss = functools.partial(
        train.value_loss, config=guide.computed_in(config.dtype), projection=config.projection,
        clip=config.clip_rewards, future_weight=config.future_weight, remat=config.remat,
        attend_by=attention_of(job, section), packed=config.pack_length > 0,
    )  # fmt: skip
    step = functools.partial(train.train_step, loss_fn=loss, optimizer=optimizer, accumulate=config.accumulate)
    with jax.set_mesh(mesh):
        step = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        lowered = step.lower(
            placed(shapes, places), placed(batch, sharding.of_rows(batch, mesh, sharding.FIT)), np.float32(1)
        )
        compiled = _compile(lowered)
    # The compiler counts one iteration of a loop; nearly all work is in the loops over the layers.
    turns = guide.trunk.layers * config.accumulate
    return _facts(compiled, program.Program(compiled.as_text()).traffic(), turns)


def decode(job: Job, section: Any, rows: int) -> Compiled:
    """Compile the decode loop with its caches for `rows` rows; flops and collectives are per step."""
    config = job.config
    mesh = meshes.preset_mesh(section, "decode", devices(section))
    # Not `decoding.for_decoding`, which prepares models for the devices of this machine.
    ref = job.ref.replace(params=jax.eval_shape(decoder.unstack, job.ref.params))
    guide = job.decoded_guide
    guide = guide.replace(params=jax.eval_shape(value.unstack, guide.params))
    ref, guide = (placed(model, sharding.of_model(model, mesh, sharding.DECODE)) for model in (ref, guide))
    vocabulary = job.ref.config.vocab_size
    settings = decoding.Settings(
        stop_ids=(0,),
        vocab_size=vocabulary,
        candidates=min(config.generate.top_k_candidates, vocabulary),
        slots=math.ceil((config.generate.candidate_slots or 0) * rows),
        truncate=True,
    )
    sizes = job.cache_sizes(section, rows)
    width = sizes.shared or sizes.positions - config.generate.max_new_tokens
    tokens, start = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    prompts = sizes.prompts or rows

    def first(ref_params: Any, trunk: Any) -> decoding.State:
        caches = [
            decoding.prefill_rows(params, config, tokens[:prompts, :-1], start[:prompts], sizes)
            for params, config in ((ref_params, job.ref.config), (trunk, job.guide.config.trunk))
        ]
        return decoding.first_state(*caches, tokens, start, config.generate.max_new_tokens, settings)

    state = jax.eval_shape(first, job.ref.params, job.guide.params["trunk"])
    number, whole, seed = (jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.float32, jnp.int32, jnp.uint32))
    controls = decoding.Controls(
        eta=number, temperature=number, top_p=number, top_k=whole, threshold=number, budget=whole, seed=seed,
        mode=whole,
    )
    state, controls = placed((state, controls), sharding.of_rows((state, controls), mesh, sharding.DECODE))
    with jax.set_mesh(mesh):
        compiled = _compile(decoding.decode.lower(ref, guide, state, controls, settings=settings))
    loop = program.Program(compiled.as_text())
    return _facts(compiled, loop.traffic(loop.step), 1)


def _facts(compiled: Any, collectives: Counter[str], turns: int) -> Compiled:
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes
    flops = turns * compiled.cost_analysis().get("flops", 0.0)
    return Compiled(arguments + temporaries + new, arguments, temporaries, flops, collectives, compiled.as_text())


def _compile(lowered: Any) -> Any:
    try:
        with _quiet():
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        words = next((line.strip() for line in str(error).splitlines() if " of " in line), "it does not fit")
        raise UserError(f"the TPU compiler has no room for this step: {words}; take smaller batches") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what libtpu writes to the process's standard error about the missing TPU."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
