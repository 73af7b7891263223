"""Paths that cannot be, for every option of every command that takes one: one sentence with the path, exit code 2."""

import json
import shutil
from pathlib import Path

import bpe
import pytest
from commands import CONFIG, SMALL, refused
from text_models import make_ref

from qsharp_jax import cli
from qsharp_jax.cli import judge
from qsharp_jax.models import hf
from qsharp_jax.run import config, pretrain
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir

CONFIGS = Path(CONFIG).parent
LLAMA = ("--config.model.token_shift=False", "--config.model.positions=rope")  # a shape that can be exported

# Paths, by what is to be there; of those that begin with a slash some systems have none.
EVERYWHERE = ("/proc/nope", "FILE/x", "LONG", "LOOP")
FILE_TO_READ = (*EVERYWHERE, "FOLDER", "MISSING/x")
FOLDER_TO_READ = (*EVERYWHERE, "FILE", "MISSING/x")
FILE_TO_WRITE = (*EVERYWHERE, "FOLDER", "MISSING/x", "/sys/nope", "/dev/full")
FOLDER_TO_WRITE = (*EVERYWHERE, "FILE", "/sys/nope/x", "/dev/full")

FEW = ("/proc/nope", "LONG")  # of options that go the way of others

COMMANDS = {  # of which PATH is to be refused
    "run --config PATH --workdir NEW": FILE_TO_READ,
    "run --config CONFIG --workdir PATH": FOLDER_TO_WRITE,
    "run --config CONFIG --workdir NEW --config.ref=PATH": FOLDER_TO_READ,
    "run --config CONFIG --workdir NEW --config.guide=PATH": FOLDER_TO_READ,
    "run --config GSM8K --workdir NEW --config.ref=REF --config.guide=ref --config.generate.max_new_tokens=4"
    " --config.task.data=PATH": FOLDER_TO_READ,
    "compare --config COMPARE --workdir PATH": FEW,
    "collect --config CONFIG --workdir PATH": FEW,
    "collect --workdir PATH": FOLDER_TO_READ,
    "fit --workdir PATH": FEW,
    "evaluate --workdir PATH": FEW,
    "report --workdir PATH": FEW,
    "plan --config PATH": FILE_TO_READ,
    "plan --config CONFIG --config.ref=PATH": FOLDER_TO_READ,
    "export --what ref --workdir PATH --out NEW": FEW,
    "export --what ref --workdir RUN --out PATH": FOLDER_TO_WRITE,
    "generate --workdir PATH a": FEW,
    "generate --ref PATH a": FOLDER_TO_READ,
    "generate --ref REF --guide PATH a": FOLDER_TO_READ,
    "generate --ref REF --input PATH": FILE_TO_READ,
    "generate --ref REF --max-new-tokens 2 a --output PATH": FILE_TO_WRITE,
    "score --ref PATH --input LINES --output NEW": FEW,
    "score --ref REF --guide PATH --input LINES --output NEW": FEW,
    "score --ref REF --input PATH --output NEW": FILE_TO_READ,
    "score --ref REF --input LINES --output PATH": FILE_TO_WRITE,
    "judge --task gsm8k --input PATH --output NEW": FILE_TO_READ,
    "judge --task gsm8k --input LINES --output PATH": FILE_TO_WRITE,
    "judge --task gsm8k --input IDS --output NEW --data PATH": FOLDER_TO_READ,
}


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> dict[str, str]:
    """Paths for the words in capitals; the tests leave it as it is."""
    folder = tmp_path_factory.mktemp("there")
    names = "REF RUN LINES IDS FILE FOLDER LOOP MISSING NEW".split()
    places = {name: folder / name.lower() for name in names} | {"LONG": folder / ("n" * 300)}
    hf.export_ref(make_ref(), places["REF"], tokenizer=bpe.make(), stop_ids=[bpe.EOS])
    settings = config.load(CONFIG, [*SMALL, *LLAMA, "--config.pretrain.steps=1"])
    with Workdir.open(places["RUN"], settings) as workdir:
        pretrain.run(Session(workdir))
    record = {"prompt": "a", "response": "b"}
    places["LINES"].write_text(json.dumps(record | {"answer": "5"}) + "\n")
    places["IDS"].write_text(json.dumps(record | {"problem_id": "x"}) + "\n")
    places["FILE"].write_text("def")
    (places["FOLDER"] / "below").mkdir(parents=True)
    places["LOOP"].symlink_to(places["LOOP"])
    configs = {"COMPARE": "compare_star_graph.py", "GSM8K": "gsm8k/llama3_8b.py"}
    return (
        {name: str(place) for name, place in places.items()}
        | {"CONFIG": CONFIG}
        | {name: str(CONFIGS / path) for name, path in configs.items()}
    )


@pytest.mark.parametrize(("command", "bad"), [(command, path) for command, paths in COMMANDS.items() for path in paths])
def test_a_path_that_cannot_be_is_one_sentence(there, capsys, command, bad):
    first, slash, below = bad.partition("/")
    path = there.get(first, first) + slash + below
    if bad.startswith("/") and not Path("/", *Path(bad).parts[1:2]).exists():
        pytest.skip(f"this system has no {bad}")
    names = there | {"PATH": path}
    parts = [word.rpartition("=") for word in command.split()]
    sentence = refused(capsys, *(option + equals + names.get(word, word) for option, equals, word in parts))
    assert path in sentence and sentence.count(". ") == 0
    assert not Path(there["NEW"]).exists()


def test_a_device_as_output_is_written_to_and_stays_one(there, capsys):
    assert cli.main(["judge", "--task", "gsm8k", "--input", there["LINES"], "--output", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


def test_errors_inside_a_run_s_folder_name_the_file(there, tmp_path, capsys):
    run = shutil.copytree(there["RUN"], tmp_path / "run")
    (run / "rollouts").write_text("")
    assert f"{run / 'rollouts' / 'round_1'}" in refused(capsys, "collect", "--workdir", run)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "/usr/lib/qsharp/x"), OSError("no number")])
def test_an_error_on_another_file_is_no_mistake_of_the_users(there, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(judge, "read", fail)
    with pytest.raises(OSError) as caught:
        cli.main(["judge", "--task", "gsm8k", "--input", there["LINES"], "--output", there["NEW"]])
    assert caught.value is error
