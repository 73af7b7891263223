"""Greedy responses of vLLM with a guide against those of `transformers`, in an environment that has vLLM.

    pip install --no-deps .  # the plugin, beside vLLM
    QSHARP_GUIDES=mine=GUIDE python benchmarks/vllm_guidance.py --ref MODEL

Chats of several lengths, with and without a guide and at several eta, share three rows and a budget of 64 tokens per
step, so that prompts come in parts, and rows end, are taken again and move. Prints for each whether the tokens are
equal and how far their log-probabilities differ at most, and exits with 1 where that is more than rounding explains.
"""

import argparse
import os
import sys

import torch
import transformers
from vllm import LLM, SamplingParams

from qsharp_jax.integrations.transformers import GuidanceLogitsProcessor, Guide

REQUESTS = [  # question, eta, new tokens
    ("Why is the sky blue?", 0.1, 24),
    ("How was the food at the restaurant, and would you go there again?", 0.05, 8),
    ("Hello", None, 16),
    ("Tell me a story.", 0.2, 24),
    ("Count to ten.", 0.1, 12),
]
LIMIT = 1e-3  # nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ref", required=True, help="the reference: a folder or an id on the hub, with a chat template"
    )
    ref = parser.parse_args().ref
    (folder,) = (entry.partition("=")[2] for entry in os.environ["QSHARP_GUIDES"].split(","))
    tokenizer = transformers.AutoTokenizer.from_pretrained(ref)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question, _, _ in REQUESTS
    ]
    llm = LLM(
        ref, dtype="float32", max_model_len=512, max_num_seqs=3, max_num_batched_tokens=64, enforce_eager=True,
        async_scheduling=False, logprobs_mode="processed_logprobs",
    )  # fmt: skip
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=count,
            ignore_eos=True,
            logprobs=0,
            extra_args=None if eta is None else {"eta": eta},
        )
        for _, eta, count in REQUESTS
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    model, guide = transformers.AutoModelForCausalLM.from_pretrained(ref), Guide.from_pretrained(folder)
    failed = False
    for prompt, (question, eta, count), output in zip(prompts, REQUESTS, outputs, strict=True):
        inputs = torch.tensor([prompt])
        want = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, eos_token_id=None, do_sample=False,
            logits_processor=[] if eta is None else [GuidanceLogitsProcessor(guide, eta=eta)],
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        new = want.sequences[0, len(prompt) :]
        expected = torch.stack(want.scores, 1)[0].log_softmax(-1)[torch.arange(count), new]
        tokens = list(output.outputs[0].token_ids)
        got = torch.tensor(
            [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        )
        worst, equal = float((got - expected).abs().max()), tokens == new.tolist()
        failed |= not equal or worst > LIMIT
        verdict = "equal" if equal else "DIFFERENT"
        print(f"{question[:30]!r}, eta {eta}: {count} tokens {verdict}, {worst:.1e} nats at most")
    sys.exit(failed)


if __name__ == "__main__":
    main()
