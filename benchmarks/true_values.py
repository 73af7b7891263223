"""Errors of early values: a guide's values of unfinished responses against what `pi_ref` earns when it finishes them.

    python benchmarks/true_values.py --workdir runs/sentiment [OTHERS ...] [--after 8 16] [--continuations 4]

Held-out rollouts of pi_ref are cut after so many tokens, and pi_ref finishes each a few times: the mean reward is an
estimate of the true value, whose own variance is known from the spread. Values are compared within each prompt, for
to know which prompts are easy does not help to steer:

- variance: of the true values, that of the means less what the continuations add to it;
- error: mean squared difference of the guide's values and the true ones, as a share of that variance;
- correlation of the two.

Intervals are a bootstrap over prompts. Guides of several runs are measured on the rollouts of the first one; none may
have been fitted to these (`fit.holdout` is by prompt: the same prompts and holdout, the same rollouts held out).
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qsharp_jax import report
from qsharp_jax.data.batches import Example
from qsharp_jax.data.records import Rollout, read_rounds, split_held_out, with_reward
from qsharp_jax.evaluation import score
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.rollouts import sample
from qsharp_jax.run import models, problems
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system import stop_strings

RESAMPLES = 2000


def continued(
    session: Session, ref: LanguageModel, rollouts: Sequence[Rollout], after: int, count: int
) -> np.ndarray:
    """Rewards [N, count] when pi_ref writes on from the rollouts' first `after` tokens; nan where there is none."""
    text, judge, settings = models.tokenizer(session), problems.judge(session), models.sampling(session)
    by_id = {problem.problem_id: problem for problem in problems.all_train_problems(session)}
    generation = sample(
        ref, None, [[*r.prompt_tokens, *r.response_tokens[:after]] for r in rollouts],
        dataclasses.replace(settings, max_new_tokens=settings.max_new_tokens - after),
        seeds=np.random.SeedSequence(after).generate_state(len(rollouts) * count), samples=count,
        batch_size=session.config.evaluate.batch_size, name=f"continue after {after} tokens", record=(), tokenizer=text,
    )  # fmt: skip
    judgements = []
    for row, finished in enumerate(generation.finished.tolist()):
        rollout = rollouts[row // count]
        tokens = [*rollout.response_tokens[:after], *generation.response(row)]
        response = stop_strings.cut(text.decode(tokens), settings.stop)
        judgements.append(judge.submit(by_id[rollout.prompt_id], response, tokens=tokens, finished=finished))
    return np.asarray([judgement().reward for judgement in judgements], float).reshape(-1, count)


def compare(values: np.ndarray, rewards: np.ndarray, prompt_ids: Sequence[str]) -> dict[str, float]:
    """The numbers of a row, and the interval of the correlation.

    Args:
      values: [N] of the guide.
      rewards: [N, M] of M continuations each.
      prompt_ids: N of them; one with a single response does not count.
    """
    _, place = np.unique(np.asarray(prompt_ids), return_inverse=True)
    count = np.bincount(place)

    def centered(x: np.ndarray) -> np.ndarray:
        return x - (np.bincount(place, x) / count)[place]

    mean, value = centered(rewards.mean(1)), centered(values)
    added = rewards.var(1, ddof=1) / rewards.shape[1]  # to the variance of the means
    sums = np.stack(
        [
            np.bincount(place, mean**2) - (1 - 1 / count) * np.bincount(place, added),
            np.bincount(place, mean * value),
            np.bincount(place, value**2),
            count - 1.0,
        ]
    )  # [4, prompts]
    picks = np.random.default_rng(0).integers(len(count), size=(RESAMPLES, len(count)))
    _, correlations, _ = _ratios(sums[:, picks].sum(-1))
    variance, correlation, error = _ratios(sums.sum(-1))
    low, high = np.percentile(correlations, [2.5, 97.5])
    return dict(variance=variance, error=error / variance, correlation=correlation, low=low, high=high)


def _ratios(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Variance of the true values, correlation, and mean squared error, of sums over prompts [4, ...]."""
    truth, both, value = sums[:3] / sums[3]
    return truth, both / np.sqrt(truth * value), truth - 2 * both + value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, nargs="+", help="of the rollouts and a guide, and of other guides")
    parser.add_argument("--after", type=int, nargs="+", default=[8, 16], help="tokens")
    parser.add_argument("--continuations", type=int, default=4, help="of each cut response, at least 2")
    options = parser.parse_args()
    sessions = [Session(Workdir.attach(workdir)) for workdir in options.workdir]
    first = sessions[0]
    data = with_reward(read_rounds(first.workdir.path / "rollouts", [1], texts=False))
    _, held_out = split_held_out(data, first.config.fit.holdout)
    most = max(options.after)
    if options.continuations < 2 or not 0 < min(options.after) <= most < first.config.generate.max_new_tokens:
        parser.error("--continuations must be 2 or more, and --after between 1 and generate.max_new_tokens - 1")
    held_out = [rollout for rollout in held_out if len(rollout.response_tokens) > most]
    if not held_out:
        parser.error("there are no held-out rollouts (fit.holdout) that are longer than --after")
    examples = [Example(rollout.prompt_tokens, rollout.response_tokens) for rollout in held_out]
    values = {}
    for session in sessions:
        guide, bucket = models.load_guide(session), first.config.fit.length_bucket
        values[Path(session.workdir.path).name] = score.score(
            guide, examples, rows=first.config.evaluate.batch_size, bucket=bucket
        )
    ref = models.load_ref(first)
    table = [["after", "guide", "variance", "error", "correlation"]]
    for after in options.after:
        rewards = continued(first, ref, held_out, after, options.continuations)
        judged = np.isfinite(rewards).all(1)
        ids = np.asarray([rollout.prompt_id for rollout in held_out])[judged]
        for name, of_guide in values.items():
            row = compare(np.asarray([means[after - 1] for means in of_guide])[judged], rewards[judged], ids)
            correlation = f"{row['correlation']:.2f} ({row['low']:.2f} .. {row['high']:.2f})"
            table.append([str(after), name, f"{row['variance']:.4f}", f"{row['error']:.2f}", correlation])
    print(f"{len(held_out)} held-out rollouts of more than {most} tokens, {options.continuations} continuations each\n")
    print(report.markdown(table))


if __name__ == "__main__":
    main()
