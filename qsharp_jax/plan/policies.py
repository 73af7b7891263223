"""Memory of a policy's run beside that of a step: pi_ref during updates, the training's state during sampling.

Lines are (what, bytes on a chip, how it was computed).
"""

import math
from typing import Any

import jax

from qsharp_jax.models import sharding
from qsharp_jax.models.sharding import placed
from qsharp_jax.plan.job import Job, abstract_mesh, chip_bytes, fitted_state, learned
from qsharp_jax.train.chunked import NUMBERS

LOGITS = 8  # bytes per number of the logits: themselves, and their gradient


def beside_updates(job: Job, section: Any, rows: int, tokens: int) -> list[tuple[str, float, str]]:
    """Count pi_ref, and the logits of a part of the batch with `rows` and `tokens` on a chip."""
    if not job.is_policy:
        return []
    mesh = abstract_mesh(section, "decode")
    ref = placed(job.ref, sharding.of_model(job.ref, mesh, sharding.DECODE))
    own = _joined(job, section) if share_base(job, section) else chip_bytes(ref, section)
    vocabulary = job.ref.config.vocab_size
    parts = math.prod(abstract_mesh(section, "fit").shape[axis] for axis in ("data", "fsdp"))
    logits = min(max(NUMBERS // parts, rows * vocabulary), tokens * vocabulary) * LOGITS
    return [
        ("pi_ref", own, "divided as for decoding"),
        ("logits", logits, f"of as many tokens at once as in `train/chunked.py`, x {LOGITS} bytes"),
    ]


def beside_sampling(job: Job, section: Any) -> list[tuple[str, float, str]]:
    """Count the state of the training."""
    if not job.is_policy:
        return []
    params, _, moments = fitted_state(job, section)
    state = chip_bytes((params, moments), section)
    if share_base(job, section):
        state -= sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(learned(job, job.fitted)[1]))
        return [
            ("training state", state, "weights and optimizer of the policy"),
            ("pi_ref's joined weights", _joined(job, section), "of modules with the same input, as on GPUs"),
        ]
    return [("training state", state, "weights and optimizer of the policy, divided as for the fit")]


def _joined(job: Job, section: Any) -> int:
    """Count the weights of which a GPU decodes pi_ref with copies, joined as in `models/gpu_form.py`."""
    if section["platform"] != "gpu":
        return 0
    layers = job.ref.params["layers"]
    modules = [layers[name] for name in ("query", "key", "value", "gate", "up") if name in layers]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(modules))


def share_base(job: Job, section: Any) -> bool:
    """Return true if a LoRA is trained on pi_ref's own arrays: on one device, where nothing has to move."""
    return job.is_policy and job.config.fit.lora_rank > 0 and abstract_mesh(section, "fit").size == 1
