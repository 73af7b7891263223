"""Log-probabilities and values of given responses, by teacher forcing, and how good the values are.

Shapes: B rows, T tokens, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import values
from qsharp_jax.data.batches import Batch, Example, length_batches, make_batch
from qsharp_jax.models import decoder, precision, sharding, value
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueModel

BINS = 10  # of equal width, for calibration
LOGITS = 1 << 24  # that exist at a time: 64 MiB of them


def score(guide: ValueModel, examples: Sequence[Example], *, rows: int, bucket: int) -> list[np.ndarray]:
    """The mean of Z at every response token, one array per response.

    Args:
      rows: sequences in a batch.
      bucket: widths are multiples of it, in tokens.
    """
    numbers = sequences(functools.partial(_means, guide), examples, rows=rows, bucket=bucket)
    return [means[len(example.prompt) :] for means, example in zip(numbers, examples, strict=True)]


def log_probs(
    ref: LanguageModel, examples: Sequence[Example], *, rows: int, bucket: int, vocab_size: int
) -> list[np.ndarray]:
    """The log-probability of every response token under the reference, in nats and float32, one array per response.

    Args:
      examples: each with a prompt of at least one token.
      vocab_size: ids from here on pad the embedding; they have probability 0.
    """
    of_batch = functools.partial(_log_probs, ref, vocab_size=vocab_size)
    numbers = sequences(of_batch, examples, rows=rows, bucket=bucket)
    return [log_probs[len(example.prompt) :] for log_probs, example in zip(numbers, examples, strict=True)]


def sequences(
    of_batch: Callable[[Batch], jax.Array], examples: Sequence[Example], *, rows: int, bucket: int
) -> list[np.ndarray]:
    """Apply `of_batch`, with results [B, T] or [B, T, ...], and return one array per example, prompt included."""
    rows = sharding.round_rows(rows)
    results: list[np.ndarray] = [np.empty(0)] * len(examples)
    for width, indices in length_batches([len(example) for example in examples], rows=rows, bucket=bucket):
        part = [examples[index] for index in indices]
        numbers = sharding.to_host(of_batch(sharding.place_rows(make_batch(part, rows, width))))
        for row, index in enumerate(indices):
            results[index] = numbers[row, : len(part[row])]
    return results


@jax.jit
def _means(guide: ValueModel, batch: Batch) -> jax.Array:
    outputs, _ = value.forward(guide.params, guide.config, batch.tokens, batch.segments, batch.positions)
    return values.from_outputs(guide.config.distribution, outputs, guide.config.atoms).mean()


@functools.partial(jax.jit, static_argnames=("projection", "clip"))
def _means_and_nll(guide: ValueModel, batch: Batch, *, projection: values.Projection, clip: bool) -> jax.Array:
    """[B, T, 2]: the mean of Z at every token, and the negative log-likelihood of the reward-to-go."""
    outputs, _ = value.forward(guide.params, guide.config, batch.tokens, batch.segments, batch.positions)
    distribution = values.from_outputs(guide.config.distribution, outputs, guide.config.atoms)
    nll = values.nll(distribution, batch.reward_to_go, projection=projection, clip=clip)
    return jnp.stack([distribution.mean(), nll], axis=-1)


@functools.partial(jax.jit, static_argnames="vocab_size")
def _log_probs(ref: LanguageModel, batch: Batch, *, vocab_size: int) -> jax.Array:
    """Log-probabilities [B, T] of each token given those before it; 0 at the first."""
    with precision.of(ref.config.dtype):
        hidden, _ = decoder.forward(
            ref.params, ref.config, batch.tokens, batch.segments, batch.positions, attend_by="chunks"
        )
        before, targets = hidden[:, :-1].reshape(-1, hidden.shape[-1]), batch.tokens[:, 1:].reshape(-1)

        def of_token(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            logits = decoder.logits(ref.params, ref.config, pair[0])[:vocab_size]
            return logits[pair[1]] - jax.nn.logsumexp(logits)

        # Logits [B, T, V] would be larger than the model, so they are computed for `batch_size` positions at a time.
        size = min(max(LOGITS // ref.config.vocab_size, 1), len(targets))
        log_probs = jax.lax.map(of_token, (before, targets), batch_size=size).reshape(hidden.shape[0], -1)
    return jnp.pad(log_probs, ((0, 0), (1, 0)))


def calibration(predicted: np.ndarray, rewards: np.ndarray) -> list[dict[str, float]]:
    """Compare rewards with predictions in `BINS` bins of equal width over [0, 1], or the predictions' wider range.

    Returns one row per non-empty bin: predicted and observed means, and the count.
    """
    low, high = min(0.0, predicted.min()), max(1.0, predicted.max())
    place = np.minimum(((predicted - low) / (high - low) * BINS).astype(int), BINS - 1)
    return [
        {
            "predicted": float(predicted[place == b].mean()),
            "observed": float(rewards[place == b].mean()),
            "count": int((place == b).sum()),
        }
        for b in np.unique(place)
    ]


def calibration_error(predicted: np.ndarray, rewards: np.ndarray) -> float:
    """Expected calibration error: the bins' mean |predicted - observed|, weighted by count (Naeini et al. 2015)."""
    bins = calibration(predicted, rewards)
    return sum(b["count"] * abs(b["predicted"] - b["observed"]) for b in bins) / len(predicted)


def ranking(final: np.ndarray, rewards: np.ndarray, prompt_ids: Sequence[str]) -> float:
    """Probability that, of two responses to one prompt with different rewards, the better has the greater value.

    Ties count one half; nan if no prompt has two rewards. Pairs of different prompts do not count: knowing which
    prompts are hard does not help to steer.

    Args:
      final: [n] value at each response's last token.
      rewards: [n].
      prompt_ids: n of them.
    """
    ids, right, pairs = np.asarray(prompt_ids), 0.0, 0
    for prompt in np.unique(ids):
        mine = ids == prompt
        better = rewards[mine][:, None] > rewards[mine]
        difference = final[mine][:, None] - final[mine]
        right += (better * (np.sign(difference) + 1) / 2).sum()
        pairs += better.sum()
    return float(right / pairs) if pairs else float("nan")


def quality(
    guide: ValueModel,
    examples: Sequence[Example],
    prompt_ids: Sequence[str],
    *,
    rows: int,
    bucket: int,
    projection: values.Projection = "two_hot",
    clip: bool = False,
) -> dict[str, float]:
    """Measure a guide on held-out rollouts.

    Args:
      projection, clip: how a categorical puts rewards on its atoms, see `values.project`.

    Returns:
      nll, brier, calibration_error: over labeled tokens; negative log-likelihood in nats.
      ranking: within prompts.
    """
    of_batch = functools.partial(_means_and_nll, guide, projection=projection, clip=clip)
    numbers = sequences(of_batch, examples, rows=rows, bucket=bucket)
    both = np.concatenate([n[len(e.prompt) + e.first_label :] for n, e in zip(numbers, examples, strict=True)])
    labeled, nll = both[:, 0], both[:, 1]
    rewards = np.concatenate([np.full(len(e.response) - e.first_label, e.reward, np.float32) for e in examples])
    final = np.asarray([n[-1, 0] for n in numbers])
    return {
        "nll": float(np.mean(nll, dtype=np.float64)),
        "brier": float(np.mean((labeled - rewards) ** 2)),
        "calibration_error": calibration_error(labeled, rewards),
        "ranking": ranking(final, np.asarray([e.reward for e in examples]), prompt_ids),
    }
