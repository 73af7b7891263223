"""Models by their ids: what is downloaded, when the cache is enough, and each refusal in one sentence."""

import socket
import time

import fake_hub
import pytest
from hf_folders import LLAMA, refusal
from huggingface_hub import constants

from qsharp_jax.models import hf
from qsharp_jax.models.hf import hub

NAME = "owner/model-1.0"


@pytest.fixture
def online(tmp_path, monkeypatch):
    with fake_hub.running(tmp_path / "cache", monkeypatch) as fake:
        yield fake


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The cache's folder, with the hub out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fake_hub.forget()
    yield tmp_path / "cache"
    fake_hub.forget()


@pytest.fixture
def files(made):
    return {path.name: path.read_bytes() for path in (made / "llama").iterdir()}


def test_ids_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in (NAME, "o/n@main", "o/n@" + "a" * 40, "o/n@refs/pr/1"):
        assert hub.is_id(word)
    for word in ("name", "./o/n", "/o/n", "a/b/c", "~/n", "../n", "o/n.gguf", "o/", "o/n@", "C:\\o/n"):
        assert not hub.is_id(word) and hub.pin(word) == word
    (tmp_path / "owner" / "model-1.0").mkdir(parents=True)
    assert not hub.is_id(NAME), "a folder of this name comes first"
    assert hub.find(NAME) == (tmp_path / NAME).relative_to(tmp_path)


def test_only_what_is_needed_is_downloaded(online, files):
    useless = ("pytorch_model.bin", "onnx/model.onnx", "onnx/model.safetensors", "consolidated.safetensors", "a.gguf")
    commit = online.push(NAME, files | dict.fromkeys(useless, b"useless") | {"README.md": b"# A model"})
    folder = hub.find(NAME)
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert hf.read_config(folder, "float32") == LLAMA and hf.load_ref(folder, dtype="float32")
    assert hub.pin(NAME) == hub.pin(f"{NAME}@main") == f"{NAME}@{commit}"
    requests = len(online.requested)
    assert hub.find(NAME) == folder and len(online.requested) == requests, "asked once in a process"


def test_without_weights_none_are_downloaded_and_none_are_missed(online, files):
    online.push(NAME, files)
    folder = hub.find(NAME, weights=False)
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json"}
    assert hf.read_config(folder, "float32") == LLAMA
    online.stop()
    fake_hub.forget()
    assert hub.find(NAME, weights=False) == folder
    assert "not completely, in its cache" in refusal(hub.find, NAME)


def test_a_commit_stays_when_the_branch_moves_on(online, files):
    first = online.push(NAME, files)
    pinned = hub.pin(NAME)
    second = online.push(NAME, files | {"generation_config.json": b'{"eos_token_id": 7}'})
    fake_hub.forget()
    assert hub.pin(NAME, earlier=pinned) == hub.pin(pinned) == f"{NAME}@{first}"
    assert hub.pin(NAME) == hub.pin(f"{NAME}@main", earlier=pinned) == f"{NAME}@{second}"
    assert hub.pin(NAME, earlier=f"owner/model@{first}") == f"{NAME}@{second}", "of another model"
    assert hub.find(pinned).name == first and hub.find(NAME).name == second


def test_the_gguf_file_of_a_model_without_safetensors(online, offline, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    online.push("o/one", {"config.json": b"{}", "model-Q8_0.gguf": b"GGUF", "README.md": b""})
    assert (hub.find("o/one") / "model-Q8_0.gguf").read_bytes() == b"GGUF"
    online.push("o/two", {"model-Q8_0.gguf": b"GGUF", "model-Q4_0.gguf": b"GGUF"})
    words = "the model o/two has 2 GGUF files (model-Q8_0.gguf, model-Q4_0.gguf); download one by `hf download o/two FILE`"
    assert words in refusal(hub.find, "o/two")
    assert not any("two/resolve" in path for path in online.requested)
    online.push("o/none", {"README.md": b""})
    assert "has neither safetensors nor a GGUF file" in refusal(hub.find, "o/none")
    fake_hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (hub.find("o/one") / "model-Q8_0.gguf").exists()


@pytest.mark.parametrize(
    "answer, message",
    [
        ((404, "RepoNotFound"), f"there is no folder {NAME}, and no public model of this name on the Hugging Face hub; check"),
        ((401, ""), f"the Hugging Face hub refused the model {NAME} (HTTP 401); log in by `hf auth login`, or try again"),
        ((403, "GatedRepo"), f"the model {NAME} is gated; accept its terms on https://huggingface.co/{NAME}, and log in"),
        ((404, "RevisionNotFound"), f"the model {NAME} on the Hugging Face hub has no revision 'v2'"),
        ((503, ""), f"there is no folder {NAME}@v2, and the model of this name could not be fetched"),
    ],
)  # fmt: skip
def test_refusals_of_the_hub(answer, message, online):
    online.refusals[NAME] = answer
    words = refusal(hub.find, f"{NAME}@v2")
    assert words.startswith(message) and words.count(". ") == 0 and "\n" not in words


def test_without_a_network_the_cache_is_enough(online, files):
    online.push(NAME, files)
    folder = hub.find(NAME)
    online.stop()
    fake_hub.forget()
    assert hub.find(NAME) == folder and hub.find(f"{NAME}@{folder.name}") == folder
    start = time.perf_counter()
    assert "could not be fetched from the Hugging Face hub ([Errno" in refusal(hub.find, "owner/other")
    assert "could not be fetched from the Hugging Face hub ([Errno" in refusal(hub.find, f"{NAME}@v2")
    assert time.perf_counter() - start < 5


def test_offline_by_choice(offline, files):
    folder = fake_hub.put_into_cache(offline, NAME, files)
    assert hub.find(NAME) == hub.find(f"{NAME}@main") == hub.find(f"{NAME}@{'a' * 40}") == folder
    assert hub.pin(NAME) == f"{NAME}@{'a' * 40}"
    for name in ("owner/other", f"{NAME}@v2"):
        assert (
            f"there is no folder {name}, and the model of this name could not be fetched from the Hugging Face hub"
            in (words := refusal(hub.find, name))
        )
        assert "(HF_HUB_OFFLINE is set) and is not, or not completely, in its cache; give a folder" in words


def test_a_hub_that_does_not_answer_is_given_up(offline, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "TIMEOUT", 0.5)
        start = time.perf_counter()
        assert "could not be fetched from the Hugging Face hub (" in refusal(hub.find, NAME)
        assert time.perf_counter() - start < 5
