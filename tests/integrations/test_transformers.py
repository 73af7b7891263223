"""The logits processor for `transformers`, in PyTorch, against this package's own decoding, in JAX."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hf_folders import GEMMA, GPT2, LLAMA, QWEN3, guide
from marks import slow
from numpy_decoder import random_params

from qsharp_jax.decoding import generate
from qsharp_jax.models import decoder, hf
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.sampling import Sampling

torch = pytest.importorskip("torch", reason="the processor is for PyTorch, which the test extra installs")
import transformers  # noqa: E402

from qsharp_jax.integrations.transformers import GuidanceLogitsProcessor, Guide  # noqa: E402

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 2], [7], [11, 12, 13]]
SAMPLES, N, K = 2, 10, 4
ETA = [0.1, 0.5, np.inf]  # of each prompt
ATOMS = (0.0, 0.3, 1.0)
CASES = {  # guides, mode, others
    "v-categorical": ([guide(GPT2, distribution="categorical", atoms=ATOMS)], "expectation", "prefix"),
    "v-scalar": ([guide(GEMMA, distribution="scalar")], "cd", "zero"),
    "q-bernoulli": ([guide(QWEN3, type="q")], "qsharp", "prefix"),
    "q-scalar": ([guide(LLAMA, type="q", distribution="scalar")], "qsharp", "mass"),
    "two": ([guide(LLAMA), guide(GPT2, distribution="categorical", atoms=ATOMS)], "qsharp", "mass"),
}  # fmt: skip
WEIGHTS = {"two": (0.7, -0.3)}




def make_ref():
    config = dataclasses.replace(LLAMA, vocab_size=26)  # the last 3 pad it, and the guides do not have them
    params = random_params(3, decoder.init, config)
    return LanguageModel(params | {"head": params["head"] * 3}, config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    hf.export_ref(make_ref(), root / "ref")
    for name, (guides, *_) in CASES.items():
        for number, one in enumerate(guides):
            hf.export_guide(one, root / f"{name}-{number}")
    return root


@pytest.fixture(scope="module")
def ref(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "ref").eval()


def padded(rows):
    length = max(map(len, rows))
    tokens = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return dict(input_ids=tokens, attention_mask=mask)


def in_jax(name, **changes):
    guides, mode, others = CASES[name]
    sampling = Sampling(
        **dict(
            eta=np.repeat(ETA, SAMPLES), temperature=1.3, mode=mode, others=others, top_k_candidates=K,
            weights=WEIGHTS.get(name), max_new_tokens=N, vocab_size=23, prompt_bucket=4,
        ) | changes
    )  # fmt: skip
    guide = guides[0] if len(guides) == 1 else tuple(guides)
    return generate(make_ref(), guide, PROMPTS, sampling, rng=0, samples=SAMPLES)


def make_processor(name, folder, **changes):
    guides, mode, others = CASES[name]
    settings = dict(
        eta=ETA, weights=WEIGHTS.get(name), mode=mode, others=others, top_k_candidates=K, temperature=1.3,
        attention_mask=padded(PROMPTS)["attention_mask"],
    )  # fmt: skip
    return GuidanceLogitsProcessor([folder / f"{name}-{number}" for number in range(len(guides))], **settings | changes)


@torch.no_grad()
def ref_logits(ref, tokens, mask):
    """Logits [B, T, 26] of the reference."""
    mask = torch.nn.functional.pad(mask, (0, tokens.shape[1] - mask.shape[1]), value=1)
    return ref(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits


@pytest.mark.parametrize("name", ["v-categorical", slow("v-scalar"), "q-bernoulli", slow("q-scalar")])
def test_every_step_is_that_of_the_decoder_in_jax(name, folder, ref):
    """The log-probability of every token that JAX drew at a temperature, in a batch of unequal prompts and etas."""
    got = in_jax(name)
    inputs = padded([prompt for prompt in PROMPTS for _ in range(SAMPLES)])
    tokens = torch.cat([inputs["input_ids"], torch.tensor(got.tokens)], 1)
    processor = make_processor(name, folder)
    logits = ref_logits(ref, tokens, inputs["attention_mask"])
    for step in range(N):
        place = inputs["input_ids"].shape[1] + step
        log_probs = (processor(tokens[:, :place], logits[:, place - 1]) / 1.3).log_softmax(-1)
        drawn = log_probs[torch.arange(len(tokens)), tokens[:, place]]
        np.testing.assert_allclose(drawn, got.log_probs[:, step], atol=1e-4)
    assert np.abs(got.log_probs - got.ref_log_probs)[: 2 * SAMPLES].max() > 0.1


def test_generate_with_the_folder_of_a_guide_is_greedy_as_in_jax(folder, ref, tmp_path, monkeypatch):
    """`custom_generate` runs the copy of the file that the export has beside the guide."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    got = in_jax("two", temperature=0, eta=0.2)
    settings = dict(
        weights=WEIGHTS["two"], eta=0.2, top_k_candidates=K, max_new_tokens=N, do_sample=False,
        return_dict_in_generate=True, output_scores=True, trust_remote_code=True,
    )  # fmt: skip
    both = [str(folder / "two-0"), str(folder / "two-1")]
    output = ref.generate(**padded(PROMPTS), custom_generate=both[0], guide=both, **settings)
    new = output.sequences[:, -N:]
    np.testing.assert_array_equal(new, got.tokens[::SAMPLES])
    log_probs = torch.stack(output.scores, 1).log_softmax(-1).gather(2, new[..., None])[..., 0]
    np.testing.assert_allclose(log_probs, got.log_probs[::SAMPLES], atol=1e-4)

    alone = ref.generate(**padded(PROMPTS), custom_generate=both[0], **settings | {"weights": None})
    processor = make_processor("two", folder, eta=0.2, temperature=1.0, weights=[1, 0])
    kept = {name: x for name, x in settings.items() if name not in ("weights", "eta", "top_k_candidates")}
    want = ref.generate(**padded(PROMPTS), logits_processor=[processor], **kept)
    np.testing.assert_array_equal(alone.sequences, want.sequences)
    assert (alone.sequences != output.sequences).any()


