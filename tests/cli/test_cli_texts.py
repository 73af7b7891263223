"""`qsharp generate` and `qsharp score` on models in folders, as a user meets them.

The reference's and the guide's embeddings are padded to different sizes, and the padding of the reference would win
every draw if it took part.
"""

import datetime
import errno
import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bpe
import helpers
import numpy as np
import numpy_decoder
import pytest
import scipy.special
import small_data
from commands import FIELDS, refused, stdout_lines
from ml_collections import ConfigDict
from repository import ROOT
from text_models import USED, make_guide, make_ref

import qsharp_jax
from qsharp_jax import cli, decoding
from qsharp_jax.cli import generate, generated
from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.models import hf
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError

PROMPT, NEW = "How many eggs?", 8
assert_same_lines = functools.partial(
    helpers.assert_same_rows, numbers=("log_probs", "ref_log_probs", "kl", "values"), atol=1e-5
)
FEW = ("--prompt-format", "plain", "--max-new-tokens", NEW)


def numpy_log_probs(tokens) -> np.ndarray:
    """[T, V]: after every token, over the real ones."""
    ref = make_ref()
    params = numpy_decoder.to_float64(ref.params)
    logits = numpy_decoder.logits(params, ref.config, numpy_decoder.hidden(params, ref.config, tokens))
    return scipy.special.log_softmax(logits[:, :USED], axis=1)


def numpy_greedy(prompt_tokens, stop_ids) -> list[int]:
    response = []
    while len(response) < NEW and not set(response) & set(stop_ids):
        response.append(int(numpy_log_probs([*prompt_tokens, *response])[-1].argmax()))
    return response


@pytest.mark.parametrize("prompt_format", ["plain", "chat"])
def test_greedy_responses_are_numpy_s_and_padding_is_never_drawn(models, capfd, prompt_format):
    arguments = ("generate", "--ref", models[0], PROMPT, "--temperature", "0", *FEW, "--prompt-format", prompt_format)
    (line,) = stdout_lines(capfd, *arguments)
    prompt_tokens = Tokenizer.load(models[0], prompt_format=prompt_format).encode_prompt(PROMPT)
    expected = numpy_greedy(prompt_tokens, [bpe.EOS, bpe.EOT])
    assert list(line) == FIELDS and line["tokens"] == expected and line["prompt"] == PROMPT
    assert line["response"] == bpe.make().decode(expected, skip_special_tokens=True)
    assert line["eta"] is None and set(line["values"]) == {None} and set(line["kl"]) == {0.0}
    stop = expected[2]
    if prompt_format == "plain":
        (line,) = stdout_lines(capfd, *arguments, "--stop-ids", f"5,{stop}")
        assert line["tokens"] == expected[: expected.index(stop) + 1] and line["finished"]


def test_a_response_ends_before_a_stop_string_on_a_line_and_in_a_stream(models, capfd):
    arguments = ("generate", "--ref", models[0], PROMPT, "--seed", "4", *FEW, "--max-new-tokens", NEW + 12)
    (whole,) = stdout_lines(capfd, *arguments)
    stop = whole["response"][9:11]
    stops = ("--stop", stop, "--stop", "no such text")
    (line,) = stdout_lines(capfd, *arguments, *stops)
    assert line["response"] == whole["response"][: whole["response"].index(stop)] and line["finished"]
    assert stop in bpe.make().decode(line["tokens"]) and stop not in bpe.make().decode(line["tokens"][:-1])
    assert line["tokens"] == whole["tokens"][: len(line["log_probs"])] and line["settings"]["stop"] == [stop, stops[-1]]
    assert cli.main([str(argument) for argument in (*arguments, *stops, "--stream")]) == 0
    assert capfd.readouterr().out == line["response"] + "\n"


