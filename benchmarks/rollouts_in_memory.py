"""Memory and time until a fit has its first batch, from made-up rollouts on disk.

    python benchmarks/rollouts_in_memory.py --folder runs/made_up [--rollouts 1000000] [--tokens 550]

Rollouts are written once, as shards of a run's size, with lengths, texts and rewards as reasoning tasks have them: a
prompt of 150 tokens that four rollouts share, responses of 100 tokens and more, log-normal, so that both together
have `--tokens` on average; ids up to 128,000 by Zipf's law; 3.5 letters of text per token. Then all is done that
`value_based.aggregate` and `fit` do before the first step, with `drop_no_variation`, a held-out share and, in turn, one
rollout per row and packed rows. Peak memory is that of the process, with JAX imported.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from qsharp_jax.data.batches import Batches, RolloutExamples
from qsharp_jax.data.records import (
    Rollout,
    read_rounds,
    shard_path,
    split_held_out,
    with_reward,
    with_variation,
    write_shard,
)
from qsharp_jax.system import machine

PROMPT, LEAST, SAMPLES, SHARD, VOCABULARY = 150, 100, 4, 1200, 128_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rollouts", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=550, help="of prompt and response, on average")
    options = parser.parse_args()
    for shard in range(options.rollouts // SHARD):
        if not shard_path(options.folder / "round_1", shard).exists():
            write_shard(options.folder / "round_1", shard, make_rollouts(shard, options.tokens - PROMPT - LEAST))
    print("| step | seconds | peak memory, GB |\n| --- | --- | --- |")
    began = last = time.monotonic()

    def tell(step: str) -> None:
        nonlocal last
        print(f"| {step} | {time.monotonic() - last:.1f} | {machine.peak_memory() / 1e9:.2f} |", flush=True)
        last = time.monotonic()

    tell("before")
    data = read_rounds(options.folder, [1], texts=False)
    tell(f"read {len(data)} rollouts of {data.lengths.mean():.0f} tokens")
    data = with_variation(with_reward(data))
    learned, held_out = split_held_out(data, 0.05)
    tell(f"choose {len(learned)} to learn from, {len(held_out)} held out")
    for words, packing in (("one per row", {}), ("packed", {"pack_length": 4096})):
        batches = Batches(RolloutExamples(learned), rows=32, bucket=128, seed=0, lengths=learned.lengths, **packing)
        _ = batches[0]
        tell(f"the first of {batches.steps_per_epoch} batches, {words}")
    print(f"| together | {time.monotonic() - began:.1f} | {machine.peak_memory() / 1e9:.2f} |")


def make_rollouts(shard: int, mean: float) -> list[Rollout]:
    """Make a shard's rollouts, whose responses have `mean` tokens more than `LEAST` on average."""
    rng = np.random.default_rng(shard)
    spread = 0.6
    lengths = LEAST + rng.lognormal(np.log(mean) - spread**2 / 2, spread, SHARD).astype(int)
    letters = np.frombuffer(b"etaoin shrdlu", np.uint8)
    rollouts = []
    for place, length in enumerate(lengths.tolist()):
        if place % SAMPLES == 0:
            prompt = _tokens(rng, PROMPT)
        rollouts.append(
            Rollout(
                prompt_id=f"train/{shard * SHARD // SAMPLES + place // SAMPLES}",
                round=1,
                prompt_tokens=prompt,
                response_tokens=_tokens(rng, length),
                switch=0,
                reward=float(rng.random() < 0.5),
                finished=True,
                eta=float("inf"),
                seed=int(rng.integers(2**32)),
                text=rng.choice(letters, int(3.5 * length)).tobytes().decode(),
            )
        )
    return rollouts


def _tokens(rng: np.random.Generator, count: int) -> list[int]:
    return (rng.zipf(1.2, count) % VOCABULARY).tolist()


if __name__ == "__main__":
    main()