@pytest.mark.parametrize("name", ["v-scalar", "q-bernoulli"])
def test_tokens_that_are_taken_back_or_replaced_leave_nothing_behind(name, folder, ref):
    """Tokens change where drafts are rejected, beams change places, or another batch begins."""
    inputs = padded(PROMPTS)
    tokens = torch.cat([inputs["input_ids"], torch.arange(30).reshape(3, 10) % 23], 1)
    other = tokens.clone()
    other[:, 15:] = tokens[[1, 2, 0], 15:]
    processor = make_processor(name, folder)
    for batch, place in [(tokens, 12), (tokens, 20), (tokens, 14), (tokens, 14), (other, 18), (other.flip(1), 13)]:
        logits = ref_logits(ref, batch[:, :place], inputs["attention_mask"])[:, -1]
        want = make_processor(name, folder)(batch[:, :place], logits)
        torch.testing.assert_close(processor(batch[:, :place], logits), want, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_it_runs_where_jax_is_not_installed(folder):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["jax", "flax", "chex"]))
from qsharp_jax.integrations.transformers import GuidanceLogitsProcessor, torch
processor = GuidanceLogitsProcessor({str(folder / "q-scalar-0")!r}, eta=0.1)
assert processor(torch.tensor([[1, 2, 3]]), torch.zeros(1, 23)).std() > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_entry_without_atoms_is_a_guide_that_needs_none(folder, tmp_path):
    copied = shutil.copytree(folder / "q-bernoulli-0", tmp_path / "guide")
    config = json.loads((copied / "config.json").read_text())
    del config["qsharp"]["atoms"]
    (copied / "config.json").write_text(json.dumps(config))
    assert not hf.load_guide(copied, dtype="float32").config.atoms
    hidden, eta = torch.ones(1, 1, QWEN3.embed), torch.tensor([[ETA[0]]])
    weights = [
        guide.log_weights(guide.outputs(hidden, None), eta, "qsharp")
        for guide in map(Guide.from_pretrained, (copied, folder / "q-bernoulli-0"))
    ]
    assert torch.equal(*weights) and weights[0].isfinite().all()


