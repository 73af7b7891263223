"""Errors of early values: a guide's values of unfinished responses against what `pi_ref` earns when it finishes them.

    python benchmarks/true_values.py --workdir runs/sentiment [OTHERS ...] [--after 8 16] [--continuations 4] [--test]

Held-out rollouts of pi_ref (with `--test` the samples of its evaluation) are cut after so many tokens, and pi_ref
finishes each a few times: the mean reward is an estimate of the true value, whose own variance is known from the
spread. Values are compared within each prompt, for to know which prompts are easy does not help to steer:

- variance: of the true values, that of the means less what the continuations add to it;
- error: mean squared difference of the guide's values and the true ones, as a share of that variance;
- correlation of the two.

Intervals are a bootstrap over prompts. Guides of several runs are measured on the responses of the first one; none may
have been fitted to these (`fit.holdout` is by prompt: the same prompts and holdout, the same rollouts held out).
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qsharp_jax import report
from qsharp_jax.data.batches import Example
from qsharp_jax.data.records import read_rounds, split_held_out, with_reward
from qsharp_jax.evaluation import score
from qsharp_jax.evaluation.samples import read_samples, samples_path
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.rollouts import sample
from qsharp_jax.run import models, problems
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system import stop_strings
from qsharp_jax.tasks.base import Problem

RESAMPLES = 2000


def responses(session: Session, *, of_test: bool) -> list[tuple[Problem, Example]]:
    """Responses of pi_ref that no guide was fitted to: those of its evaluation, or held-out rollouts."""
    if of_test:
        text, by_id = models.tokenizer(session), {each.problem_id: each for each in problems.test_problems(session)}
        samples = read_samples(samples_path(session.workdir, "pi_ref", 0))
        return [(by_id[s["problem_id"]], Example(text.encode_prompt(s["prompt"]), s["tokens"])) for s in samples]
    by_id = {problem.problem_id: problem for problem in problems.all_train_problems(session)}
    data = with_reward(read_rounds(session.workdir.path / "rollouts", [1], texts=False))
    _, held_out = split_held_out(data, session.config.fit.holdout)
    return [(by_id[each.prompt_id], Example(each.prompt_tokens, each.response_tokens)) for each in held_out]


def continued(
    session: Session, ref: LanguageModel, cut: Sequence[tuple[Problem, Example]], after: int, count: int
) -> np.ndarray:
    """Rewards [N, count] when pi_ref writes on from the responses' first `after` tokens; nan where there is none."""
    text, judge, settings = models.tokenizer(session), problems.judge(session), models.sampling(session)
    generation = sample(
        ref, None, [[*example.prompt, *example.response[:after]] for _, example in cut],
        dataclasses.replace(settings, max_new_tokens=settings.max_new_tokens - after),
        seeds=np.random.SeedSequence(after).generate_state(len(cut) * count), samples=count,
        batch_size=session.config.evaluate.batch_size, name=f"continue after {after} tokens", record=(), tokenizer=text,
    )  # fmt: skip
    judgements = []
    for row, finished in enumerate(generation.finished.tolist()):
        problem, example = cut[row // count]
        tokens = [*example.response[:after], *generation.response(row)]
        response = stop_strings.cut(text.decode(tokens), settings.stop)
        judgements.append(judge.submit(problem, response, tokens=tokens, finished=finished))
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
    parser.add_argument("--test", action="store_true", help="cut pi_ref's samples for the test, of qsharp evaluate")
    options = parser.parse_args()
    sessions = [Session(Workdir.attach(workdir)) for workdir in options.workdir]
    first = sessions[0]
    most = max(options.after)
    if options.continuations < 2 or not 0 < min(options.after) <= most < first.config.generate.max_new_tokens:
        parser.error("--continuations must be 2 or more, and --after between 1 and generate.max_new_tokens - 1")
    held_out = [one for one in responses(first, of_test=options.test) if len(one[1].response) > most]
    if not held_out:
        parser.error("there are no held-out responses (fit.holdout) that are longer than --after")
    values = {}
    for session in sessions:
        guide, bucket = models.load_guide(session), first.config.fit.length_bucket
        values[Path(session.workdir.path).name] = score.score(
            guide, [example for _, example in held_out], rows=first.config.evaluate.batch_size, bucket=bucket
        )
    ref = models.load_ref(first)
    table = [["after", "guide", "variance", "error", "correlation"]]
    for after in options.after:
        rewards = continued(first, ref, held_out, after, options.continuations)
        judged = np.isfinite(rewards).all(1)
        ids = np.asarray([problem.problem_id for problem, _ in held_out])[judged]
        for name, of_guide in values.items():
            row = compare(np.asarray([means[after - 1] for means in of_guide])[judged], rewards[judged], ids)
            correlation = f"{row['correlation']:.2f} ({row['low']:.2f} .. {row['high']:.2f})"
            table.append([str(after), name, f"{row['variance']:.4f}", f"{row['error']:.2f}", correlation])
    print(
        f"{len(held_out)} held-out responses of more than {most} tokens, {options.continuations} continuations each\n"
    )
    print(report.markdown(table))


if __name__ == "__main__":
    main()
