"""A run's models as folders: the same weights and prompts, and a card with the run's own figures."""

import json
from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest
from commands import stdout_lines
from transformers import AutoTokenizer

from qsharp_jax import cli
from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.models import cpu_form, decoder, hf, lora
from qsharp_jax.run import models
from qsharp_jax.run.folders import Folders, tokenizer_folder
from qsharp_jax.train.checkpoint import Checkpoints

PROMPT = "0,1|1,2|0,3|3,4/0,2="
RESULTS = [
    dict(method="pi_ref", eta=None, round=0, n=10, reward=0.25, reward_low=0.125, reward_high=0.5, kl=None),
    dict(method="qsharp", eta=0.5, round=1, n=10, reward=0.375, reward_low=0.25, reward_high=0.5, kl=0.75),
    dict(method="qsharp", eta=0.1, round=2, n=10, reward=0.875, reward_low=0.75, reward_high=1.0, kl=1.5),
]


@pytest.fixture
def session(tmp_path):
    """A run of two rounds whose models are random, in a workdir that no process holds."""
    made = helpers.session(tmp_path / "run", "rounds=2", "pretrain.steps=77")
    ref = helpers.random_model(models.tokenizer(made).vocab_size)
    save(made.workdir.ref, ref.params)
    for number in (1, 2):
        save(made.workdir.guide_folder(number), helpers.random_guide(ref.config, seed=number).params)
    made.workdir.results.write_text(json.dumps(RESULTS))
    made.workdir.close()
    return made


def save(folder, params):
    checkpoints = Checkpoints(folder)
    checkpoints.save(SimpleNamespace(params=params, opt_state={}, step=np.int32(1)), final=True)
    checkpoints.wait()


def export(session, what, out) -> int:
    return cli.main(["export", "--workdir", str(session.workdir.path), "--what", what, "--out", str(out)])


def test_a_reference_comes_back_with_its_prompts_stop_ids_and_card(session, tmp_path):
    out = tmp_path / "ref"
    assert export(session, "ref", out) == 0
    loaded = hf.load_ref(out, dtype="float32")
    helpers.assert_trees_equal(
        loaded.params, decoder.unstack(models.load_ref(session).params, transposed=cpu_form.here())
    )
    text = Tokenizer.load(out)
    assert text.encode_prompt(PROMPT) == models.tokenizer(session).encode_prompt(PROMPT) == AutoTokenizer.from_pretrained(out)(
        PROMPT
    )["input_ids"]  # fmt: skip
    assert (
        text.stop_ids == models.tokenizer(session).stop_ids and text.vocab_size == models.tokenizer(session).vocab_size
    )
    card = (out / "README.md").read_text()
    assert "`star_graph` (degree 2, " in card and "path_length 3" in card and "77 steps of 32 texts" in card
    assert "| reward, pi_ref | 0.250 (95% 0.125 .. 0.500, 10 problems) |" in card and "Q#, eta" not in card


def test_a_run_of_qwen_2_s_shape_answers_out_of_its_folder_as_it_does_itself(tmp_path, capfd):
    """Its words are the task's, and no bytes, though the folder's model type is one of byte-level tokenizers."""
    shape = helpers.TINY | dict(max_positions=96, qkv_bias=True)
    task = dict(name="arithmetic", max_events=3, equation_fraction=0.4, error_scale=1.0)
    made = helpers.session(tmp_path / "run", task=task, model=shape)
    save(made.workdir.ref, helpers.random_model(models.tokenizer(made).vocab_size, scale=8.0, **shape).params)
    made.workdir.close()
    assert export(made, "ref", tmp_path / "ref") == 0
    assert json.loads((tmp_path / "ref" / "config.json").read_text())["model_type"] == "qwen2"
    prompts = ["Sam has 54 eggs. Sam gives 12 eggs to Mia. How many eggs does Sam have?", "Mia has 7 eggs."]
    few = ("--max-new-tokens", "12", "--seed", "3", "--temperature", "1", "--top-p", "1", "--eta", "inf")
    itself = stdout_lines(capfd, "generate", "--workdir", tmp_path / "run", *prompts, *few)
    folder = stdout_lines(capfd, "generate", "--ref", tmp_path / "ref", *prompts, *few)
    for name in ("response", "tokens"):
        assert [line[name] for line in folder] == [line[name] for line in itself]
    assert max(len(line["tokens"]) for line in itself) > 3
    loaded = Tokenizer.load(tmp_path / "ref")
    assert [loaded.encode_prompt(prompt) for prompt in prompts] == [
        models.tokenizer(made).encode_prompt(prompt) for prompt in prompts
    ]


