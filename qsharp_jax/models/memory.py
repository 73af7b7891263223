"""The memory that arrays will take, checked against what the devices have before any array is made."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qsharp_jax.system import machine
from qsharp_jax.system.errors import UserError

GB = 1e9
DEQUANTIZED = "dequantized"  # in the names of parts that only a CPU needs, see `cpu_form.dequantized_copies`


def check_memory(parts: Mapping[str, Any], *, existing: Mapping[str, Any] | None = None) -> None:
    """Check that arrays still to be made fit on this process' devices.

    Args:
      parts: trees of `jax.ShapeDtypeStruct`s by name, such as {"the weights": ..., "the cache": ...}. A leaf without a
        sharding is for the default device. CPU devices share the host's memory.
      existing: trees of arrays that are there already: the message names them, the count does not include them.

    Raises:
      UserError: with the bytes of each part and what is free, in GB of 1e9 bytes.
    """
    needs = _needs(parts)
    for device in dict.fromkeys(device for device, _ in needs):
        total = sum(size for (other, _), size in needs.items() if other == device)
        free = available(device)
        if free is not None and total > free:
            advice = "use bfloat16, a smaller batch, a shorter context or more devices"
            if any(DEQUANTIZED in part for part in parts):
                advice = "leave quantization out, which saves no memory on a CPU, or " + advice
            beside = f" beside {_words(existing, _needs(existing), device)}" if existing else ""
            raise UserError(
                f"{device.platform} {device.id} has {free / GB:.2f} GB of memory free{beside}, and"
                f" {_words(parts, needs, device)} are needed on it; {advice}"
            )


def _needs(parts: Mapping[str, Any]) -> Counter[tuple[jax.Device, str]]:
    """Bytes of each part on each device."""
    needs: Counter[tuple[jax.Device, str]] = Counter()
    for part, tree in parts.items():
        for leaf in jax.tree.leaves(tree):
            for device, size in _bytes(leaf).items():
                needs[device, part] += size
    return needs


def _words(parts: Mapping[str, Any], needs: Counter[tuple[jax.Device, str]], device: jax.Device) -> str:
    return " and ".join(f"{part} {needs[device, part] / GB:.2f} GB" for part in parts)


def available(device: jax.Device) -> int | None:
    """Bytes that can still be allocated on a device; None if the device does not report them."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if {"bytes_limit", "bytes_in_use"} <= set(stats) else None
    return machine.free_memory()


def total(device: jax.Device) -> int:
    """Bytes of a device's memory, whatever runs beside; 16 GiB if the device does not report them."""
    if device.platform == "cpu":
        return machine.total_memory()
    return (device.memory_stats() or {}).get("bytes_limit", 16 << 30)


def _bytes(leaf: jax.ShapeDtypeStruct | jax.Array) -> Counter[jax.Device]:
    """Bytes of one array on each device; those of CPU devices are all counted on the first."""
    sizes: Counter[jax.Device] = Counter()
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(default_device())
    count = math.prod(sharding.shard_shape(leaf.shape))
    for device in sharding.addressable_devices:
        own = jax.local_devices(backend="cpu")[0] if device.platform == "cpu" else device
        sizes[own] += math.ceil(count * item_bytes(leaf.dtype, device.platform))
    return sizes


def item_bytes(dtype: Any, platform: str) -> float:
    """Bytes of a number in an array on a platform's devices: of two of 4 bits only CPUs use more than one."""
    return 0.5 if dtype == jnp.int4 and platform != "cpu" else jnp.dtype(dtype).itemsize


def default_device() -> jax.Device:
    """The device on which JAX puts arrays by default."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]
