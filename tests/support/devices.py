"""Devices that are not there: more CPUs for another process, and what is traced for accelerators, on this CPU."""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import jax
from jax.experimental.pallas import tpu as pltpu


def fake_devices(count: int) -> str:
    """XLA_FLAGS for a process with so many devices that compiles as this one does."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Trace the branches of a platform ("cpu", "cuda", "tpu") in place of the ones for the devices that are there."""

    def dependent(*operands, default=None, **branches):
        return branches.get(platform, default)(*operands)

    # The interpreter of kernels takes no arrays with a memory space.
    anywhere = mock.patch.object(pltpu, "with_memory_space_constraint", lambda x, space: x)
    with mock.patch.object(jax.lax, "platform_dependent", dependent), anywhere:
        yield
