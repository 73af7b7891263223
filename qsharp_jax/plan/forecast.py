"""Memory and time of a step on each chip of a mesh, by arithmetic: without devices, weights or a compiler.

Arrays are counted by their shardings, what the backward pass saves by asking JAX, a step's temporaries and times by
formulas, each with a description that the table shows.
"""

import dataclasses
import itertools
import math
from collections import Counter
from typing import Any

import jax
import numpy as np

import qsharp_jax.plan.policies as policies
from qsharp_jax import decoding
from qsharp_jax.decoding import api, engine
from qsharp_jax.models import attention, cpu_form, kv_cache, meshes, sharding
from qsharp_jax.models.attention import Attention
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import Params
from qsharp_jax.models.kv_cache import Sizes
from qsharp_jax.models.sharding import placed
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.plan.activations import kept_bytes
from qsharp_jax.plan.job import Job, abstract_mesh, attention_of, chip_bytes, divided, fitted_state, on_cpu, shared
from qsharp_jax.plan.weights import layers_bytes, turned, weights_per_token


@dataclasses.dataclass(frozen=True)
class Line:
    """A number of bytes or seconds on each chip, and how it was computed."""

    what: str
    amount: float
    how: str


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Memory and time of one step."""

    rows: int  # of the whole mesh
    memory: tuple[Line, ...]  # bytes on a chip at the peak of a step, by part
    flops: float  # of a chip per step
    collectives: Counter[str]  # bytes that arrive on a chip per step, by kind
    slow: float  # those of these bytes that come from other slices
    times: tuple[Line, ...]  # seconds per step, by what bounds it

    @property
    def bytes(self) -> int:
        return round(sum(line.amount for line in self.memory))

    @property
    def seconds(self) -> float:
        """The lower bound of a step: the slowest of what can run at the same time."""
        return max((line.amount for line in self.times), default=0.0)


# --- Fitting --------------------------------------------------------------------------------------------------------


def fit(job: Job, section: Any, rows: int | None = None) -> Forecast:
    """Forecast one step of the guide's fit with `rows`, by default the config's batch size.

    `section` is the config's `mesh`. A UserError if it does not divide the guide's heads or the rows.
    """
    config, guide = job.config.fit, job.guide.config.computed_in(job.config.fit.dtype)
    mesh, parts = abstract_mesh(section, "fit"), config.accumulate
    rows = job.fit_rows if rows is None else rows
    params, changed, moments = fitted_state(job, section)
    sharding.of_rows(jax.ShapeDtypeStruct((rows // parts, job.fit_tokens), np.int32), mesh, sharding.FIT)
    data, fsdp, tensor = (mesh.shape[axis] for axis in meshes.MESH_AXES["fit"])
    words, per_chip = (attention_of(job, section), job.optimizer.name), rows // parts // (data * fsdp)
    part = _Part(guide, params, config, *words, per_chip, job.fit_tokens, data, fsdp, tensor)

    weights, optimizer_state = chip_bytes(params, section), chip_bytes(moments, section)
    memory = _fit_memory(part, weights, optimizer_state, chip_bytes(changed, section), section)
    memory += tuple(itertools.starmap(Line, policies.beside_updates(job, section, part.rows, part.tokens)))
    saved = next(line.amount for line in memory if line.what == "activations")
    products = weights_per_token(params, part.trunk, part.tokens)
    forward = 2 * products / tensor * part.tokens
    scores = 4 * part.trunk.layers * part.heads * part.trunk.head_dim * part.length * part.tokens
    recomputed = {"none": 0, "dots": scores, "full": forward + scores}[config.remat]
    flops = parts * (3 * (forward + scores) + recomputed)
    traffic = 4 * weights + 2 * optimizer_state + parts * (2 * saved + 3 * part.layer * part.trunk.layers)
    brought, across = _fit_collectives(part, weights)
    slow = across if section["slices"] > 1 else 0.0
    descriptions = [
        (fsdp > 1, "a layer's weights gathered twice and its gradient scattered, the embedding's rows exchanged"),
        (tensor > 1, "sums of every layer over tensor"),
        (data > 1, "the gradient summed over data" + ", between slices" * (slow > 0)),
    ]
    how = dict(
        computing=f"{flops / 1e12:.4g} TFLOP: 6 x {products / 1e9:.3g}e9 weights x tokens, attention,"
        f" what remat {config.remat} recomputes, over {data * fsdp * tensor} chips",
        memory="state and gradient read and written, activations too, gathered weights read three times",
        collectives="; ".join(words for applies, words in descriptions if applies),
    )
    return Forecast(rows, memory, flops, _whole(brought), slow, _times(section, flops, traffic, brought, slow, how))


@dataclasses.dataclass(frozen=True)
class _Part:
    """The work of one chip on a part of the batch: `rows` of `length` tokens."""

    guide: ValueConfig
    params: Params
    config: Any  # the section `fit`
    attention: Attention
    optimizer: str
    rows: int
    length: int
    data: int
    fsdp: int
    tensor: int

    trunk = property(lambda self: self.guide.trunk)
    tokens = property(lambda self: self.rows * self.length)
    heads = property(lambda self: divided(self.trunk.heads, self.tensor))
    width = property(lambda self: self.trunk.compute_dtype.itemsize)
    stored = property(lambda self: self.params["trunk"]["embedding"].dtype.itemsize)

    @property
    def layer(self) -> int:
        """Bytes of a layer's weights in the compute dtype, gathered over fsdp."""
        return layers_bytes(self.params) // self.trunk.layers // self.tensor * self.width // self.stored