@pytest.mark.slow
def test_guided_lines_say_what_score_says_of_them(models, tmp_path, capfd):
    """Decoding against teacher forcing; and the text that is streamed is the line's."""
    ref, guide = models
    pair = ("--ref", ref, "--guide", guide)
    made = stdout_lines(capfd, "generate", *pair, PROMPT, "--eta", "0.5,0.05", "--seed", "4", *FEW)
    assert [line["eta"] for line in made] == [0.5, 0.05]
    prompt_tokens = Tokenizer.load(ref).encode_prompt(PROMPT)
    records = [{"prompt_tokens": prompt_tokens, "response_tokens": line["tokens"], "n": line["eta"]} for line in made]
    source, output = small_data.write_lines(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    assert cli.main([str(x) for x in ("score", *pair, "--input", source, "--output", output)]) == 0
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    known = 0
    for line, record, score in zip(made, records, scored, strict=True):
        assert {key: score[key] for key in record} == record
        assert set(score) - set(record) == {"ref_log_probs", "values", "value"}
        np.testing.assert_allclose(line["ref_log_probs"], score["ref_log_probs"], atol=1e-4)
        pairs = [(mine, other) for mine, other in zip(line["values"], score["values"]) if mine is not None]
        known += len(pairs)
        np.testing.assert_allclose(*zip(*pairs), atol=1e-4)
        assert sum(line["kl"]) > 1e-3
    assert known >= sum(len(line["tokens"]) for line in made) - 2  # the last is unknown where it was no candidate

    capfd.readouterr()
    streamed = (
        "generate",
        *pair,
        PROMPT,
        "--stream",
        "--eta",
        "0.5",
        "--seed",
        "4",
        *FEW,
        "--max-new-tokens",
        NEW + 12,
    )
    assert cli.main([str(argument) for argument in streamed]) == 0
    text = capfd.readouterr().out
    assert text.startswith(made[0]["response"].rstrip("\ufffd")) and text.endswith("\n") and len(text) > NEW


def test_special_tokens_past_the_embedding_change_nothing(tmp_path, capfd):
    """Gemma's text models and fine-tuned ones with a padding token have them; no token of theirs can be drawn."""
    ref = helpers.random_model(USED, max_positions=64)
    guide = helpers.random_guide(ref.config)
    plain, special = bpe.make(), bpe.make()
    special.add_special_tokens({"pad_token": "<|pad|>", "extra_special_tokens": ["<|image|>"]})
    source = small_data.write_lines(tmp_path / "in.jsonl", [{"prompt": PROMPT, "response": " Twelve eggs."}])
    lines, scores, folders = [], [], []
    for tokenizer in (plain, special):
        place = tmp_path / str(len(tokenizer))
        hf.export_ref(ref, place / "ref", tokenizer=tokenizer)
        hf.export_guide(guide, place / "guide", tokenizer=tokenizer)
        folders.append(("--ref", place / "ref", "--guide", place / "guide"))
        lines += stdout_lines(capfd, "generate", *folders[-1], PROMPT, *FEW)
        arguments = ("score", *folders[-1], "--input", source, "--output", place / "scores.jsonl")
        assert cli.main([str(argument) for argument in arguments]) == 0
        scores += [json.loads(line) for line in (place / "scores.jsonl").read_text().splitlines()]
    assert lines[0]["tokens"] == lines[1]["tokens"] and lines[0]["log_probs"] == lines[1]["log_probs"]
    assert scores[0] == scores[1]
    sentence = refused(capfd, "generate", *folders[1], "an <|image|> of eggs", *FEW)
    assert "has the token '<|image|>', which is not in the model's embedding" in sentence
    assert "has ids up to" in refused(capfd, "generate", *folders[1], PROMPT, *FEW, "--stop-ids", USED)
    loaded = qsharp_jax.load(folders[1][1], folders[1][3])
    assert loaded.sampling.vocab_size == USED
    with pytest.raises(UserError, match="outside the vocabulary"):
        decoding.generate(loaded.ref, None, [[USED]], loaded.sampling, rng=0)


def test_several_guides_are_composed_by_their_weights(models, tmp_path, capfd):
    """Weights of 1 and 0 are the first guide alone; 0.5 twice, of the same guide, too; 1 and 1 are another tilt."""
    ref, guide = models
    one = ("generate", "--ref", ref, "--guide", guide)
    arguments = (PROMPT, "--eta", "0.1", "--seed", "4", *FEW)
    (alone,) = stdout_lines(capfd, *one, *arguments)
    for weights, same in (("1,0", True), ("0.5,0.5", True), ("1,1", False)):
        (line,) = stdout_lines(capfd, *one, "--guide", guide, "--weights", weights, *arguments)
        assert (line["tokens"] == alone["tokens"] and np.allclose(line["kl"], alone["kl"], atol=1e-5)) == same
    assert sum(alone["kl"]) > 1e-2


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def resumable(models, tmp_path):
    """A command of 20 responses in batches of 4 rows, with its prompts in a file."""
    prompts = [PROMPT, "Sam", "How many eggs does Sam have?", "Mia has 3", "日本"]
    source = tmp_path / "prompts.txt"
    source.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    pair = ("--ref", models[0], "--guide", models[1])
    return (
        "generate",
        *pair,
        "--input",
        source,
        "--samples",
        2,
        "--eta",
        "0.5,0.1",
        "--seed",
        3,
        "--batch-size",
        4,
        *FEW,
    )


def stop_after(monkeypatch, count: int, error: BaseException) -> None:
    """The next generation is interrupted when it has so many responses."""
    encode, calls = generated.encode, []

    def interrupting(*arguments):
        calls.append(arguments)
        if len(calls) > count:
            raise error
        return encode(*arguments)

    monkeypatch.setattr(generated, "encode", interrupting)


def test_a_stopped_generation_goes_on_and_ends_as_one_that_never_was(resumable, tmp_path, capfd, monkeypatch):
    """Nothing complete is lost, half a line is made anew, and what is there is not generated again."""
    expected = stdout_lines(capfd, *resumable)
    output = tmp_path / "out.jsonl"
    command = [str(argument) for argument in (*resumable, "--output", output)]
    with monkeypatch.context() as patch:
        stop_after(patch, 7, KeyboardInterrupt())
        assert cli.main(command) == 130 and "run the same command again to resume" in capfd.readouterr().err
    assert len(read_lines(output)) == 7
    output.write_bytes(output.read_bytes()[:-100])
    with monkeypatch.context() as patch:
        stop_after(patch, 3, OSError(errno.ENOSPC, "full"))
        assert cli.main(command) == 2 and "disk is full" in capfd.readouterr().err
    some = read_lines(output)
    assert len(some) == 6 + 3 and some != expected[:9]  # in the order in which they ended
    with monkeypatch.context() as patch:
        stop_after(patch, 11, AssertionError("generated again"))
        assert cli.main(command) == 0
    assert_same_lines(read_lines(output), expected)
    assert [line for line in read_lines(output) if line in some]
    monkeypatch.setattr(generate, "_check_memory", lambda *_: pytest.fail("it would read weights"))
    assert cli.main(command) == 0 and "all 20 responses are there" in capfd.readouterr().err


def test_responses_do_not_depend_on_the_rows_that_are_decoded_at_once(resumable, capfd):
    assert_same_lines(stdout_lines(capfd, *resumable, "--batch-size", 20), stdout_lines(capfd, *resumable))


def test_prompts_may_be_added_to_a_finished_generation(resumable, tmp_path, capfd):
    output, source = tmp_path / "out.jsonl", tmp_path / "prompts.txt"
    command = [str(argument) for argument in (*resumable, "--output", output)]
    assert cli.main(command) == 0
    before = output.read_bytes()
    with open(source, "a") as file:
        file.write("One more\n")
    assert cli.main(command) == 0
    assert output.read_bytes().startswith(before) and len(read_lines(output)) == 24
    assert_same_lines(read_lines(output), stdout_lines(capfd, *resumable))


def test_an_output_of_other_settings_is_refused_and_left_alone(resumable, models, tmp_path, capfd, monkeypatch):
    output = tmp_path / "out.jsonl"
    command = (*resumable, "--output", output)
    with monkeypatch.context() as patch:
        stop_after(patch, 5, KeyboardInterrupt())
        assert cli.main([str(argument) for argument in command]) == 130
    content = output.read_bytes()
    capfd.readouterr()
    for change, words in [
        (("--temperature", "0.5"), "generated with temperature 1.0, and this command has 0.5"),
        (("--max-new-tokens", "9"), "max_new_tokens 8, and this command has 9"),
        (("--mode", "cd"), 'mode "qsharp", and this command has "cd"'),
        (("--seed", "4"), "seed 3, and this command has 4"),
        (("--stop-ids", "5"), "stop_ids"),
        (("--stop", "a"), 'stop null, and this command has ["a"]'),
        (("--prompt-format", "chat"), 'prompt_format "plain"'),
        (("--guide", models[1], "--weights", "1,1"), "with guide"),
        (("--eta", "0.5"), "is not a response that this command lacks"),
        (("--samples", "3"), "is not a response that this command lacks"),
    ]:
        assert words in refused(capfd, *command, *change)
    assert output.read_bytes() == content


def test_a_bar_is_shown_on_a_terminal_alone(resumable, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    for terminal in (False, True):
        command = [str(argument) for argument in (*resumable, "--output", tmp_path / f"{terminal}.jsonl")]
        with monkeypatch.context() as patch:
            patch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
            assert cli.main(command) == 0
        assert ("20/20" in capfd.readouterr().err) == terminal


CHAT = [{"role": "system", "content": "Count."}, {"role": "user", "content": PROMPT}]


def greedy_after(messages) -> list[int]:
    """Return greedy tokens by `transformers`' chat template and numpy."""
    ids = bpe.make().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return numpy_greedy(ids, [bpe.EOS, bpe.EOT])


def test_messages_and_texts_are_put_into_the_chat_template_and_keep_their_columns(models, tmp_path, capfd):
    rows = [{"id": 3, "prompt": CHAT, "tags": ["a", {"b": None}]}, {"prompt": PROMPT}]
    source, output = small_data.write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command = ("generate", "--ref", models[0], "--temperature", "0", "--max-new-tokens", NEW, "--input", source)
    chat, text = stdout_lines(capfd, *command)
    assert chat["tokens"] == greedy_after(CHAT) != text["tokens"] == greedy_after(CHAT[1:])
    assert {name: chat[name] for name in rows[0]} == rows[0] and list(text) == FIELDS and text["prompt"] == PROMPT
    assert chat["settings"]["prompt_format"] == "chat" and chat["settings"]["system"] is None

    assert cli.main([str(argument) for argument in (*command, "--output", output)]) == 0
    assert "put into the model's chat template; --prompt-format plain" in capfd.readouterr().err
    whole = output.read_bytes()
    output.write_bytes(whole.splitlines(keepends=True)[1] + b'{"prompt": [{"ro')
    assert cli.main([str(argument) for argument in (*command, "--output", output)]) == 0
    assert output.read_bytes() == whole, "it goes on, and the prompts are in their order again"
    rows[0]["id"] = 4
    small_data.write_lines(source, rows)
    assert "another column of the input" in refused(capfd, *command, "--output", output)

    (system,) = stdout_lines(capfd, "generate", *command[1:-2], PROMPT, "--system", "Count.")
    assert (
        system["tokens"] == chat["tokens"] and system["prompt"] == PROMPT and system["settings"]["system"] == "Count."
    )


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"prompt": CHAT}, ("--prompt-format", "plain"), "the prompt format is plain; use the prompt format chat"),
        ({"prompt": CHAT}, ("--system", "Be brief."), "has a system prompt of its own; leave --system out"),
        ({"prompt": "a"}, ("--system", "x", "--prompt-format", "plain"), "--system is a message of a chat"),
        ({"prompt": "a", "response": "b"}, (), "line 1: the output has a column 'response' of its own; rename that"),
        ({"prompt": 3}, (), "line 1: expected a JSON object with a text, or a list of messages"),
        ({"prompt": []}, (), "line 1: the prompt's last message must be the user's"),
        ({"prompt": [{"role": "user"}]}, (), "line 1: the prompt has a message {'role': 'user'}; it must have a role"),
    ],
)
def test_prompts_that_cannot_be_are_refused(light, tmp_path, capfd, row, options, words):
    source = small_data.write_lines(tmp_path / "in.jsonl", [row])
    assert words in refused(capfd, "generate", "--ref", light[0], "--input", source, *FEW[2:], *options)


