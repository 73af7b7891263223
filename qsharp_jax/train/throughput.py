"""Training speed: model FLOP/s, their share of what the devices can do, and the share of time spent in steps.

FLOPs are counted as in PaLM, appendix B (Chowdhery et al., arXiv 2204.02311): what the model's forward and backward
passes need, without recomputation and padding. Shapes: B rows, T tokens.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from qsharp_jax.data.batches import Batch
from qsharp_jax.models import decoder, moe
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.value import ValueConfig

Flops = Callable[[Batch], float]  # FLOPs of one training step on a batch

# --- FLOPs of a step ------------------------------------------------------------------------------------------------


def language_model_flops(config: DecoderConfig) -> Flops:
    """`step_flops` for a language model; its output head counts for every token, tied or not."""
    return _flops(config, config.embed * config.vocab_size)


def guide_flops(config: ValueConfig, future_offsets: int = 0) -> Flops:
    """`step_flops` for a guide with heads of the future-token loss; a Q-type reads only the token's own columns."""
    return _flops(config.trunk, config.trunk.embed * (config.outputs + future_offsets * config.trunk.vocab_size))


def _flops(config: DecoderConfig, head: int) -> Flops:
    leaves = jax.tree.leaves_with_path(decoder.abstract(config)["layers"])
    kernels = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
    kernels += moe.products(config, config.experts_per_token)
    return functools.partial(
        step_flops, matmul_parameters=kernels + head, attention=config.layers * config.heads * config.head_dim
    )


def step_flops(batch: Batch, *, matmul_parameters: int, attention: int) -> float:
    """Floating-point operations of forward and backward pass on a batch; a multiply-add counts as two.

    6 N per token plus 12 L H E n per token of a sequence of n: 2 N and 4 L H E n forward (scores and weighted sum of
    values), twice that backward. As in PaLM, causal attention counts as if every token attended to its whole sequence.
    Padding, rematerialization, embedding lookups, norms, softmax and the optimizer are not counted.

    Args:
      matmul_parameters: N, parameters that a token is multiplied with: the blocks' kernels, its own experts, and the
        output head.
      attention: L H E, layers times query heads times head width.
    """
    lengths = _lengths(np.asarray(batch.segments)).astype(float)
    return 6.0 * matmul_parameters * lengths.sum() + 12.0 * attention * (lengths**2).sum()


def _lengths(segments: np.ndarray) -> np.ndarray:
    """Tokens in every segment of every row, from segments [B, T] with 0 at padding."""
    most = int(segments.max(initial=0)) + 1
    numbered = segments + most * np.arange(len(segments))[:, None]
    return np.bincount(numbered.reshape(-1), minlength=most * len(segments)).reshape(-1, most)[:, 1:].reshape(-1)


# --- What devices can do --------------------------------------------------------------------------------------------

# Dense bfloat16 FLOP/s of one JAX device, by a part of its `device_kind`; from the vendors' data sheets.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "A100": 312e12,
    "H100": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989.4e12,  # and GH200
    "H200 NVL": 835e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
}


def device_peak(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device of this `device_kind`; None if it is not in the table, such as a CPU."""
    names = [name for name in PEAKS if name in kind]
    return PEAKS[max(names, key=len)] if names else None


def peak(params: Any) -> float | None:
    """Total FLOP/s of all devices that hold the parameters; None if one of them is unknown."""
    devices = set().union(*(leaf.sharding.device_set for leaf in jax.tree.leaves(params)))
    peaks = [device_peak(device.device_kind) for device in devices]
    return None if None in peaks else sum(peaks)


# --- Where the time goes --------------------------------------------------------------------------------------------


class Clock:
    """Wall time of a training in this process, divided into steps and everything else.

    Steps are dispatched asynchronously, so time is read only where the device is known to be done (`lap`). The time the
    device had to wait is subtracted from a lap: calls that compile, gaps between steps after which the device was idle,
    and everything under `lost`. Time that may be either, such as compiling while earlier steps still run, counts as
    lost, so goodput is never overstated.
    """

    def __init__(self, flops: Flops | None = None):
        self._flops = flops
        self._began = time.monotonic()
        self._useful = 0.0  # seconds, in all laps
        self._shapes: set = set()  # of batches already compiled for
        self.warm = 0  # steps since the last one that compiled
        self._restart()

    def _restart(self) -> None:
        self._lap, self._lost, self._tokens, self._operations = time.monotonic(), 0.0, 0, 0.0
        self._gap = self._lap  # start of the current gap between steps, moved by what is lost within it

    def start(self, params: Any) -> None:
        """End the preparations, such as reading a checkpoint, before the first step on these parameters."""
        self._peak = peak(params)
        self._restart()

    @contextlib.contextmanager
    def lost(self) -> Iterator[None]:
        """Count the time inside as lost; the device must have finished all steps."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self._lost, self._gap = self._lost + seconds, self._gap + seconds

    @contextlib.contextmanager
    def step(self, batch: Batch, previous: dict[str, jax.Array]) -> Iterator[None]:
        """Time the call of a step on a batch; the first of a shape compiles, or loads a program, and counts as lost.

        Args:
          previous: metrics of the previous step: if they are ready, the device has waited for this batch.
        """
        if all(metric.is_ready() for metric in previous.values()):
            self._lost += time.monotonic() - self._gap
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))
        compiles = shapes not in self._shapes
        with self.lost() if compiles else contextlib.nullcontext():
            yield
        self._shapes.add(shapes)
        self.warm = 0 if compiles else self.warm + 1
        self._tokens += int(np.count_nonzero(batch.segments))
        if self._flops is not None:
            self._operations += self._flops(batch)
        self._gap = time.monotonic()

    def busy(self) -> None:
        """Note that the devices have been busy until now: what is lost between two steps is counted from here."""
        self._gap = time.monotonic()

    def lap(self) -> dict[str, float]:
        """Return the speed since the last lap; call it when the device has finished every step.

        Returns:
          seconds: wall time since the last lap, including lost time.
          tokens_per_second: of steps, without padding.
          flops, flops_per_second: model FLOPs since the last lap, and FLOP/s of steps; only if FLOPs are counted.
          mfu: FLOP/s as a share of the devices' dense bfloat16 peak; only if that is known.
          goodput: the share of steps in all wall time of this clock; mfu * goodput is the share of the peak that the
            whole training uses.
        """
        now = time.monotonic()
        seconds = max(now - self._lap - self._lost, 1e-9)
        self._useful += seconds
        speed = {"seconds": now - self._lap, "tokens_per_second": self._tokens / seconds}
        if self._flops is not None:
            speed["flops"] = self._operations
            speed["flops_per_second"] = self._operations / seconds
            if self._peak is not None:
                speed["mfu"] = self._operations / seconds / self._peak
        speed["goodput"] = self._useful / max(now - self._began, 1e-9)
        self._restart()
        return speed
