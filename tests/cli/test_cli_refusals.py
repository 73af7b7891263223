"""Refusals of `qsharp generate` and `score` for models, settings and files, before weights are read."""

import socket

import bpe
import jax
import small_data
from commands import refused
from text_models import USED, make_guide, make_ref

from qsharp_jax.models import memory

PROMPT = "How many eggs?"
FEW = ("--prompt-format", "plain", "--max-new-tokens", 8)


def test_a_date_that_is_none_is_one_sentence(light, tmp_path, capsys):
    for date in ("2024-02-30", "29.2.2024", "20240229", "2024-2-9", "2024-W09-4", "today", ""):
        assert f"{date!r} is not a date" in refused(capsys, "generate", PROMPT, "--ref", light[0], "--date", date)
    assert "--date goes with --ref" in refused(
        capsys, "generate", PROMPT, "--workdir", tmp_path, "--date", "2024-02-29"
    )


def test_the_workdir_of_a_comparison_is_not_one_of_a_run(tmp_path, capsys):
    run = tmp_path / "seed_0" / "qsharp"
    run.mkdir(parents=True)
    for folder in (run, tmp_path):
        (folder / "config.json").write_text("{}")
    of = ("evaluate", "--of", tmp_path, "--workdir", tmp_path / "new")
    commands = [("report",), ("run",), ("export", "--what", "ref", "--out", "o")]
    for command in (of, *((*command, "--workdir", tmp_path) for command in commands)):
        words = refused(capsys, *command)
        assert f"{tmp_path} holds a comparison of several runs; give the workdir of one of them, as {run}" in words


def test_models_that_are_not_given_or_given_twice(light, tmp_path, capsys):
    ref, guide = light
    source, output = (
        small_data.write_lines(tmp_path / "in.jsonl", [{"prompt": "a", "response": "b"}]),
        tmp_path / "out.jsonl",
    )
    files = ("--input", source, "--output", output)
    for arguments, words in [
        (("generate", PROMPT), "there are no models"),
        (("score", *files), "there are no models"),
        (("generate", PROMPT, "--ref", ref, "--workdir", tmp_path), "--workdir, or models' folders by --ref, not both"),
        (("score", *files, "--ref", ref, "--guide", guide, "--workdir", tmp_path), "by --ref and --guide, not both"),
        (("generate", PROMPT, "--guide", guide), "--guide needs the reference"),
        (("generate", PROMPT, "--ref", ""), "--ref is empty; give a folder, a GGUF file, or an id"),
        (("generate", PROMPT, "--ref", ref, "--guide", ""), "--guide is empty"),
        (("generate", PROMPT, "--ref", ref, "--process", 0), "--process goes with --coordinator HOST:PORT"),
        (("generate", PROMPT, "--ref", ref, "--guide", guide, "--weights", "nan"), "--weights is nan; it must be a number from -1e+06"),
        (("generate", "--ref", ref, "--input", tmp_path), "is a folder; give --input a file of prompts"),
        (("generate", PROMPT, "--ref", ref, "--eta", "0.5"), "--eta 0.5 needs a guide"),
        (("generate", PROMPT, "--ref", ref, *("--guide", guide) * 2), "the guides are 2 and the --weights 0"),
        (("generate", PROMPT, "--ref", ref, "--guide", guide, "--weights", "1,2"), "the guides are 1 and the --weights 2"),
        (("generate", PROMPT, "--workdir", tmp_path, "--weights", "1,2"), "the guides are 1 and the --weights 2"),
        (("generate", PROMPT, "--ref", ref, *("--guide", guide) * 2, "--weights", "a"), "is not a list of numbers"),
        (("generate", PROMPT, "--ref", ref, "--config", "x.py"), "--config goes with --workdir"),
        (("generate", PROMPT, "--ref", ref, "--config.seed=1"), "--config goes with --workdir"),
        (("generate", PROMPT, "--ref", ref, "--wat"), "unknown argument '--wat'"),
        (("export", "--workdir", tmp_path, "--what", "both", "--out", tmp_path), "both"),
    ]:
        assert words in refused(capsys, *arguments)
    for option in (("--dtype", "float32"), ("--quantize", "int8"), ("--prompt-format", "chat"), ("--stop-ids", "2")):
        sentence = refused(capsys, "generate", PROMPT, "--workdir", tmp_path, *option)
        assert f"{option[0]} goes with --ref" in sentence
    assert not output.exists()


def test_settings_that_cannot_be_are_refused_before_weights_are_read(light, tmp_path, capsys):
    ref, guide = light
    pair = ("generate", "--ref", ref, "--guide", guide)
    for arguments, words in [
        ((PROMPT, "--max-new-tokens", 60), "with 60 new ones is more than the reference's 64 positions"),
        ((PROMPT,), "with 256 new ones"),
        ((PROMPT, *FEW, "--top-k-candidates", 400), f"--top-k-candidates is 400; it must be at most {USED}"),
        ((PROMPT, *FEW, "--top-k-candidates", 0), "--top-k-candidates is 0"),
        ((PROMPT, *FEW, "--temperature", -1), "--temperature is -1.0"),
        ((PROMPT, *FEW, "--stop-ids", "9999"), "the stop id 9999"),
        ((PROMPT, *FEW, "--stop-ids", "a"), "is not a list of token ids"),
        ((PROMPT, *FEW, "--dtype", "float16"), "--dtype"),
        ((PROMPT, *FEW, "--prompt-format", "poem"), "--prompt-format"),
        ((PROMPT, "Sam", *FEW, "--stream"), "--stream prints one response"),
        ((PROMPT, *FEW, "--stream", "--samples", 2), "--stream prints one response"),
        ((PROMPT, *FEW, "--stream", "--eta", "0.1,0.2"), "--stream prints one response"),
        ((PROMPT, *FEW, "--stream", "--output", tmp_path / "o"), "--stream prints one response"),
    ]:
        assert words in refused(capsys, *pair, *arguments)


