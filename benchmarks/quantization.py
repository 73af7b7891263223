"""Quality lost by weights in 8 or 4 bits: KL(unquantized || quantized) per token of real responses, and reward.

    python benchmarks/quantization.py --ref MODEL --prompts gsm8k        # QSHARP_DATA: the folder of gsm8k/test.jsonl
    python benchmarks/quantization.py --ref MODEL --prompts constraints --reward

The unquantized reference, in float32, answers the prompts in its chat template (temperature 1, 64 new tokens). Both
models then read these responses: the KL is exact over the vocabulary, in nats, and "same token" the share of tokens at
which both have the same likeliest one. With `--reward` each model answers the prompts of examples/constraints itself,
at temperature 0.8 and top-p 0.9, with the same seeds.
"""

import argparse
import functools
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qsharp_jax
from qsharp_jax import Sampling, report
from qsharp_jax.evaluation import statistics
from qsharp_jax.models import decoder
from qsharp_jax.run.folders import Loaded

TASK = Path(__file__).parents[1] / "examples" / "constraints" / "task.py"
QUANTIZE = ("int8", "int4")


def problems(name: str, count: int) -> list[dict[str, Any]]:
    """Problems spread evenly over the test problems of a task."""
    if name == "gsm8k":
        lines = (Path(os.environ["QSHARP_DATA"]) / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [{"prompt": json.loads(line)["question"]} for line in lines]
    else:
        rows = _task().problems("test")
    return [rows[place] for place in np.linspace(0, len(rows) - 1, count).astype(int)]


@functools.cache
def _task() -> Any:
    spec = importlib.util.spec_from_file_location("task", TASK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.partial(jax.jit, static_argnames="config")
def log_probs(params: Any, config: Any, tokens: jax.Array) -> jax.Array:
    """Log-probabilities [T, V] of what follows each of one sequence's tokens [T]."""
    row = tokens[None]
    hidden, _ = decoder.forward(params, config, row, jnp.ones_like(row), jnp.arange(row.shape[1])[None])
    return jax.nn.log_softmax(decoder.logits(params, config, hidden[0]))


def compare(ref: Loaded, other: Loaded, prompts: list[list[int]], responses: list[np.ndarray]) -> dict[str, np.ndarray]:
    """KL and agreement at each token of the responses, one array per measure."""
    width = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    kls, same = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        tokens = np.zeros(width, np.int32)
        tokens[: len(prompt) + len(response)] = [*prompt, *response]
        places = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        p, q = (log_probs(model.ref.params, model.ref.config, tokens)[places] for model in (ref, other))
        kls.append(np.asarray((jnp.exp(p) * (p - q)).sum(-1)))
        same.append(np.asarray(p.argmax(-1) == q.argmax(-1)))
    return {"kl": np.concatenate(kls), "same": np.concatenate(same)}


def reward(model: Loaded, rows: list[dict[str, Any]], samples: int) -> str:
    """The share of responses that ended and keep the constraint, with its interval over prompts."""
    sampling = Sampling(temperature=0.8, top_p=0.9, max_new_tokens=64)
    answered = qsharp_jax.generate(model, None, [row["prompt"] for row in rows], sampling, samples=samples, seed=0)
    passed = [
        bool(finished) and _task().CONSTRAINTS[row["constraint"]](text.strip())
        for row, text, finished in zip(
            (row for row in rows for _ in range(samples)), answered.texts, answered.generation.finished, strict=True
        )
    ]
    means = np.reshape(passed, (-1, samples)).mean(1)
    low, high = statistics.bootstrap(means)
    return f"{means.mean():.3f} ({low:.3f} .. {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ref", required=True, metavar="MODEL")
    parser.add_argument("--prompts", required=True, choices=("gsm8k", "constraints"))
    parser.add_argument("--count", type=int, default=64, help="of prompts")
    parser.add_argument("--reward", action="store_true", help="of the constraints, with 4 responses per prompt")
    options = parser.parse_args()
    rows = problems(options.prompts, options.count)
    ref = qsharp_jax.load(options.ref, dtype="float32")
    sampling = Sampling(temperature=1.0, max_new_tokens=64)
    answered = qsharp_jax.generate(ref, None, [row["prompt"] for row in rows], sampling, seed=0)
    prompts = [ref.tokenizer.encode_prompt(row["prompt"]) for row in rows]
    responses = [answered.generation.response(number) for number in range(len(rows))]

    lines = [["weights", "tokens", "KL per token", "its 95% quantile", "same token"] + ["reward"] * options.reward]
    lines.append(["float32", str(sum(map(len, responses))), "0", "0", "1"])
    if options.reward:
        lines[-1].append(reward(ref, rows, 4))
    for quantize in QUANTIZE:
        other = qsharp_jax.load(options.ref, dtype="float32", quantize=quantize)
        measured = compare(ref, other, prompts, responses)
        kl, same = measured["kl"], measured["same"]
        numbers = [f"{kl.mean():.4f}", f"{np.quantile(kl, 0.95):.4f}", f"{same.mean():.3f}"]
        lines.append([quantize, str(len(kl)), *numbers] + ([reward(other, rows, 4)] if options.reward else []))
        print(lines[-1], flush=True)
    print(report.markdown(lines))


if __name__ == "__main__":
    main()
