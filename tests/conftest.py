"""How programs are compiled in tests, and what every test leaves behind as it found it."""

import gc
import os

import jaxlib.version

# Compiling takes most of the tests' time, and half as much without the newer emitters of XLA for CPUs; a tenth of the rest
# goes into cutting small programs into parts to be compiled on several cores. XLA reads its flags when it starts, and ends
# the process at one that it does not know: they are given to the version they were tried with.
if jaxlib.version.__version__.startswith("0.10."):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

# gcsfs reads it when it is first imported, by whichever test: else it asks for Google's machines by another protocol.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

# Programs of tests are small and many: compiling them well takes longer than running them ever will.
jax.config.update("jax_disable_most_optimizations", True)

# Examples that compile take long, and the machine may be busy.
hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")


def pytest_collection_finish():
    leave_out_of_later_collections()


@pytest.fixture(autouse=True, scope="module")
def later_files_do_not_look_through_this_one_s_objects():
    yield
    # What is lowered keeps MLIR's context, and a new one looks through all that there are: after 2,000 tests that took
    # six sevenths of the time.
    jax.clear_caches()
    leave_out_of_later_collections()


def leave_out_of_later_collections():
    """Readers of checkpoints collect garbage many times: each takes a second once the tests before have left much."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def programs_are_kept_by_the_command_line_alone():
    """A command sets the process's cache of compiled programs to its workdir's: no other test is to read from it."""
    yield
    if jax.config.jax_compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
