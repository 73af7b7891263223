"""Rollouts with rows that are refilled against static batches: the share of useful rows, and seconds.

    python benchmarks/collection.py --workdir runs/collection [--batch 128,250] [--prompts 600] [--rounds 3]

The models are those of configs/arithmetic.py: pi_ref pre-trained in the workdir for `--steps` (responses then have the
task's lengths), and a guide of its shape with a fresh head, which costs as much as one that has learned. Collected are
a first round's rollouts (pi_ref alone) and a second's (guided roll-in, pi_ref finishes), each by

- static: batches of one shape, the prompts of a shard sorted by length, each waiting for its longest response;
- refilled: `decoding.ContinuousBatch`, as `rollouts.collect` uses it.

Both give the same tokens, which is checked. Useful are the row-steps that went into a response, of all that were
computed. Every way is run in turn in each round, after one that compiles; seconds are the median over rounds, judging
and writing left out.
"""

import argparse
import dataclasses
import time

import numpy as np

from qsharp_jax import decoding, rollouts
from qsharp_jax.models.value import ValueModel
from qsharp_jax.run import config as configs
from qsharp_jax.run import models, pretrain
from qsharp_jax.run.problems import train_problems
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--batch", default="128,250", help="rows that are decoded at once")
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--samples", type=int, default=4, help="rollouts of each prompt")
    parser.add_argument("--steps", type=int, default=400, help="of the pre-training")
    parser.add_argument("--rounds", type=int, default=3, help="that are timed; 0: shares alone")
    options = parser.parse_args()
    config = configs.load("configs/arithmetic.py", [f"--config.pretrain.steps={options.steps}"])
    with Workdir.open(options.workdir, config) as workdir:
        session = Session(workdir)
        ref = decoding.for_decoding(pretrain.run(session))
        guide = decoding.for_decoding(
            ValueModel(models.first_guide(session, models.load_ref(session)), models.guide_config(session))
        )
        prompts = [
            models.tokenizer(session).encode_prompt(p.prompt) for p in train_problems(session, 1)[: options.prompts]
        ]
        sampling = dataclasses.replace(models.sampling(session), eta=config.collect.eta)
        draws = np.random.default_rng(0).integers(2**32, size=(len(prompts) * options.samples, 3), dtype=np.uint32)
        print("| round | rows | way | useful rows | seconds | tokens |\n| --- | --- | --- | --- | --- | --- |")
        for rows in map(int, options.batch.split(",")):
            for number, with_guide in ((1, None), (2, guide)):
                ways = {"static": static, "refilled": refilled}
                seconds = {name: [] for name in ways}
                for turn in range(options.rounds + 1):  # the first compiles
                    found = {}
                    for name, way in ways.items():
                        began = time.perf_counter()
                        found[name] = way(ref, with_guide, prompts, draws, rows, config, sampling)
                        if turn:
                            seconds[name].append(time.perf_counter() - began)
                assert found["static"][0] == found["refilled"][0], "the responses differ"
                for name, (_, tokens, row_steps) in found.items():
                    took = f"{np.median(seconds[name]):.2f}" if seconds[name] else ""
                    print(f"| {number} | {rows} | {name} | {tokens / row_steps:.3f} | {took} | {tokens} |", flush=True)


def refilled(ref, guide, prompts, draws, rows, config, sampling):
    """All responses, the tokens that were decoded, and the row-steps that were computed."""
    batches, samples = [], len(draws) // len(prompts)
    made = rollouts.responses(ref, guide, prompts, sampling, draws, batches, samples=samples, rows=rows)
    responses = {index: response for index, _, response, _ in made}
    return responses, sum(batch.tokens for batch in batches), sum(batch.row_steps for batch in batches)


def static(ref, guide, prompts, draws, rows, config, sampling):
    """The same; a batch is whole prompts, and a shard of `collect.shard_rows` is rolled in before it is rolled out."""
    samples = len(draws) // len(prompts)
    step = config.collect.shard_rows // samples
    responses, counts = {}, [0, 0]

    def decode(guide, prompts, samples, seeds, budget):
        """Generated tokens of every row, in batches of prompts of like length."""
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        each, made = max(rows // samples, 1), {}
        for begin in range(0, len(prompts), each):
            batch = order[begin : begin + each]
            filled = np.resize(batch, each)
            places = (filled[:, None] * samples + np.arange(samples)).reshape(-1)
            kept = len(batch) * samples
            budgets = np.where(np.arange(len(places)) < kept, budget[places], 0)
            run = decoding.Run(
                ref, guide, [prompts[prompt] for prompt in filled], dataclasses.replace(sampling, budget=budgets),
                samples=samples, rng=seeds[places], record=(),
            )  # fmt: skip
            state = decoding.decode(run.ref, run.guide, run.state, run.controls, settings=run.settings)
            counts[1] += int(state.step) * len(places)
            generation = run.generation(state)
            made |= {place: generation.response(row) for row, place in enumerate(places[:kept].tolist())}
        counts[0] += sum(map(len, made.values()))
        return [made[place] for place in range(len(prompts) * samples)]

    for begin in range(0, len(prompts), step):
        asked = prompts[begin : begin + step]
        first, count = begin * samples, len(asked) * samples
        mine, budget = draws[first : first + count], np.full(count, sampling.max_new_tokens)
        prefixes = [[]] * count
        if guide is not None:
            whole = decode(guide, asked, samples, mine[:, 0], budget)
            lengths = np.asarray([len(response) for response in whole])
            switches = rollouts.draw_switches(lengths, mine[:, 2])
            prefixes = [response[:switch] for response, switch in zip(whole, switches, strict=True)]
            budget = np.where(switches == lengths, 0, budget - switches)
            asked = [[*asked[row // samples], *prefix] for row, prefix in enumerate(prefixes)]
        rest = decode(None, asked, samples if guide is None else 1, mine[:, 1], budget)
        responses |= {first + row: [*prefix, *rest[row]] for row, prefix in enumerate(prefixes)}
    return responses, *counts


if __name__ == "__main__":
    main()