def test_half_a_surrogate_pair_as_an_argument_is_refused(light, capfd):
    assert "has half a surrogate pair at" in refused(capfd, "generate", "--ref", light[0], "a \udc83", *FEW[2:])


def test_an_input_is_no_output(light, tmp_path, capfd):
    """Nor cut: its last line without an end looks like one that a kill left."""
    source, content = tmp_path / "in.jsonl", '{"prompt": "How many eggs?"}'
    source.write_text(content)
    sentence = refused(capfd, "generate", "--ref", light[0], "--input", source, "--output", source, *FEW[2:])
    assert "is the input itself; give another --output" in sentence
    assert source.read_text() == content


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_generation_that_is_killed_goes_on(models, tmp_path, capfd, sign, code):
    output = tmp_path / "out.jsonl"
    arguments = ["generate", "--ref", models[0], PROMPT, "--samples", 2000, *FEW, "--max-new-tokens", 40, "--output", output]
    command = [str(argument) for argument in arguments]
    process = subprocess.Popen([sys.executable, "-m", "qsharp_jax.cli", *command], cwd=ROOT, stderr=subprocess.PIPE)
    while not (output.exists() and output.read_bytes().count(b"\n") > 20) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sign)
    errors = process.communicate()[1].decode()
    assert process.returncode == code and ("run the same command again to resume" in errors) == (
        sign == signal.SIGTERM
    ), errors
    some = output.read_bytes()
    assert 20 < some.count(b"\n") < 2000
    assert cli.main(command) == 0
    lines = output.read_bytes().splitlines()
    assert set(some.split(b"\n")[:-1]) <= set(lines)  # what was there is as it was
    assert_same_lines([json.loads(line) for line in lines], stdout_lines(capfd, *command[:-2]))