def test_too_little_memory_is_said_before_weights_are_read(light, tmp_path, capsys, monkeypatch):
    """The embedding of 320 rows alone is 41 kB; a row's cache has 1 layer, 2 heads of 16, 15 + 8 positions, made 24."""
    ref, guide = light
    monkeypatch.setattr(memory, "available", lambda device: 40_000)
    monkeypatch.setattr(memory, "GB", 1e3)
    cache = 2 * 24 * 2 * 16 * 4 / 1e3
    weights = [sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 1e3 for model in (make_ref(), make_guide())]
    generate = ("generate", "--ref", ref, PROMPT, *FEW)
    alone = refused(capsys, *generate)
    assert f"40.00 GB of memory free, and the reference's weights {weights[0]:.2f} GB and the ref" in alone
    assert f"the reference's cache {cache + 0.008:.2f} GB are needed" in alone
    both = refused(capsys, *generate, "--guide", guide, "--samples", 3, "--batch-size", 3)
    assert f"the reference's weights {weights[0]:.2f} GB and the guide's weights {weights[1]:.2f} GB and the" in both
    assert f"the reference's cache {3 * cache + 0.016:.2f} GB and the guide's cache {3 * cache + 0.016:.2f} GB" in both
    source = small_data.write_lines(tmp_path / "in.jsonl", [{"prompt": "a", "response": "b"}])
    files = ("--input", source, "--output", tmp_path / "out.jsonl")
    scores = refused(capsys, "score", "--ref", ref, "--guide", guide, *files)
    assert f"the reference's weights {weights[0]:.2f} GB and the guide's weights {weights[1]:.2f} GB are" in scores


def test_folders_that_do_not_hold_what_they_should(light, models, tmp_path, capsys):
    ref, guide = light
    ask = ("generate", PROMPT, *FEW, "--ref")
    assert "config.json" in refused(capsys, *ask, tmp_path)  # the folder of folders
    assert "model.safetensors" in refused(capsys, *ask, ref)
    assert "not a guide" in refused(capsys, *ask, ref, "--guide", models[0])
    assert "holds a guide" in refused(capsys, *ask, guide)

    bpe.save(ref, template=None)
    (ref / "chat_template.jinja").unlink()
    assert "no chat template" in refused(capsys, *ask, ref, "--prompt-format", "chat")
    tokenizer = bpe.make()
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(ref)
    sentence = refused(capsys, *ask, ref, "--guide", guide)
    assert f"id {USED} is '<|new|>' in the reference and nothing in the guide" in sentence
    tokenizer.add_tokens([f"<|{n}|>" for n in range(20)])
    tokenizer.save_pretrained(ref)
    (guide / "tokenizer.json").unlink()  # which says nothing then of its tokens, but how many they are
    assert "the guide has 304 tokens in its embedding" in refused(capsys, *ask, ref, "--guide", guide)
    tokenizer.add_tokens([f"<|{n}|>" for n in range(20, 100)])
    tokenizer.save_pretrained(ref)
    assert "the reference has 320 tokens in its embedding" in refused(capsys, *ask, ref)
    (ref / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(capsys, *ask, ref)


def test_files_that_cannot_be_scored_are_refused_before_weights_are_read(light, tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    score = ("score", "--ref", light[0], "--guide", light[1], "--input", source, "--output")
    for record, words in [
        ({"prompt_tokens": [1], "response_tokens": [USED]}, "record 2 has token ids outside"),
        ({"prompt_tokens": [1] * 60, "response_tokens": [2] * 5}, "60 prompt and 5 response tokens"),
    ]:
        small_data.write_lines(source, [{"prompt": "a", "response": "b"}, record])
        assert words in refused(capsys, *score, output)
    small_data.write_lines(source, [{"prompt": "a", "response": "b"}])
    assert not output.exists()
    assert "is the input itself" in refused(capsys, *score, source)
    small_data.write_lines(
        output, [{"prompt": "another", "response": "b", "ref_log_probs": [], "values": [], "value": 0}]
    )
    assert "line 1, is not of record 1" in refused(capsys, *score, output)
    assert "--batch-size" in refused(capsys, *score, output, "--batch-size", "0")


def test_what_cannot_be_served(light, models, tmp_path, capsys):
    ref, guide = light
    key, empty = tmp_path / "key", tmp_path / "empty"
    key.write_bytes(b"\xff\xfe")
    empty.mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, words in [
            (("--guide", f"x={guide}", "--port", taken.getsockname()[1]), "(Address already in use); give another"),
            (("--port", 65536), "(ports go up to 65535); give another --host or --port"),
            (("--api-key-file", key), "is not UTF-8 text; write the API key into it"),
            (("--api-key-file", empty), "is a directory; give another --api-key-file"),
            (("--port", 0, "--guide", f"x={empty}"), "has no config.json"),
            (("--port", 0, "--guide", f"x={models[0]}"), "not a guide"),
            (("--guide", "x="), "--guide is empty"),
            (("--guide", f"x={guide}", "--guide", f"x={guide}"), "give each a name of its own"),
            (("--port", 0, "--context", 100), "--context is 100; the models have 64 positions"),
            *((("--eta", eta), "is not a number, at least 1e-06, below infinity") for eta in ("0", "-1", "nan", "inf")),
        ]:
            assert words in refused(capsys, "serve", "--ref", ref, *arguments)
