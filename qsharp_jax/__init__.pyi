from qsharp_jax import guidance as guidance
from qsharp_jax import values as values
from qsharp_jax.decoding import ContinuousBatch as ContinuousBatch
from qsharp_jax.decoding import generate as generate
from qsharp_jax.decoding import stream as stream
from qsharp_jax.run.folders import load as load
from qsharp_jax.sampling import Sampling as Sampling

__version__: str
