"""The log-weight of tokens that the guide does not score, three definitions, with the guides of finished runs.

    python benchmarks/others.py --workdir runs/seed0 [runs/seed1 ...] [--etas 0.5,0.1] [--cd-etas 0.5] [--constant]

For every definition of `generate.others`, Q# and CD at each eta on the held-out problems of each run, beside pi_ref,
pi_ref cut to the K tokens that the guide scores, and Q# greedily. With `--constant` the guide's head is replaced by one
that gives every token the same value: what is left is what the definition does by itself. Each run keeps what was
measured in DIR/others.json, and a repeated command goes on from there. KL is exact, in nats per response, before
truncation. The reward's interval is 95%: of several runs Student's t over their means, of one a bootstrap over
problems.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qsharp_jax import report, rollouts
from qsharp_jax.evaluation import statistics
from qsharp_jax.models.value import ValueModel
from qsharp_jax.run import models
from qsharp_jax.run.problems import judge, test_problems
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.sampling import OTHERS, Sampling
from qsharp_jax.system.files import write_atomic

Measured = dict[str, list[float]]  # by figure, one number per problem


def without_information(guide: ValueModel) -> ValueModel:
    """The guide with a zero head: 1/2 everywhere, of a Bernoulli."""
    head = {name: jnp.zeros_like(leaf) for name, leaf in guide.params["head"].items()}
    return guide.replace(params=guide.params | {"head": head})


def measure(
    session: Session, etas: list[float], cd_etas: list[float], samples: int, constant: bool
) -> dict[str, Measured]:
    """Measure a run; the keys are method, eta and definition, as a row of the table names them."""
    ref, guide = models.load_ref(session), models.load_guide(session)
    guide = without_information(guide) if constant else guide
    problems = [problem for problem in test_problems(session) for _ in range(samples)]
    prompts = [models.tokenizer(session).encode_prompt(problem.prompt) for problem in problems[::samples]]
    seeds = np.random.SeedSequence(session.seed("others")).generate_state(len(problems))
    size, path = session.config.evaluate.batch_size, session.workdir.path / "others.json"
    sampling = models.sampling(session)
    known = json.loads(path.read_text()) if path.exists() else {}

    def add(name: str, guide: Any, sampling: Sampling) -> None:
        name = f"constant {name}" if constant and guide is not None else name
        if name in known:
            return
        drawn = rollouts.sample(
            ref, guide, prompts, sampling, seeds=seeds, batch_size=size, samples=samples, name=name, record=("kl",)
        )
        texts = [models.tokenizer(session).decode(drawn.response(row)) for row in range(len(problems))]
        rewards = [judgement.reward for judgement in judge(session)(problems, texts)]
        columns = {"reward": rewards, "kl": drawn.kl.sum(1), "kl_truncated": drawn.kl_truncated.sum(1)}
        known[name] = {key: np.reshape(x, (-1, samples)).mean(1).tolist() for key, x in columns.items()}
        write_atomic(path, json.dumps(known))

    add("pi_ref||", None, sampling)
    add("pi_ref, top-K||", None, replace(sampling, top_k=sampling.top_k_candidates))
    for eta in etas:
        for others in OTHERS:
            add(f"Q#|{eta:g}|{others}", guide, replace(sampling, eta=eta, others=others))
            if eta in cd_etas and not constant:
                add(f"CD|{eta:g}|{others}", guide, replace(sampling, eta=eta, others=others, mode="cd"))
    if not constant:
        for others in OTHERS:
            greedy = replace(sampling, eta=etas[-1], others=others, temperature=0.0)
            add(f"Q#, greedy|{etas[-1]:g}|{others}", guide, greedy)
    return known


def table(runs: list[dict[str, Measured]]) -> str:
    words = f"95% ({statistics.seeds_in_words(len(runs))})"
    lines = [["method", "eta", "others", "reward", words, "by run", "KL", "KL truncated"]]
    for name in sorted(set.intersection(*map(set, runs)), key=list(runs[0]).index):
        means = [float(np.mean(run[name]["reward"])) for run in runs]
        kls = (f"{np.mean([np.mean(run[name][key]) for run in runs]):.3f}" for key in ("kl", "kl_truncated"))
        low, high = statistics.over_seeds([np.asarray(run[name]["reward"]) for run in runs])
        reward = [f"{np.mean(means):.3f}", f"{low:.3f} .. {high:.3f}"]
        lines.append([*name.split("|"), *reward, " ".join(f"{mean:.3f}" for mean in means), *kls])
    return report.markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", nargs="+", type=Path, required=True)
    parser.add_argument("--etas", default="0.5,0.2,0.1,0.05", help="in the order in which they are measured")
    parser.add_argument("--cd-etas", help="those at which CD is measured, by default all of --etas")
    parser.add_argument("--samples", type=int, default=2, help="per problem and setting")
    parser.add_argument("--constant", action="store_true", help="with a guide that gives every token the same value")
    options = parser.parse_args()
    etas, cd_etas = (
        [float(eta) for eta in given.split(",") if eta]
        for given in (options.etas, options.etas if options.cd_etas is None else options.cd_etas)
    )
    sessions = [Session(Workdir.attach(path)) for path in options.workdir]
    print(table([measure(session, etas, cd_etas, options.samples, options.constant) for session in sessions]))


if __name__ == "__main__":
    main()
