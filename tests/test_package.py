"""Names that `import qsharp_jax` gives to a notebook."""

import subprocess
import sys
from pathlib import Path

import pytest

import qsharp_jax


def test_importing_the_package_is_light():
    code = "import sys, qsharp_jax; assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_decoding_imports_where_fcntl_is_missing():
    """Windows has no fcntl; `resource` is imported on Linux by psutil itself."""
    code = "import sys; sys.modules.update(fcntl=None); import qsharp_jax; qsharp_jax.stream"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", qsharp_jax.__all__)
def test_every_public_name_is_there(name):
    assert getattr(qsharp_jax, name) is not None and name in dir(qsharp_jax)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(qsharp_jax, "nothing")  # noqa: B009


def test_the_stub_names_what_the_package_has():
    """An IDE reads the stub; a name that stands in one place only would be missing in the other."""
    stub = Path(qsharp_jax.__file__).with_name("__init__.pyi").read_text()
    assert {line.split()[-1] for line in stub.splitlines() if " as " in line} == set(qsharp_jax.__all__) - {"__version__"}
