"""Names that `import qsharp_jax` gives to a notebook."""

import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

import qsharp_jax


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("qsharp_jax", {"jax", "numpy", "flax"}),
        ("qsharp_jax.run.schema, qsharp_jax.run.config", {"jax"}),  # so that `--help`, recipes and refusals are quick
        (
            "qsharp_jax.tasks.registry, qsharp_jax.tasks.judging, qsharp_jax.data.records, qsharp_jax.data.tokenizer",
            {"transformers", "tokenizers", "datasets", "pyarrow", "math_verify"},
        ),
    ],
)
def test_importing_is_light(modules, heavy):
    code = f"import sys, {modules}; assert not {heavy} & {{*sys.modules}}, {heavy} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_decoding_imports_where_fcntl_is_missing():
    """Windows has no fcntl; `resource` is imported on Linux by psutil itself."""
    code = "import sys; sys.modules.update(fcntl=None); import qsharp_jax.decoding"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", qsharp_jax.__all__)
def test_every_public_name_is_there(name):
    assert getattr(qsharp_jax, name) is not None and name in dir(qsharp_jax)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(qsharp_jax, "nothing")  # noqa: B009


def test_the_stub_names_what_the_package_has():
    """An IDE reads the stub; a name that stands in one place only would be missing in the other."""
    stub = Path(qsharp_jax.__file__).with_name("__init__.pyi").read_text()
    assert {line.split()[-1] for line in stub.splitlines() if " as " in line} == set(qsharp_jax.__all__) - {"__version__"}