def _fit_memory(part: _Part, weights: int, optimizer_state: int, gradient: int, section: Any) -> tuple[Line, ...]:
    trunk, config, rows, length = part.trunk, part.config, part.rows, part.length
    mlp, parts = divided(trunk.mlp, part.tensor), config.accumulate
    saved, by_dots = (
        kept_bytes(part.guide, remat, rows, length, part.tensor, part.attention) for remat in (config.remat, "dots")
    )
    # The compiler makes a narrow copy of the float32 weights of all layers at once, and gathers from that.
    narrow = 0 if part.width == part.stored else layers_bytes(part.params, here=section) * part.width // part.stored
    # What a block needs for its gradient and did not save is recomputed for one layer at a time.
    recomputed = max(0, by_dots - saved) // trunk.layers
    scores = SCORES if part.attention == "xla" else 0  # others compute a part of them at a time
    attention, hidden = rows * part.heads * length**2 * scores, part.tokens * mlp * HIDDEN
    gathered = 2 * part.layer * (part.fsdp > 1)
    to_scatter = gathered * 4 // part.width
    brief = max(attention, hidden) + recomputed
    vmem = section["vmem_bytes"]
    # A layer's gradient is at least two arrays, scores and their gradient; one too large for VMEM stays in HBM.
    fast = min(vmem, gathered + to_scatter + brief) if brief <= 2 * vmem else 0
    return (
        Line("weights", weights, f"{part.params['trunk']['embedding'].dtype}, divided as sharding.of_model says"),
        Line("optimizer", optimizer_state, f"{part.optimizer}: what it keeps of each weight, divided alike"),
        Line("gradients", gradient * min(parts, 2), "float32" + ", of the batch and of a part of it" * (parts > 1)),
        Line("copies of weights", narrow, f"of all layers, in {trunk.dtype}, divided alike"),
        Line("gathered weights", gathered, "of two layers, whole over fsdp"),
        Line("gradients to scatter", to_scatter, "float32, of two layers, whole"),
        Line(
            "activations", saved,
            f"of {trunk.layers} layers, what remat {config.remat} keeps of {rows} rows x {length} tokens",
        ),
        Line(
            "a layer's gradient", brief,
            f"the larger of its scores ({rows} rows x {part.heads} heads x {length}^2 x {scores} bytes) and its hidden"
            f" units ({part.tokens} tokens x {mlp} x {HIDDEN} bytes)" + ", and what is recomputed" * (recomputed > 0),
        ),
        Line(
            "in fast memory", -fast,
            "of gathered weights, gradients to scatter and a layer's gradient, what has room in VMEM",
        ),
    )  # fmt: skip


def _fit_collectives(part: _Part, weights: int) -> tuple[Counter[str], float]:
    """Count the bytes that arrive on a chip, by kind, and those of the sum over `data`."""
    parts, trunk = part.config.accumulate, part.trunk
    gradient = layers_bytes(part.params, axis="fsdp") // part.tensor  # float32
    stream = part.tokens * trunk.embed
    # Forward after attention and after the feed-forward, backward before them; with full remat, forward once more.
    sums = 4 + 2 * (part.config.remat == "full")
    across = 2 * weights * (part.data - 1) / part.data
    by_fsdp, by_tensor = (parts * (n - 1) / n for n in (part.fsdp, part.tensor))
    return Counter({
        "all-gather": 2 * gradient * part.width // 4 * by_fsdp,  # of weights, in the dtype they are computed with
        "reduce-scatter": gradient * by_fsdp,
        "all-to-all": 2 * stream * part.width * by_fsdp,  # the embedding's rows, and their gradient
        "all-reduce": trunk.layers * sums * stream * part.width * 2 * by_tensor + across,
    }), across  # fmt: skip


