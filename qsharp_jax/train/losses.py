"""Maximum likelihood: of the next token for a language model, of the reward-to-go for a guide.

The guide's loss is the negative log-likelihood of the observed reward-to-go at every labelled token (arXiv 2502.20548,
Algorithm 1). Shapes: B rows, T tokens, D embed, V vocabulary, F offsets of the future-token loss.

A loss and its metrics are means over a batch. Where `whole` is given, `batch` is a part of its rows, and the sums are
divided by the whole's counts: the parts' losses, metrics and gradients then add up to the whole's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qsharp_jax import values
from qsharp_jax.dataset import Batch
from qsharp_jax.errors import UserError
from qsharp_jax.models import decoder, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import Params
from qsharp_jax.models.value import ValueConfig


def language_model_loss(
    params: Params, batch: Batch, whole: Batch | None = None, *, config: DecoderConfig
) -> tuple[jax.Array, dict]:
    """Mean cross-entropy of the next token, in nats, over response tokens."""
    whole = batch if whole is None else whole
    hidden, _ = decoder.forward(params, config, batch.tokens, batch.segments, batch.positions)
    logits = decoder.logits(params, config, hidden[:, :-1])
    targets, mask, of = batch.tokens[:, 1:], _has_context(batch), _has_context(whole)
    loss = masked_mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets), mask, of)
    return loss, {"accuracy": masked_mean(logits.argmax(-1) == targets, mask, of)}


def _has_context(batch: Batch) -> jax.Array:
    """[B, T - 1]: whether the token one place later is one of a response, with a token of its own segment before it."""
    return batch.response_mask[:, 1:] & (batch.segments[:, 1:] == batch.segments[:, :-1])


def value_loss(
    params: Params,
    batch: Batch,
    whole: Batch | None = None,
    *,
    config: ValueConfig,
    projection: values.Projection = "two_hot",
    clip: bool = False,
    future_weight: float = 0.0,
    remat: decoder.Remat = "dots",
) -> tuple[jax.Array, dict]:
    """Mean negative log-likelihood of the reward-to-go over all labelled tokens of the batch.

    With "future" heads in `params`, `future_weight` times the loss of predicting the later tokens of successful
    rollouts is added, from the same forward pass: a value that depends on tokens several steps ahead is otherwise
    found only after a long plateau.

    Args:
      params: a value model's parameters, with "future" [F, D, V] or without.
      projection, clip: how a categorical puts rewards on its atoms, see `values.project`.
      remat: of the trunk, see `decoder.forward`.
    """
    whole = batch if whole is None else whole
    outputs, hidden = value.forward(params, config, batch.tokens, batch.segments, batch.positions, remat=remat)
    distribution = values.from_outputs(config.distribution, outputs, config.atoms)
    mask, of = batch.label_mask, whole.label_mask
    nll = masked_mean(values.nll(distribution, batch.reward_to_go, projection=projection, clip=clip), mask, of)
    metrics = {"nll": nll, "brier": masked_mean((distribution.mean() - batch.reward_to_go) ** 2, mask, of)}
    if "future" not in params:
        return nll, metrics
    future = future_token_loss(params["future"], hidden, batch, whole)
    return nll + future_weight * future, metrics | {"future_nll": future}


def check_rewards(rewards: np.ndarray, config: ValueConfig, *, clip: bool) -> None:
    """Refuses rewards that the guide's distribution does not cover, before they enter a jitted step.

    Raises:
      UserError: naming the reward and the range.
    """
    ranges = {"bernoulli": (0.0, 1.0), "categorical": config.atoms[:1] + config.atoms[-1:]}
    if config.distribution in ranges and not (clip and config.distribution == "categorical"):
        try:
            values.check_rewards(rewards, *ranges[config.distribution])
        except ValueError as error:
            raise UserError(f"a {config.distribution} guide cannot learn these rewards: {error}") from None


def future_token_loss(heads: jax.Array, hidden: jax.Array, batch: Batch, whole: Batch | None = None) -> jax.Array:
    """Mean cross-entropy of the tokens 1, 2, ... F places later, by linear heads [F, D, V] on hidden [B, T, D].

    Only responses with a positive reward are learned from. Multi-token prediction: Gloeckle et al., arXiv 2404.19737.
    """
    total, count = 0.0, 0.0
    for offset in range(1, len(heads) + 1):
        logits = hidden[:, :-offset] @ heads[offset - 1]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, offset:])
        total += (loss * _has_future(batch, offset)).sum()
        count += _has_future(batch if whole is None else whole, offset).sum()
    return total / jnp.maximum(count, 1)


def _has_future(batch: Batch, offset: int) -> jax.Array:
    """[B, T - offset]: whether the token `offset` places later is to be predicted."""
    both = batch.response_mask[:, :-offset] & batch.response_mask[:, offset:]
    same = batch.segments[:, :-offset] == batch.segments[:, offset:]
    return both & same & (batch.reward_to_go[:, :-offset] > 0)


def init_future(key: jax.Array, offsets: int, config: DecoderConfig) -> jax.Array:
    """Heads of the future-token loss, [F, D, V]."""
    return jax.random.normal(key, (offsets, config.embed, config.vocab_size)) * config.embed**-0.5


def masked_mean(x: jax.Array, mask: jax.Array, whole: jax.Array | None = None) -> jax.Array:
    """Mean of x over the true entries of mask; 0 if there are none. With `whole`, its count is what is divided by."""
    return jnp.where(mask, x, 0).sum() / jnp.maximum((mask if whole is None else whole).sum(), 1)
