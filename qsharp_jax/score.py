"""The guide's values of given responses, by teacher forcing, and how good they are.

Shapes: B rows, T tokens. It knows nothing about sampling, tasks or where the responses come from.
"""

from collections.abc import Sequence

import jax
import numpy as np

from qsharp_jax import values
from qsharp_jax.dataset import Batch, Example, length_batches, make_batch
from qsharp_jax.models import value
from qsharp_jax.models.value import ValueModel

BINS = 10  # of equal width, for calibration


def score(guide: ValueModel, examples: Sequence[Example], *, rows: int, bucket: int) -> list[np.ndarray]:
    """The mean of Z at every response token, one array a response.

    Args:
      rows: sequences in a batch.
      bucket: widths are multiples of it, in tokens.
    """
    scores: list[np.ndarray] = [np.empty(0)] * len(examples)
    for width, indices in length_batches([len(example) for example in examples], rows=rows, bucket=bucket):
        part = [examples[index] for index in indices]
        means = np.asarray(_means(guide, make_batch(part, rows, width)))
        for row, index in enumerate(indices):
            scores[index] = means[row, len(part[row].prompt) : len(part[row])]
    return scores


@jax.jit
def _means(guide: ValueModel, batch: Batch) -> jax.Array:
    outputs, _ = value.forward(guide.params, guide.config, batch.tokens, batch.segments, batch.positions)
    return values.from_outputs(guide.config.distribution, outputs, guide.config.atoms).mean()


def calibration(predicted: np.ndarray, rewards: np.ndarray) -> list[dict[str, float]]:
    """Rewards against predictions in `BINS` bins of equal width over the predictions' range [0, 1] or wider.

    Returns a row a non-empty bin: predicted and observed means, and the count.
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


def ranking(last: np.ndarray, rewards: np.ndarray, prompt_ids: Sequence[str]) -> float:
    """How often, among two responses to one prompt with different rewards, the better one has the greater value.

    Ties count one half; nan if no prompt has two rewards. Pairs of different prompts are left out on purpose: knowing
    which prompts are hard is no help in steering.

    Args:
      last: [n] value at each response's last token.
      rewards: [n].
      prompt_ids: n of them.
    """
    ids, right, pairs = np.asarray(prompt_ids), 0.0, 0
    for prompt in np.unique(ids):
        mine = ids == prompt
        better = rewards[mine][:, None] > rewards[mine]
        difference = last[mine][:, None] - last[mine]
        right += (better * (np.sign(difference) + 1) / 2).sum()
        pairs += better.sum()
    return float(right / pairs) if pairs else float("nan")


def quality(
    guide: ValueModel, examples: Sequence[Example], prompt_ids: Sequence[str], *, rows: int, bucket: int
) -> dict[str, float]:
    """Brier score and calibration error over labelled tokens, and the ranking within prompts, on held-out rollouts."""
    scores = score(guide, examples, rows=rows, bucket=bucket)
    labelled = np.concatenate([s[example.first_label :] for s, example in zip(scores, examples, strict=True)])
    rewards = np.concatenate([np.full(len(e.response) - e.first_label, e.reward, np.float32) for e in examples])
    last = np.asarray([s[-1] for s in scores])
    return {
        "brier": float(np.mean((labelled - rewards) ** 2)),
        "calibration_error": calibration_error(labelled, rewards),
        "ranking": ranking(last, np.asarray([e.reward for e in examples]), prompt_ids),
    }
