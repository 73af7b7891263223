"""Runs and commands whose models are named by ids on the Hugging Face hub, or are GGUF files."""

import dataclasses
import json

import bpe
import fake_hub
import gguf_files
import numpy as np
import pytest
import transformers
from commands import CONFIG, refused, stdout_lines
from hf_folders import LLAMA, ref
from huggingface_hub import constants

import qsharp_jax
from qsharp_jax import plan
from qsharp_jax.models import hf
from qsharp_jax.run import config as configs
from qsharp_jax.run import sources
from qsharp_jax.run.provenance import _hash_files
from qsharp_jax.run.workdir import Workdir, stored_config

NAME = "owner/model"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a small model with a tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), bpe.make()
    config = dataclasses.replace(LLAMA, vocab_size=len(tokenizer))
    hf.export_ref(ref(config), folder, tokenizer=tokenizer)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_keeps_the_commit_that_it_began_with(files, tmp_path, monkeypatch):
    def settings():
        return configs.load(CONFIG, [f"--config.ref={NAME}"])

    with fake_hub.running(tmp_path / "cache", monkeypatch) as fake:
        commit = fake.push(NAME, files)
        config = settings()
        sources.pin(config, stored_config(tmp_path / "run"))
        sources.make_absolute(config)
        with Workdir.open(tmp_path / "run", config):
            pass
        assert json.loads((tmp_path / "run" / "config.json").read_text())["ref"] == f"{NAME}@{commit}"

        fake.push(NAME, files | {"generation_config.json": b"{}"})
        fake_hub.forget()
        again = settings()
        sources.pin(again, stored_config(tmp_path / "run"))
        with Workdir.open(tmp_path / "run", again) as workdir:
            assert sources.folder(workdir.config, "ref").name == commit
            assert sources.folder(workdir.config, "guide") is None
        other = settings()
        sources.pin(other, None)
        assert sources.folder(other, "ref").name != commit


def test_commands_and_load_take_an_id_from_the_cache(files, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fake_hub.forget()
    fake_hub.put_into_cache(tmp_path, NAME, files)
    loaded = qsharp_jax.load(NAME)
    assert loaded.ref.config.embed == LLAMA.embed
    line = stdout_lines(capfd, "generate", "--ref", NAME, "--eta", "inf", "--max-new-tokens", "2", "eggs")[0]
    assert line["settings"]["ref"] == f"{NAME}@{'a' * 40}"


def test_a_plan_downloads_no_weights(files, tmp_path, monkeypatch):
    changes = ("generate.max_new_tokens=8", "generate.prompt_bucket=8")
    config = configs.load(CONFIG, [f"--config.{change}" for change in (f"ref={NAME}", *changes)])
    with fake_hub.running(tmp_path / "cache", monkeypatch) as fake:
        fake.push(NAME, files)
        job = plan.make(config)
        assert job.ref.config.embed == job.guide.config.trunk.embed == LLAMA.embed
        assert config.ref == NAME
        assert not any("safetensors" in path for path in fake.requested)


def test_a_model_that_cannot_be_fetched_ends_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fake_hub.forget()
    message = "could not be fetched from the Hugging Face hub (HF_HUB_OFFLINE is set)"
    assert message in refused(capsys, "generate", "--ref", NAME, "eggs")
    assert message in refused(capsys, "run", "--config", CONFIG, "--workdir", tmp_path / "run", f"--config.ref={NAME}")
    assert not (tmp_path / "run").exists()


def test_a_gguf_file_with_its_tokenizer_and_chat(files, tmp_path, capfd):
    """The same model in both forms has the same responses."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    state = {
        key: tensor.numpy()
        for key, tensor in transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict().items()
    }
    config = transformers.AutoConfig.from_pretrained(folder)
    tensors, _ = gguf_files.model_tensors(config, state)
    metadata = gguf_files.model_metadata(config) | gguf_files.tokenizer_metadata(
        bpe.make(), "gpt-2", add_bos_token=True
    )
    gguf_files.write(tmp_path / "model.gguf", "llama", metadata, tensors)
    options = (
        "--prompt-format",
        "chat",
        "--eta",
        "inf",
        "--temperature",
        "0",
        "--max-new-tokens",
        "5",
        "How many eggs?",
    )
    lines = [
        stdout_lines(capfd, "generate", "--ref", model, *options)[0] for model in (folder, tmp_path / "model.gguf")
    ]
    assert lines[0]["tokens"] == lines[1]["tokens"] and lines[0]["response"] == lines[1]["response"]
    np.testing.assert_allclose(lines[0]["log_probs"], lines[1]["log_probs"], rtol=1e-4)


def test_a_gguf_file_is_hashed_like_those_of_a_folder(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert _hash_files(tmp_path, {}) == _hash_files(tmp_path / "model.gguf", {}) != {}
