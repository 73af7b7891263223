r"""Answers a second that are judged, on real solutions of GSM8K, by as many workers as there are cores.

    QSHARP_DATA=DIR python benchmarks/judging.py [--answers 4000] [--workers 2] [--rounds 3]

Every answer is of another problem or spelled in another way, so that none is known from before:

  as given   each solution with its own answer in a box, "1,080" with its comma: nearly all equal as strings
  wrong      each solution with the answer of another problem: whole numbers that differ
  decorated  each solution with "\$72.0" or "72.00 \text{ in all}" in the box: numbers once their dress is off
  algebra    each solution with "72 + 5 - 5" in the box: `math_verify` judges every one
  mixed      of each a quarter

Seconds are the median over rounds, without the start of the workers.
"""

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path

from qsharp_jax.system import machine
from qsharp_jax.tasks import finite, registry
from qsharp_jax.tasks.judging import Judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=machine.cores())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    task, folder = registry.get("gsm8k"), os.environ["QSHARP_DATA"]
    lines = (Path(folder) / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").split("\n")[: options.answers]
    rows = [json.loads(line) for line in lines if line]
    problems = [problem for row in rows for problem in task.to_problems(finite.Row("a row", row))]
    worked = [row["answer"].rpartition("\n#### ") for row in rows]
    steps, answers = [before for before, _, _ in worked], [answer for _, _, answer in worked]
    decorated = [
        rf"\${answer}.0" if place % 2 else rf"{answer}.00 \text{{ in all}}" for place, answer in enumerate(answers)
    ]
    kinds = {"as given": answers, "wrong": answers[1:] + answers[:1], "decorated": decorated}
    kinds["algebra"] = [f"{answer.replace(',', '')} + {place} - {place}" for place, answer in enumerate(answers)]
    kinds["mixed"] = [list(kinds.values())[place % 4][place] for place in range(len(rows))]

    print(f"{len(rows)} answers, {options.workers} workers, {options.rounds} rounds\n")
    print("| answers | judged right | seconds | answers a second |\n| --- | --- | --- | --- |")
    for name, boxes in kinds.items():
        responses = [f"{before}\nThe answer is $\\boxed{{{box}}}$." for before, box in zip(steps, boxes, strict=True)]
        seconds = []
        for number in range(options.rounds):
            judge = Judge(task, options.workers)  # one that knows no answers yet
            judge(problems[:1] * options.workers, [rf"\boxed{{x+{i}}}" for i in range(options.workers)])  # all begin
            order = random.Random(number).sample(range(len(rows)), len(rows))
            asked = [problems[i] for i in order], [responses[i] for i in order]
            began = time.perf_counter()
            judgements = judge(*asked)
            seconds.append(time.perf_counter() - began)
            judge.close()
        right = sum(judgement.reward for judgement in judgements) / len(rows)
        taken = statistics.median(seconds)
        print(f"| {name} | {right:.4f} | {taken:.2f} | {len(rows) / taken:.0f} |", flush=True)


if __name__ == "__main__":
    main()
