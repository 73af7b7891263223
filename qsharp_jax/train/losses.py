"""Maximum-likelihood losses: of the next token for a language model, of the reward-to-go for a guide.

The guide's loss is the negative log-likelihood of the observed reward-to-go at every labeled token (arXiv 2502.20548,
Algorithm 1). Shapes: B rows, T tokens, D embed, V vocabulary, F offsets of the future-token loss.

Losses and metrics are means over a batch. With `whole`, `batch` is a part of its rows, and sums are divided by the
whole's counts, so that losses, metrics and gradients of the parts add up to the whole's.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qsharp_jax import values
from qsharp_jax.data.batches import Batch
from qsharp_jax.models import decoder, quantized, value
from qsharp_jax.models.attention import Attention, Make
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import Params
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.system.errors import UserError
from qsharp_jax.train.chunked import labeled_sum

Error = Literal["nll", "squared"]
# (params, hidden [B, T, D], batch) -> targets [B, T] that replace the reward-to-go
Targets = Callable[[Params, jax.Array, Batch], jax.Array]


def language_model_loss(
    params: Params,
    batch: Batch,
    whole: Batch | None = None,
    *,
    config: DecoderConfig,
    attend_by: Attention = "xla",
) -> tuple[jax.Array, dict]:
    """Mean cross-entropy of the next token, in nats, over response tokens; `attend_by` as in `decoder.forward`."""
    hidden, _ = decoder.forward(params, config, batch.tokens, batch.segments, batch.positions, attend_by=attend_by)
    sums = labeled_sum(
        functools.partial(_next_token, config=config),
        {name: params[name] for name in ("embedding", "head") if name in params},
        hidden[:, :-1],
        batch.tokens[:, 1:],
        _has_context(batch),
        width=config.vocab_size,
    )
    count = jnp.maximum(_has_context(batch if whole is None else whole).sum(), 1)
    loss, right = (total / count for total in sums)
    return loss, {"accuracy": right}


def _next_token(
    params: Params, hidden: jax.Array, targets: jax.Array, mask: jax.Array, *, config: DecoderConfig
) -> tuple[jax.Array, jax.Array]:
    """Sums over the mask of the cross-entropy, and of how often the likeliest token is the target."""
    logits = decoder.logits(params, config, hidden)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(mask, loss, 0).sum(), jnp.where(mask, logits.argmax(-1) == targets, 0).sum(dtype=jnp.float32)


def _has_context(batch: Batch) -> jax.Array:
    """[B, T - 1]: whether the next token is a response's, with a token of its own segment before it."""
    return batch.response_mask[:, 1:] & (batch.segments[:, 1:] == batch.segments[:, :-1])


def value_loss(
    params: Params,
    batch: Batch,
    whole: Batch | None = None,
    *,
    config: ValueConfig,
    error: Error = "nll",
    targets: Targets | None = None,
    projection: values.Projection = "two_hot",
    clip: bool = False,
    future_weight: float = 0.0,
    remat: decoder.Remat = "dots",
    attend_by: Attention | Make = "xla",
    packed: bool = True,
) -> tuple[jax.Array, dict]:
    """Mean negative log-likelihood of the reward-to-go over all labeled tokens of the batch.

    With "future" heads in `params`, `future_weight` times `future_token_loss` is added, from the same forward pass: a
    value that depends on tokens several steps ahead is otherwise learned only after a long plateau.

    Args:
      params: a value model's parameters, with "future" [F, D, V] or without.
      error: "squared" replaces the likelihood by half the squared error of the distribution's mean.
      targets: computes targets that replace the observed reward-to-go (`targets.py`), without a gradient.
      projection, clip: how a categorical puts rewards on its atoms, see `values.project`.
      remat, attend_by, packed: of the trunk, see `decoder.forward`.
    """
    whole = batch if whole is None else whole
    hidden, _ = decoder.forward(
        params["trunk"], config.trunk, batch.tokens, batch.segments, batch.positions,
        remat=remat, attend_by=attend_by, packed=packed,
    )  # fmt: skip
    fitted_to = batch.reward_to_go
    if targets is not None:
        fitted_to = targets(*jax.lax.stop_gradient((params, hidden)), batch)
    sums = labeled_sum(
        functools.partial(_reward_to_go, config=config, error=error, projection=projection, clip=clip),
        {"head": params["head"]},
        value.read_from(config, hidden, batch.tokens, batch.segments),
        (batch.tokens, fitted_to, batch.reward_to_go),
        batch.label_mask,
        width=config.outputs * (config.trunk.embed if config.type == "q" else 1),
    )
    loss, brier = (total / jnp.maximum(whole.label_mask.sum(), 1) for total in sums)
    metrics = {error: loss, "brier": brier}
    if "future" not in params:
        return loss, metrics
    future = future_token_loss(params["future"], hidden, batch, whole)
    return loss + future_weight * future, metrics | {"future_nll": future}