def test_what_does_not_fit_is_refused(folder):
    with pytest.raises(ValueError, match='is not a guide: its config.json has no entry "qsharp"'):
        Guide.from_pretrained(folder / "ref")
    v, q = (Guide.from_pretrained(folder / name) for name in ("v-scalar-0", "q-scalar-0"))
    for guides, changes, message in [
        ([v, q], {}, "must be V-types, or Q-types"),
        ([v, v], {}, "give 2 numbers"),
        (v, dict(mode="expectation"), "takes the logarithm of the mean"),
        (v, dict(mode="best"), "mode is 'best'; it must be one of qsharp"),
        (v, dict(eta=0), "eta is 0; it must be a number of at least 1e-06"),
        (v, dict(temperature=0), "temperature is 0; it must be above 0"),
        (v, dict(top_k_candidates=0), "top_k_candidates is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            GuidanceLogitsProcessor(guides, **{"eta": 0.1} | changes)
    tokens, logits = torch.tensor([[1, 2], [0, 3]]), torch.zeros(2, 23)
    for changes, message in [
        ({}, "the prompts differ; give attention_mask"),
        (dict(attention_mask=torch.tensor([[1, 1], [1, 0]])), "padded on the left"),
        (dict(eta=[0.1, 0.2, 0.3]), "eta has 3 entries for 2 rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            GuidanceLogitsProcessor(v, **{"eta": 0.1} | changes)(tokens, logits)


@pytest.mark.slow
@pytest.mark.skipif(not {"QSHARP_REF", "QSHARP_GUIDE"} <= {*os.environ}, reason="needs QSHARP_REF and QSHARP_GUIDE")
@pytest.mark.parametrize("eta", [0.1, 0.05])
def test_a_real_model_is_greedy_as_qsharp_generate(eta, tmp_path):
    """Three chats in one batch, 32 tokens each; prints the largest difference of a token's log-probability."""
    folder, guide = os.environ["QSHARP_REF"], os.environ["QSHARP_GUIDE"]
    asked = ["Why is the sky blue?", "How was the food at the restaurant, and would you go there again?", "Hello"]
    output = tmp_path / "out.jsonl"
    options = f"--ref {folder} --guide {guide} --eta {eta} --temperature 0 --max-new-tokens 32 --output {output}"
    subprocess.run([sys.executable, "-m", "qsharp_jax.cli", "generate", *options.split(), *asked], check=True)
    rows = [json.loads(line) for line in output.read_text().splitlines()]

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    chats = [[{"role": "user", "content": question}] for question in asked]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    settings = dict(max_new_tokens=32, do_sample=False, return_dict_in_generate=True, output_scores=True)
    got = model.generate(**inputs, custom_generate=guide, trust_remote_code=True, eta=eta, **settings)
    log_probs = torch.stack(got.scores, 1).log_softmax(-1)
    worst = 0.0
    for row, line in enumerate(rows):
        tokens = got.sequences[row, inputs["input_ids"].shape[1] :][: len(line["tokens"])]
        assert tokens.tolist() == line["tokens"]
        of_tokens = log_probs[row, torch.arange(len(tokens)), tokens]
        worst = max(worst, float(np.abs(of_tokens.numpy() - line["log_probs"]).max()))
    print(f"eta {eta}: {sum(len(row['tokens']) for row in rows)} tokens, log-probabilities differ by at most {worst:.1e}")
    assert worst < 1e-4
