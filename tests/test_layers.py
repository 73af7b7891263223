"""The import rules: which packages each package may import, and that no package has a loose or circular import."""

import ast
from pathlib import Path

import pytest
from repository import ROOT

PACKAGE = ROOT / "qsharp_jax"

# Every package, and those that it may import beside itself. Nothing imports `cli`. The records of algorithms lie below a
# run, which reads them; their code lies above it.
ALLOWED = {
    "system": set(),
    "values": set(),
    "sampling": {"system"},
    "guidance": {"values", "sampling"},
    "models": {"system"},
    "tasks": {"system"},
    "data": {"system"},
    "decoding": {"system", "values", "sampling", "guidance", "models"},
    "rollouts": {"system", "sampling", "models", "tasks", "data", "decoding"},
    "train": {"system", "values", "guidance", "sampling", "models", "data"},
    "algorithms.base": set(),
    "algorithms.registry": {"algorithms.base"},
    "run": {"system", "values", "sampling", "models", "tasks", "data", "decoding", "train", "algorithms.registry"},
    "evaluation": {
        "system", "values", "guidance", "sampling", "models", "tasks", "data", "decoding", "rollouts", "run",
        "algorithms.registry",
    },
    "algorithms": {
        "algorithms.base", "system", "values", "guidance", "sampling", "models", "tasks", "data", "decoding", "rollouts", "train", "run",
        "evaluation",
    },
    "report": {"system", "data", "run", "evaluation", "algorithms.registry"},
    "plan": {"system", "sampling", "models", "tasks", "data", "decoding", "train", "run"},
    "configs": {"run"},
    "experiments": {
        "system", "models", "data", "decoding", "train", "run", "evaluation", "algorithms", "report", "plan",
        "algorithms.registry",
    },
    "notebook": {
        "system", "sampling", "models", "tasks", "data", "decoding", "rollouts", "run", "evaluation", "report", "experiments",
        "algorithms.registry",
    },
    "integrations": set(),
    "serving": {"system", "sampling", "models", "data", "decoding"},
    "cli": {
        "serving", "system", "sampling", "models", "tasks", "data", "decoding", "rollouts", "train", "run", "evaluation",
        "algorithms", "algorithms.registry", "report", "plan", "experiments",
    },
}  # fmt: skip


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path) for path in FILES}


def imports(path: Path, *, packages: bool = False) -> set[str]:
    """The modules of the package that a file imports, dotted, wherever in the file.

    Args:
      packages: also those that `from package import module` runs on the way.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qsharp_jax."):
            package = node.module.removeprefix("qsharp_jax.")
            names |= {full if (full := f"{package}.{alias.name}") in MODULES else package for alias in node.names}
            names |= {package} if packages else set()
        elif isinstance(node, ast.ImportFrom) and node.module == "qsharp_jax":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("qsharp_jax.") for alias in node.names}
    return names & MODULES


def room(name: str) -> str:
    """Return the package of a module, or the module itself if it has rules of its own."""
    return name if name in ALLOWED else name.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_package_may(path):
    own = room(module(path))
    assert {room(name) for name in imports(path)} - {own} <= ALLOWED[own]


def test_the_rules_have_no_circle():
    """The table can be sorted so that every package comes after those that it imports."""
    placed = set()
    while rest := {name: uses - placed for name, uses in ALLOWED.items() if name not in placed}:
        ready = {name for name, uses in rest.items() if not uses}
        assert ready, f"a circle among {sorted(rest)}"
        placed |= ready


def test_modules_do_not_import_each_other():
    uses = {module(path): imports(path, packages=True) - {module(path)} for path in FILES}
    while ready := {name for name, others in uses.items() if not others & uses.keys()}:
        uses = {name: others for name, others in uses.items() if name not in ready}
    assert not uses


def test_few_modules_lie_loose_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 6
