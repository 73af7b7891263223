"""The README and the pages under docs/: they build without a warning, and their code and commands run."""

import re
import shlex
import subprocess
import sys

import bpe
import pytest
import reference
from repository import ROOT
from text_models import make_guide, make_ref

from qsharp_jax.cli import commands
from qsharp_jax.models import hf

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
COMMANDS = [
    pytest.param(line.partition(" #")[0], id=f"{page.stem}: {line[:60]}")
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip().startswith("qsharp ")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with "my-model" and "my-guide", as the pages call them."""
    folder = tmp_path_factory.mktemp("folders")
    hf.export_ref(make_ref(), folder / "my-model", tokenizer=bpe.make(), stop_ids=[bpe.EOS, bpe.EOT])
    hf.export_guide(make_guide(), folder / "my-guide", tokenizer=bpe.make())
    return folder


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_a_page_parse(line):
    words = shlex.split(line.partition("&")[0].replace("$i", "0"))
    options, rest = commands.parser().parse_known_args(words[1:])
    assert all(word.startswith("--config.") for word in rest)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_that_a_page_names_are_there():
    gone = {"qsharp_jax/tasks/sums.py", "benchmarks/sentiment.py"}  # to be written, and that of an older commit
    path = r"(?<![\w./-])(?:benchmarks|configs|docs|examples|launch|qsharp_jax|tests)/[\w/.-]*\.(?:ipynb|jsonl|md|png|py|sh|yaml)\b"
    for page in [*PAGES, *sorted((ROOT / "benchmarks").glob("*.md"))]:
        named = set(re.findall(path, page.read_text(encoding="utf-8"))) - gone
        assert [name for name in sorted(named) if not (ROOT / name).exists()] == [], page.name


def test_lines_that_the_copy_of_an_algorithm_replaces_are_there():
    source = (ROOT / "qsharp_jax" / "algorithms" / "ppo.py").read_text(encoding="utf-8").splitlines()
    lines = [line for block in blocks(ROOT / "CONTRIBUTING.md", "diff") for line in block.splitlines()]
    removed = [line[1:] for line in lines if line.startswith("-")]
    assert removed and set(removed) <= set(source)


def test_the_readme_is_one_screen_to_the_first_result():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_the_pages_build_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").is_file()


@pytest.mark.parametrize("name", reference.PAGES)
def test_generated_pages_are_up_to_date(name):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == reference.PAGES[name](), "run python docs/reference.py"
