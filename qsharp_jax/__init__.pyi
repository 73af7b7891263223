from qsharp_jax import guidance as guidance
from qsharp_jax import values as values
from qsharp_jax.decoding import ContinuousBatch as ContinuousBatch
from qsharp_jax.notebook.evaluating import evaluate as evaluate
from qsharp_jax.notebook.generating import generate as generate
from qsharp_jax.notebook.generating import stream as stream
from qsharp_jax.notebook.guides import load_guide as load_guide
from qsharp_jax.notebook.training import train_guide as train_guide
from qsharp_jax.run.folders import load as load
from qsharp_jax.sampling import Sampling as Sampling

__version__: str
