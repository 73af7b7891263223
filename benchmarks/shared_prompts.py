"""Decoding of several samples of long prompts, sharing these or with a copy for each row, side by side.

    python benchmarks/shared_prompts.py --ref MODEL --guide DIR [--tokens 1024] [--samples 16] [--rows 16] [--new 32]

Prints, for each of three rounds, the seconds of `ContinuousBatch` for the same prompts, cut from a text, with and
without sharing, and their ratio; and the largest difference of the log-probabilities of tokens that are equal.
"""

import argparse
import time
from pathlib import Path
from unittest import mock

import numpy as np

from qsharp_jax.decoding import ContinuousBatch, api
from qsharp_jax.run.folders import Loaded, load
from qsharp_jax.sampling import Sampling

TEXT = Path(__file__).with_name("RESULTS.md")  # what prompts are cut from
ROUNDS = 3
NEVER = 1 << 30  # tokens of a prompt from which on it is shared


def decoded(models: Loaded, prompts: list[list[int]], options: argparse.Namespace) -> tuple[float, dict]:
    """Seconds, and the log-probabilities and tokens of each response by its place."""
    sampling = Sampling(eta=0.1, temperature=0.8, top_p=0.9, max_new_tokens=options.new, stop_ids=())
    begun, found = time.monotonic(), {}
    batch = ContinuousBatch(
        models.ref, models.guide, prompts, sampling, rng=0, rows=options.rows, samples=options.samples
    )
    for places, part in batch:
        found |= {
            place: (part.tokens[row], part.log_probs[row]) for row, place in enumerate(places.tolist())
        }
    return time.monotonic() - begun, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ref", required=True)
    parser.add_argument("--guide", required=True)
    parser.add_argument("--tokens", type=int, default=1024, help="of each prompt")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=2)
    options = parser.parse_args()
    models = load(options.ref, options.guide, dtype="float32", prompt_format="plain")
    text = models.tokenizer.encode_prompt(TEXT.read_text()[:200_000])
    begins = np.random.default_rng(0).integers(0, len(text) - options.tokens, size=options.prompts)
    prompts = [text[begin : begin + options.tokens] for begin in begins]
    for number in range(ROUNDS + 1):
        shared, responses = decoded(models, prompts, options)
        with mock.patch.object(api, "SHARED", NEVER):
            copies, others = decoded(models, prompts, options)
        if number == 0:  # compiled in it
            pairs = [(*responses[place], *others[place]) for place in responses]
            same = np.mean([np.array_equal(a, c) for a, _, c, _ in pairs])
            gaps = [np.abs(b - d)[np.cumprod(a == c).astype(bool)].max(initial=0) for a, b, c, d in pairs]
            print(f"equal responses {same:.2f}, log-probabilities up to the first difference within {max(gaps):.1e}")
            continue
        print(f"sharing {shared:.2f} s, copies {copies:.2f} s, ratio {shared / copies:.3f}", flush=True)


if __name__ == "__main__":
    main()