def test_a_guide_comes_back_from_the_last_round_with_its_figures(session, tmp_path):
    out = tmp_path / "guide"
    assert export(session, "guide", out) == 0
    loaded = hf.load_guide(out, dtype="float32", unstacked=False)
    helpers.assert_trees_equal(loaded.params, models.load_guide(session, 2).params)
    card = (out / "README.md").read_text()
    assert "2 rounds of at most 12 prompts, at most 2 rollouts each. From round 2 on the guide rolled in, at eta 0.1." in card
    assert "Fitted by Q#, 2 epochs, seed 0." in card
    assert "| reward, Q#, eta 0.1 | 0.875 (95% 0.750 .. 1.000, 10 problems); KL 1.500 nats per response |" in card
    assert "eta 0.5" not in card and "pi_ref |" in card  # the round before it is another guide
    session.workdir.results.unlink()
    assert export(session, "guide", out) == 0  # over an earlier export, and before any evaluation
    assert "Metrics" not in (out / "README.md").read_text()


def test_a_fit_with_lora_is_an_adapter_of_the_model_that_it_began_with(session, tmp_path, capsys):
    ref, out = tmp_path / "ref", tmp_path / "adapter"
    assert export(session, "ref", ref) == 0
    assert export(session, "adapter", out) == 2
    assert "was fitted without LoRA (config.fit.lora_rank is 0)" in capsys.readouterr().err
    made = helpers.session(tmp_path / "lora", f"ref={ref}", "fit.lora_rank=2", "fit.lora_alpha=4")
    learned, frozen = lora.split(lora.add(jax.random.key(0), models.first_guide(made, None), 2, 4.0))
    learned = jax.tree.map(lambda leaf: leaf + 0.1, learned)  # B begins at zero, and so does the head
    save(made.workdir.guide_folder(1) / "lora", learned)
    save(made.workdir.guide_folder(1), lora.merged(lora.join(learned, frozen)))
    made.workdir.close()
    assert export(made, "adapter", out) == 0
    want, got = models.load_guide(made, 1), hf.load_guide(out, dtype="float32", unstacked=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got.params, want.params)
    assert (out / "README.md").read_text().count(f"A LoRA adapter, as PEFT reads it, of `{ref}`.") == 1
    assert not list(out.glob("model*.safetensors"))
    assert tokenizer_folder(out) == out
    (out / "tokenizer.json").unlink()
    assert tokenizer_folder(out) == ref
    assert Folders(ref, [out]).tokenizer.vocab_size == models.tokenizer(made).vocab_size

    made.workdir.guide_folder(1).rename(tmp_path / "lost")
    assert export(made, "adapter", tmp_path / "none") == 2 and "there is no guide of round 1" in capsys.readouterr().err
    other = helpers.session(tmp_path / "own", "fit.lora_rank=2")
    other.workdir.close()
    assert export(other, "adapter", tmp_path / "none") == 2
    assert "config.ref, is not a model in a folder or on the hub; give --what guide" in capsys.readouterr().err


def test_what_cannot_be_exported_is_one_sentence_and_nothing_is_lost(session, tmp_path, capsys):
    def sentence(what, out) -> str:
        assert export(session, what, out) == 2
        lines = capsys.readouterr().err.splitlines()
        assert "Traceback" not in "".join(lines)
        return lines[-1]

    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "is not empty" in sentence("ref", other) and (other / "notes.txt").read_text() == "mine"
    assert "is a file" in sentence("ref", other / "notes.txt")
    for path in (session.workdir.ref, session.workdir.guide):
        path.rename(path.with_name(f"no_{path.name}"))
    assert "there is no reference model" in sentence("ref", tmp_path / "out")
    assert "there is no guide of round 1" in sentence("guide", tmp_path / "out")
    session.workdir.results.write_text("{")
    assert "is damaged" in sentence("ref", tmp_path / "out")
    assert not (tmp_path / "out").exists()
