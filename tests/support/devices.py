"""CPU devices that are not there: XLA reads their number when it starts, so they are for another process."""

import os


def fake_devices(count: int) -> str:
    """XLA_FLAGS for a process with so many devices that compiles as this one does."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