LARGEST = 2**20  # rows per chip at which the search for the largest batch ends
SCORES, HIDDEN = 10, 16  # bytes per score while its gradient is computed, and per hidden unit
WORK = 4  # simultaneous arrays in decoding of the logits' size


# --- Decoding -------------------------------------------------------------------------------------------------------


def decode(job: Job, section: Any, rows: int | None = None) -> Forecast:
    """Forecast one step of guided decoding, with `rows` rounded up to what the mesh divides.

    Args:
      section: the config's `mesh`; the sizes of its `decode` may span several hosts.
      rows: by default those of the config's collection.

    Raises:
      UserError: if the mesh does not divide a model's heads.
    """
    config, mesh = job.config, abstract_mesh(section, "decode")
    data, beside, tensor = (mesh.shape[axis] for axis in meshes.MESH_AXES["decode"])
    rows = config.collect.batch_size if rows is None else rows
    rows = -(-rows // (data * beside)) * data * beside
    ref, fitted, guide = (
        placed(m, sharding.of_model(m, mesh, sharding.DECODE)) for m in (job.ref, job.guide, job.decoded_guide)
    )
    trunks = {"reference": (ref.params, ref.config), job.learner: (guide.params["trunk"], guide.config.trunk)}
    sizes = job.cache_sizes(section, rows)
    positions = sizes.positions + sizes.shared  # of a row

    def cache_bytes(trunk: DecoderConfig, sizes: Sizes) -> int:
        int8 = kv_cache.is_int8(trunk, on_cpu=on_cpu(section))
        cache = kv_cache.abstract(trunk, sizes, int8=int8)
        return chip_bytes(placed(cache, sharding.of_rows(cache, mesh, sharding.DECODE)), section)

    caches = {name: cache_bytes(trunk, sizes) for name, (_, trunk) in trunks.items()}
    # A V-type guide computes its candidates, or what slots they have, through the layers beside the pending token.
    candidates = math.ceil(config.generate.candidate_slots or config.generate.top_k_candidates)
    queries = {"reference": 1, job.learner: 1 + candidates * (guide.config.type == "v")}
    stream = rows // data
    ref_dtype = ref.params["embedding"].dtype if ref.config.quantize == "none" else ref.config.quantize
    memory = [
        Line("reference's weights", chip_bytes(ref, section), f"{ref_dtype}, divided as of_model says"),
        Line(
            f"{job.learner}'s weights", 0 if policies.share_base(job, section) else chip_bytes(fitted, section),
            f"{fitted.params['trunk']['embedding'].dtype}, divided alike",
        ),
        *itertools.starmap(Line, policies.beside_sampling(job, section)),
        *(
            Line(
                f"{name}'s cache", size,
                f"{rows} rows x {sizes.positions} positions"
                + f" and {sizes.prompts} prompts that they share x {sizes.shared}" * (sizes.prompts > 0)
                + f" x {trunks[name][1].layers} layers",
            )
            for name, size in caches.items()
        ),
    ]
    vocabulary = rows * ref.config.vocab_size * 4 / mesh.size
    is_quantized = job.guide.config.trunk.quantize != "none"
    # Bytes; layers wider than the compute dtype are read as narrow copies, a quantized guide is one itself.
    copies, wider = chip_bytes(guide, section) if is_quantized else 0, 0
    for model, (params, trunk) in zip((ref, guide), trunks.values(), strict=True):
        if trunk.quantize != "none":
            copied = cpu_form.dequantized_copies(model.params, trunk) if on_cpu(section) else turned(params)
            copies += chip_bytes(copied, section)
            continue
        layers = layers_bytes(params, here=section)
        narrow = layers * trunk.compute_dtype.itemsize // jax.tree.leaves(params["layers"])[0].dtype.itemsize
        copies += narrow if narrow < layers else chip_bytes(turned(params), section)
        wider += layers - narrow
    relaid = [
        name
        for name, (_, trunk) in trunks.items()
        if queries[name] * shared(trunk, tensor) == 1 and not _by_kernel(trunk)
    ]
    memory += [
        Line(
            "copies of weights", copies,
            "made before the loop: of all layers where these are wider than the compute dtype, else query kernels and"
            " head"
            + ", and the quantized guide" * is_quantized
            + "; on a CPU all that is quantized, dequantized" * (is_quantized and on_cpu(section)),
        ),
        Line(
            "copies of caches", sum(caches[name] for name in relaid) if section["platform"] == "tpu" else 0,
            "made before the loop on TPUs where a kv head has a single query and attention is no kernel, for reading in"
            " another order",
        ),
        Line("work", WORK * vocabulary, f"{WORK} x the rows' float32 logits"),
    ]  # fmt: skip

    # The next prompts are prefilled while the loop's arrays do not exist, but its caches do.
    prompts = max(min(engine.PROMPTS, sizes.prompts or rows) // (data * beside), 1) * data * beside
    prompt = api.padded_length(job.prompt_tokens, config.generate.prompt_bucket) - 1
    chunk = attention.CHUNK if on_cpu(section) else engine.tokens_at_once(prompts)
    works = [decoding.prefill_work(trunk, prompts, prompt, mesh, chunk) for _, trunk in trunks.values()]
    waiting = sum(cache_bytes(trunk, Sizes(prompts, prompt)) for _, trunk in trunks.values())
    beyond = waiting + max(chip_bytes(work, section) for work in works) - sum(line.amount for line in memory[-3:])
    memory.append(
        Line(
            "prefill", max(beyond, 0),
            f"{prompts} prompts x {prompt} positions: their caches and what {min(prompt, chunk)} tokens of each need,"
            " beyond copies and work",
        )
    )  # fmt: skip

    flops, brought, unread = 0.0, Counter(), 0.0
    for name, (params, trunk) in trunks.items():
        tokens = stream * queries[name]
        experts = chip_bytes(params["layers"].get("experts", {}), section)
        unread += experts * max(0.0, 1 - tokens * trunk.experts_per_token / trunk.experts) if experts else 0.0
        products = weights_per_token(params, trunk, tokens) + (name == "reference") * trunk.vocab_size * trunk.embed
        heads = divided(trunk.heads, tensor)
        flops += 2 * products / tensor / beside * tokens
        flops += 4 * trunk.layers * heads * trunk.head_dim * positions * tokens / beside
        width = trunk.compute_dtype.itemsize
        sums = 2 * trunk.layers * tokens * trunk.embed * width
        brought["all-reduce"] += sums * 2 * (tensor - 1) / tensor
        brought["all-gather"] += sums * 3 * (beside - 1) / beside
    brought["all-to-all"] = vocabulary * (mesh.size - 1) / mesh.size
    # A step only looks up rows of the guide's embedding, and of a reference's that is not its head.
    tables = chip_bytes(guide.params["trunk"]["embedding"], section)
    tables += 0 if ref.config.tied else chip_bytes(ref.params["embedding"], section)
    traffic = chip_bytes((ref, guide), section) - wider + sum(caches.values()) - tables - unread
    how = dict(
        computing=f"{flops / 1e12:.4g} TFLOP: 2 x weights, for a token of the reference and {queries[job.learner]} of"
        f" the {job.learner}",
        memory="weights and caches once, without tables that are only looked up in"
        + ", nor experts that no token has" * (unread > 0),
        collectives=f"two sums a layer over tensor {tensor}, the logits exchanged",
    )
    return Forecast(
        rows, tuple(memory), flops, _whole(brought), 0.0, _times(section, flops, traffic, brought, 0.0, how)
    )


def largest(forecast: Any, job: Job, section: Any, step: int) -> int | None:
    """Return the most rows that fit into a chip's memory, a multiple of `step`; 0 if none do, None if unknown."""
    if not section["hbm_bytes"]:
        return None
    fits = lambda count: forecast(job, section, step * count).bytes <= section["hbm_bytes"]  # noqa: E731
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < LARGEST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return step * low


# --- What both count ------------------------------------------------------------------------------------------------


def _times(
    section: Any, flops: float, traffic: float, brought: Counter, slow: float, how: dict[str, str]
) -> tuple[Line, ...]:
    """Return the seconds of a step by what bounds it, as far as the preset has the numbers."""
    lines = []
    if section["flops"]:
        lines.append(Line("computing", flops / section["flops"], how["computing"]))
    if section["hbm_bandwidth"]:
        lines.append(Line("memory", traffic / section["hbm_bandwidth"], f"{traffic / 1e9:.3g} GB: {how['memory']}"))
    total = sum(brought.values())
    if section["ici_bandwidth"] and total:
        seconds = (total - slow) / section["ici_bandwidth"] + (slow and slow / section["dcn_bandwidth"])
        lines.append(Line("collectives", seconds, f"{total / 1e9:.3g} GB: {how['collectives']}"))
    return tuple(lines)


def _by_kernel(trunk: DecoderConfig) -> bool:
    """Return true if a TPU reads caches by a kernel, as they lie, in every layer."""
    return not any(kind.window for kind in trunk.kinds)


def _whole(brought: Counter) -> Counter[str]:
    return Counter({kind: round(size) for kind, size in brought.items() if round(size)})
