"""Memory and time of a run on a mesh, by arithmetic and by the TPU compiler, without a device."""

from qsharp_jax.plan.check import check, problem
from qsharp_jax.plan.forecast import Forecast, Line, decode, fit, largest
from qsharp_jax.plan.job import Job, make
from qsharp_jax.plan.table import lines

__all__ = ["Forecast", "Job", "Line", "check", "decode", "fit", "largest", "lines", "make", "problem"]
