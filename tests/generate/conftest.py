import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """These programs are small and many: compiling them well takes longer than running them ever will."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