def _reward_to_go(
    params: Params,
    hidden: jax.Array,
    of_tokens: tuple[jax.Array, jax.Array, jax.Array],
    mask: jax.Array,
    *,
    config: ValueConfig,
    error: Error,
    projection: values.Projection,
    clip: bool,
) -> tuple[jax.Array, jax.Array]:
    """Sums over the mask of the error, and of the squared difference between mean and observed reward-to-go."""
    tokens, fitted_to, reward_to_go = of_tokens
    outputs = value.read(params, config, hidden, tokens)
    distribution = values.from_outputs(config.distribution, outputs, config.atoms)
    mean = distribution.mean()
    if error == "squared":
        loss = 0.5 * (mean - fitted_to) ** 2
    else:
        loss = values.nll(distribution, fitted_to, projection=projection, clip=clip)
    return tuple(jnp.where(mask, x, 0).sum() for x in (loss, (mean - reward_to_go) ** 2))


def check_rewards(rewards: np.ndarray, config: ValueConfig, *, clip: bool) -> None:
    """Check rewards before they enter a jitted step, where nothing is raised.

    With `clip` those outside the range of the guide's distribution are counted, and printed.

    Raises:
      UserError: without `clip`, if some are outside; if one is nan.
    """
    low, high = config.range
    try:
        values.check_rewards(np.clip(rewards, low, high) if clip else rewards, low, high)
    except ValueError:
        raise UserError(
            f"this {config.distribution} guide learns rewards from {low:g} to {high:g}, and these reach from"
            f" {rewards.min():g} to {rewards.max():g}; begin a new run with"
            " --config.value.distribution=categorical and --config.value.atoms=... that cover them, or with"
            " --config.fit.clip_rewards=True"
        ) from None
    if outside := np.mean((rewards < low) | (rewards > high)):
        print(
            f"fit.clip_rewards: {outside:.1%} of {len(rewards)} rewards are outside {low:g} to {high:g}, the range that"
            " the guide learns"
        )


def future_token_loss(heads: jax.Array, hidden: jax.Array, batch: Batch, whole: Batch | None = None) -> jax.Array:
    """Mean cross-entropy of the tokens 1, 2, ... F places later, by linear heads [F, D, V] on hidden [B, T, D].

    Only responses with a positive reward count. Multi-token prediction: Gloeckle et al., arXiv 2404.19737.
    """
    total, count = 0.0, 0.0
    for offset, head in enumerate(heads, start=1):
        targets, mask = batch.tokens[:, offset:], _has_future(batch, offset)
        total += labeled_sum(_later_token, head, hidden[:, :-offset], targets, mask, width=head.shape[-1])[0]
        count += _has_future(batch if whole is None else whole, offset).sum()
    return total / jnp.maximum(count, 1)


def _later_token(
    head: jax.Array, hidden: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, tuple[()]]:
    """The sum of the cross-entropy over the mask."""
    logits = quantized.product(hidden, head, jnp.float32)
    return jnp.where(mask, optax.softmax_cross_entropy_with_integer_labels(logits, targets), 0).sum(), ()


def _has_future(batch: Batch, offset: int) -> jax.Array:
    """[B, T - offset]: whether the token `offset` places later is a target."""
    both = batch.response_mask[:, :-offset] & batch.response_mask[:, offset:]
    same = batch.segments[:, :-offset] == batch.segments[:, offset:]
    return both & same & (batch.reward_to_go[:, :-offset] > 0)


def init_future(key: jax.Array, offsets: int, config: DecoderConfig) -> jax.Array:
    """Heads of the future-token loss, [F, D, V]."""
    return jax.random.normal(key, (offsets, config.embed, config.vocab_size), jnp.float32) * config.embed**-0.5
