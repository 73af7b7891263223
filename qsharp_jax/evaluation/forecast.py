"""Forecast of a guide's reward and KL from its values of pi_ref's own rollouts, before any decoding.

The guided policy multiplies pi_ref by w(x, y) = E_{z~Z(x,y)}[exp(z/eta)] at every token, and normalizes. If the guide
is consistent, w(x) = E_{y~pi_ref} w(x, y), each token's normalizer cancels the weight before it, and the product over a
response telescopes to u = w(its end) / w(its prompt). Expectations under the guided policy are then pi_ref's, weighted:

    reward = E[u r] / E[u],    KL = E[u log u] / E[u] - log E[u].

With a calibrated Bernoulli guide and eta to 0 the reward is at most m + Var(p) / m, where p is the value at the end and
m the mean reward: the guide's resolution limits it, not eta. A tilt to a power a > 1 goes on from there; u^a is divided
by its mean over the prompt's responses. A temperature T divides the tilt too, so that the power is then a / T. Decoding
gives less where values come late, or contradict each other from token to token. Shapes: N responses, L etas.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import guidance, values
from qsharp_jax.algorithms.registry import ALGORITHMS
from qsharp_jax.data.batches import Batch, Example, RolloutExamples
from qsharp_jax.data.records import read_rounds, split_held_out, with_reward
from qsharp_jax.evaluation.score import sequences
from qsharp_jax.models import value
from qsharp_jax.models.value import ValueModel
from qsharp_jax.run import config as configs
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system import progress
from qsharp_jax.system.files import is_file, read_text, write_atomic

BEST_OF = 4
POWERS = (1.0, 2.0, 3.0, 4.0)


def run(session: Session, number: int, guide: ValueModel, *, skip_damaged: bool = False) -> list[dict]:
    """Forecast a round's guide from the held-out rollouts of pi_ref, print it, and store it in the workdir.

    Args:
      skip_damaged: as in `read_rounds`.

    Returns:
      rows with "method" (the algorithm, its further modes, best_of_k, and with a "power" the algorithm's tilt to it),
      "eta", "reward", "kl" in nats (for best_of_k its bound log k - (k - 1) / k), and "n" rollouts. Empty without
      held-out rollouts.
    """
    if stored := read(session.workdir, number):
        return stored
    config, algorithm = session.config, ALGORITHMS[session.config.algorithm]
    if not config.fit.holdout:
        return []
    folder = session.workdir.path / "rollouts"
    of_ref = with_reward(read_rounds(folder, [1], skip_damaged=skip_damaged, texts=False))
    _, held_out = split_held_out(of_ref, config.fit.holdout)
    if not held_out:
        return []
    progress.tell(f"forecasting from {len(held_out)} held-out rollouts")
    examples, etas = RolloutExamples(held_out), sorted({*config.evaluate.etas}, reverse=True)
    rewards, prompt_ids = held_out.rewards.astype(float), held_out.prompt_ids
    powers = sorted({*POWERS, config.evaluate.power})
    rows = []
    for method in (algorithm.name, *algorithm.extra_modes):
        mode = algorithm.mode(config) if method == algorithm.name else method
        of_batch = functools.partial(_log_weights, guide, etas=jnp.asarray(etas, jnp.float32), mode=mode)
        log_u, final = _ends(of_batch, examples, rows=config.fit.batch_size, bucket=config.fit.length_bucket)
        for power, (place, eta) in itertools.product(powers if method == algorithm.name else [1.0], enumerate(etas)):
            log_tilt = to_power(log_u[:, place], power, config.generate.temperature, prompt_ids)
            row = {"method": method, "eta": eta, "n": len(rewards)} | tilted(log_tilt, rewards)
            rows.append(row if power == 1 else row | {"method": f"{method}_power", "power": power})
    best = best_of(BEST_OF, final, rewards, prompt_ids)
    if not math.isnan(best):
        bound = math.log(BEST_OF) - (BEST_OF - 1) / BEST_OF
        rows.append({"method": f"best_of_{BEST_OF}", "eta": None, "n": len(rewards), "reward": best, "kl": bound})
    print(summary(rows, float(rewards.mean()), configs.kl_weight(config)))
    if session.workdir.writes:
        write_atomic(_path(session.workdir, number), json.dumps(rows, indent=1) + "\n")
    return rows


def read(workdir: Workdir, number: int) -> list[dict]:
    """Return the rows that were stored for a round; none if there are none."""
    path = _path(workdir, number)
    return json.loads(read_text(path)) if is_file(path) else []


def _path(workdir: Workdir, number: int) -> Path:
    return workdir.samples / f"forecast_round_{number}.json"


def summary(rows: Sequence[dict], mean: float, eta: float) -> str:
    """Format the forecast at the run's own eta, or else the smallest, in one line."""
    etas = [row["eta"] for row in rows if row["eta"] is not None]
    shown = eta if eta in etas else min(etas)
    parts = []
    for row in rows:
        if row["eta"] in (None, shown):
            power = f" {row['power']:g}" if "power" in row else ""
            parts.append(f"{row['method']}{power} {row['reward']:.3f} at {row['kl']:.2f} nats")
    words = f"forecast by {rows[0]['n']} held-out rollouts of pi_ref, mean reward {mean:.3f}"
    return f"{words}, at eta {shown:g}: {'; '.join(parts)}"


def tilted(log_u: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
    """Return the mean reward and the KL to pi_ref, in nats, of pi_ref's responses weighted by exp(log_u), both [N]."""
    log_u = log_u - log_u.max()
    weights = np.exp(log_u) / np.exp(log_u).sum()
    log_ratio = log_u - np.log(np.exp(log_u).mean())  # of the two policies
    return {"reward": float(weights @ rewards), "kl": float(weights @ log_ratio)}


def to_power(log_u: np.ndarray, power: float, temperature: float, prompt_ids: Sequence[str]) -> np.ndarray:
    """Return the logarithm of the weights of a tilt to a power, decoded at a temperature (0 as 1): u^(power / T).

    Those to another power than 1 are divided by their mean over each prompt's responses. `log_u` [N].
    """
    exponent = power / (temperature or 1.0)
    if exponent == 1:
        return log_u
    ids, log_tilt = np.asarray(prompt_ids), exponent * log_u
    for prompt in np.unique(ids):
        mine = ids == prompt
        log_tilt[mine] -= np.logaddexp.reduce(log_tilt[mine]) - np.log(mine.sum())
    return log_tilt


def best_of(count: int, final: np.ndarray, rewards: np.ndarray, prompt_ids: Sequence[str]) -> float:
    """Return the mean reward of the response of greatest value among `count` to a prompt, over all such choices.

    Ties are averaged. Prompts with fewer responses do not count; nan if no prompt has as many.
    """
    ids, means = np.asarray(prompt_ids), []
    for prompt in np.unique(ids):
        mine, mean_of = ids == prompt, {}
        for level in np.unique(final[mine]):
            mean_of[level] = rewards[mine & (final == level)].mean()
        ascending = np.sort(final[mine])
        if len(ascending) >= count:
            # The response at place k (from 0) is the best of `count` that are chosen with it from the k below.
            chances = [math.comb(k, count - 1) / math.comb(len(ascending), count) for k in range(len(ascending))]
            means.append(sum(chance * mean_of[level] for chance, level in zip(chances, ascending, strict=True)))
    return float(np.mean(means)) if means else math.nan


def _ends(
    of_batch: Callable[[Batch], jax.Array], examples: Sequence[Example], *, rows: int, bucket: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return log u [N, L], of the responses' ends over their prompts, and the means of Z at the ends [N]."""
    numbers = sequences(of_batch, examples, rows=rows, bucket=bucket)
    at_end = np.stack([n[-1] for n in numbers])
    at_prompt = np.stack([n[len(example.prompt) - 1] for n, example in zip(numbers, examples, strict=True)])
    return (at_end - at_prompt)[:, :-1].astype(float), at_end[:, -1]


@functools.partial(jax.jit, static_argnames="mode")
def _log_weights(guide: ValueModel, batch: Batch, etas: jax.Array, mode: str) -> jax.Array:
    """[B, T, L + 1]: log w of every token at each eta, and the mean of Z."""
    outputs, _ = value.forward(guide.params, guide.config, batch.tokens, batch.segments, batch.positions)
    distribution = values.from_outputs(guide.config.distribution, outputs, guide.config.atoms)
    of_eta = [guidance.log_weights(distribution, jnp.full(batch.tokens.shape[:1], eta), mode) for eta in etas]
    return jnp.stack([*of_eta, distribution.mean()], axis=-1)
