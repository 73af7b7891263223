"""What every test leaves behind as it found it."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True)
def programs_are_kept_by_the_command_line_alone():
    """A command sets the process's cache of compiled programs to its workdir's: no other test is to read from it."""
    yield
    if jax.config.jax_compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