@pytest.mark.parametrize("prompt_format", ["plain", "chat"])
def test_scores_of_texts_are_numpy_s(models, tmp_path, prompt_format):
    """Log-probabilities and values of a full forward in float64, one sequence at a time."""
    records = [{"prompt": PROMPT, "response": " Twelve eggs."}, {"prompt": "Sam", "response": "", "id": 3}]
    source, output = small_data.write_lines(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    ref, guide = models
    arguments = ["--prompt-format", prompt_format, "--input", str(source), "--output", str(output)]
    assert cli.main(["score", "--ref", str(ref), "--guide", str(guide), *arguments]) == 0
    text = Tokenizer.load(ref, prompt_format=prompt_format)
    guide = make_guide()
    params = numpy_decoder.to_float64(guide.params)
    for record, line in zip(records, output.read_text().splitlines(), strict=True):
        prompt, response = text.encode_prompt(record["prompt"]), text.encode_response(record["response"])
        assert response[-1] == (bpe.EOT if prompt_format == "chat" else bpe.EOS)
        scored = json.loads(line)
        expected = numpy_log_probs([*prompt, *response])[len(prompt) - 1 : -1][np.arange(len(response)), response]
        np.testing.assert_allclose(scored["ref_log_probs"], expected, atol=1e-4)
        hidden = numpy_decoder.hidden(params["trunk"], guide.config.trunk, [*prompt, *response])[len(prompt) :]
        means = scipy.special.expit(hidden @ params["head"]["kernel"] + params["head"]["bias"])[:, 0]
        np.testing.assert_allclose(scored["values"], means, atol=1e-4)
        assert scored["value"] == scored["values"][-1] and np.ptp(means) + abs(means[0] - 0.5) > 1e-2


def test_messages_are_scored_as_their_tokens_are(models, tmp_path):
    ids = bpe.make().apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    response = Tokenizer.load(models[0], prompt_format="chat").encode_response(" Twelve.")
    records = [{"prompt": CHAT, "response": " Twelve."}, {"prompt_tokens": ids, "response_tokens": response}]
    source, output = small_data.write_lines(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    assert cli.main([str(x) for x in ("score", "--ref", models[0], "--input", source, "--output", output)]) == 0
    messages, tokens = [json.loads(line) for line in output.read_text().splitlines()]
    assert messages["ref_log_probs"] == tokens["ref_log_probs"] and messages["prompt"] == CHAT


def test_scoring_goes_on_where_it_stopped_with_either_model_alone(models, tmp_path, capsys):
    records = [{"prompt": PROMPT, "response": "eggs " * n} for n in range(1, 4)]
    source = small_data.write_lines(tmp_path / "in.jsonl", records)
    for option, folder, added in [("--ref", models[0], {"ref_log_probs"}), ("--guide", models[1], {"values", "value"})]:
        output = tmp_path / f"out{option}.jsonl"
        command = ["score", option, str(folder), "--input", str(source), "--output", str(output)]
        assert cli.main(command) == 0
        whole = output.read_bytes()
        fields = {"prompt", "response", "prompt_format"} | added
        assert all(set(json.loads(line)) == fields for line in whole.splitlines())
        output.write_bytes(whole[: whole.index(b"\n") + 9])
        assert cli.main(command) == 0
        assert output.read_bytes() == whole
        capsys.readouterr()
        assert cli.main(command) == 0 and "complete" in capsys.readouterr().err
        assert output.read_bytes() == whole


@pytest.mark.parametrize("command", ["generate", "score"])
def test_a_template_s_date_is_given_or_today_s(models, tmp_path, capfd, command):
    """To `generate` and `score` alike: the log-probabilities are those after the prompt of that day."""
    ref = shutil.copytree(models[0], tmp_path / "ref")
    template = "{{ strftime_now('%d %b') }} " + bpe.TEMPLATE
    (ref / "chat_template.jinja").write_text(template)
    source, output = (
        small_data.write_lines(tmp_path / "in.jsonl", [{"prompt": PROMPT, "response": "a"}]),
        tmp_path / "out.jsonl",
    )
    for date in (None, datetime.date(2024, 2, 29)):
        options = ["--ref", ref, "--prompt-format", "chat", *(["--date", date] if date else [])]
        prompt = Tokenizer.load(ref, prompt_format="chat", date=date).encode_prompt(PROMPT)
        if command == "generate":
            (line,) = stdout_lines(capfd, command, *options, PROMPT, "--temperature", "0", "--max-new-tokens", NEW)
        else:
            assert cli.main([str(x) for x in (command, *options, "--input", source, "--output", output)]) == 0
            response = Tokenizer.load(ref, prompt_format="chat").encode_response("a")
            line = json.loads(output.read_text()) | {"tokens": response}
            output.unlink()
        expected = numpy_log_probs([*prompt, *line["tokens"]])[len(prompt) - 1 : -1]
        np.testing.assert_allclose(
            line["ref_log_probs"], expected[np.arange(len(line["tokens"])), line["tokens"]], atol=1e-4
        )


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({"algorithm": "qsharp"}, "qsharp"), ({"algorithm": "vas"}, "cd"), ({"algorithm": "cd", "cd": {"variant": "fudge"}}, "expectation"),
        ({"algorithm": "cd", "cd": {"variant": "regression"}}, "cd"), ({"algorithm": "ppo"}, "qsharp"),
    ],
)  # fmt: skip
def test_a_run_s_guide_tilts_as_its_algorithm_does(tmp_path, changes, mode):
    assert generate.mode_of(Workdir(tmp_path, ConfigDict(changes))) == mode
    assert generate.mode_of(None) == "qsharp"
