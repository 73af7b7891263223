"""Words, paths and ids as a config names models; ids of a hub are in test_hub_models.py."""

from commands import CONFIG

from qsharp_jax.run import config as configs
from qsharp_jax.run import sources


def test_paths_are_made_absolute_and_words_left_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    config = configs.load(CONFIG, ["--config.ref=models/../ref", "--config.guide=~/guide"])
    sources.make_absolute(config)
    assert (config.ref, config.guide) == (str(tmp_path / "ref"), "/home/someone/guide")
    config = configs.load(CONFIG, [])
    sources.make_absolute(config)
    assert (config.ref, config.guide) == ("pretrain", "ref")


def test_words_are_no_folders(tmp_path):
    config = configs.load(CONFIG, [f"--config.guide={tmp_path}"])
    assert sources.folder(config, "ref") is None
    assert sources.folder(config, "guide") == tmp_path
