"""Resources of this machine: cores, free memory, and the most memory that this process has used."""

import os
import sys

import psutil

try:
    import resource
except ImportError:  # Windows
    resource = None


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int:
    """Return how many bytes can still be allocated, including the file cache."""
    return psutil.virtual_memory().available


def total_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return psutil.virtual_memory().total


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    if resource is None:
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in KiB on Linux
