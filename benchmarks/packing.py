"""Reward, KL and time with packed candidates against a slot for every candidate, with the guide of a finished run.

    python benchmarks/packing.py --workdir runs/arithmetic [--eta 0.1] [--rounds 3]

All held-out problems once for each setting, sampled with the same seeds. Reward is judged by the task, with a 95%
bootstrap interval over problems; KL is exact, in nats a response. Dropped are the candidates above the threshold that
found no slot, a response. Every setting is run in turn in each round; seconds are the median over rounds.
"""

import argparse
import dataclasses
import time

import numpy as np

from qsharp_jax import rollouts
from qsharp_jax.evaluation import statistics
from qsharp_jax.run import models
from qsharp_jax.run.problems import judge, test_problems
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir

CANDIDATES, THRESHOLD = 20, 1e-3
SLOTS = (None, 4.0, 2.0, 1.0)  # guide positions that a row has on average; None: one for each candidate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--eta", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with Workdir.open(options.workdir) as workdir:
        session = Session(workdir)
        ref, guide = models.load_ref(session), models.load_guide(session)
        problems = test_problems(session)
        prompts = [models.tokenizer(session).encode_prompt(problem.prompt) for problem in problems]
        sampling = dataclasses.replace(
            models.sampling(session), eta=options.eta, top_k_candidates=CANDIDATES, candidate_threshold=THRESHOLD
        )

        def run(slots: float | None):
            seeds = np.arange(len(prompts), dtype=np.uint32)
            size = session.config.evaluate.batch_size
            began = time.perf_counter()
            generation = rollouts.sample(
                ref, guide, prompts, dataclasses.replace(sampling, candidate_slots=slots), seeds=seeds,
                batch_size=size, record=("kl",),
            )  # fmt: skip
            return generation, time.perf_counter() - began

        seconds = {slots: [] for slots in SLOTS}
        for number in range(options.rounds + 1):  # the first compiles
            results = {slots: run(slots) for slots in SLOTS}
            if number:
                for slots, (_, taken) in results.items():
                    seconds[slots].append(taken)

    print("| slots a row | reward (95%) | KL | dropped a response | seconds |\n| --- | --- | --- | --- | --- |")
    for slots, (generation, _) in results.items():
        texts = [models.tokenizer(session).decode(generation.response(row)) for row in range(len(problems))]
        rewards = [judgement.reward for judgement in judge(session)(problems, texts)]
        low, high = statistics.bootstrap(np.asarray(rewards))
        name = f"{CANDIDATES} (not packed)" if slots is None else f"{slots:g}"
        print(
            f"| {name} | {np.mean(rewards):.3f} ({low:.3f} .. {high:.3f}) | {generation.kl.sum(1).mean():.3f} |"
            f" {generation.dropped.mean():.3f} | {np.median(seconds[slots]):.2f} |"
        )


if __name__ == "__main__":
    main()
