"""Batches of a policy's responses, their log-probabilities and values, and means over their tokens.

Shapes as in `policy_based.py`: arrays about N rollouts of at most M new tokens are [N, M]; in a batch they are [B, T].
"""

import dataclasses
from collections.abc import Mapping, Sequence

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.data.batches import Example, length_batches, make_packed_batch
from qsharp_jax.models import decoder, quantized, sharding
from qsharp_jax.models.attention import Attention
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import Params
from qsharp_jax.run import attention, models
from qsharp_jax.run.session import Session
from qsharp_jax.system import multihost
from qsharp_jax.train.chunked import at_labeled

VALUE_HEAD = "value_head"  # beside the policy's parameters in algorithms that train a value head

Numbers = Mapping[str, np.ndarray]  # [N, M] each


# --- Batches --------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class PolicyBatch:
    """Rows of prompt and response, right-padded as in `Batch`, with numbers about the response's tokens.

    `numbers` are [B, T] float32 each, by name, 0 off the response.
    """

    tokens: jax.Array
    segments: jax.Array
    positions: jax.Array
    response_mask: jax.Array
    numbers: dict[str, jax.Array]


def make_batch(
    examples: Sequence[Example], numbers: Numbers, indices: Sequence[int | None], *, rows: int, width: int
) -> PolicyBatch:
    """Make a batch of some examples, one per row, with their numbers; an index of None is a row of padding."""
    groups = [[] if index is None else [examples[index]] for index in indices]
    batch = make_packed_batch(groups, rows, width)
    placed = {name: np.zeros((rows, width), np.float32) for name in numbers}
    for row, index in enumerate(indices):
        if index is None:
            continue
        begin, end = len(examples[index].prompt), len(examples[index])
        for name, values in numbers.items():
            placed[name][row, begin:end] = values[index, : end - begin]
    return PolicyBatch(batch.tokens, batch.segments, batch.positions, batch.response_mask, placed)


def mean_per_token(x: jax.Array, batch: PolicyBatch, whole: PolicyBatch) -> jax.Array:
    """Return the mean of x [B, T] over response tokens; for a part of `whole`, its contribution to the mean."""
    return jnp.where(batch.response_mask, x, 0).sum() / jnp.maximum(whole.response_mask.sum(), 1)


def mean_per_response(x: jax.Array, batch: PolicyBatch, whole: PolicyBatch) -> jax.Array:
    """Return the mean over responses of x [B, T] summed over their tokens; parts as in `mean_per_token`."""
    return jnp.where(batch.response_mask, x, 0).sum() / jnp.maximum(whole.response_mask.any(1).sum(), 1)


# --- Log-probabilities and values -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Log-probabilities of a policy in training; hashable, so that it can be a static argument."""

    config: DecoderConfig  # the policy's shape
    temperature: float  # divides the policy's logits
    vocab_size: int  # ids from here on pad the embedding; they have probability 0
    detach_values: bool  # the gradient of V stops at the trunk, so that only the value head learns from it
    # remat, attend_by: see `decoder.forward`
    remat: decoder.Remat = "dots"
    attend_by: Attention = "xla"

    def __call__(self, params: Params, batch: PolicyBatch) -> tuple[jax.Array, jax.Array]:
        """log pi(y_t | s_t) in nats, and V(s_t) of the state before the token: [B, T] each, 0 off the response."""
        chex.assert_equal_shape([batch.tokens, batch.response_mask])
        hidden, _ = decoder.forward(
            params, self.config, batch.tokens, batch.segments, batch.positions,
            remat=self.remat, attend_by=self.attend_by, packed=False,
        )  # fmt: skip
        before, tokens, mask = hidden[:, :-1], batch.tokens[:, 1:], batch.response_mask[:, 1:]
        heads = {name: params[name] for name in ("embedding", "head") if name in params}
        if "head_weight" in params:  # of a CPU's form for decoding, on which a LoRA is trained
            heads["head"] = params["head_weight"].T
        log_probs = at_labeled(self._log_probs, heads, before, tokens, mask, width=self.config.vocab_size)
        values = jnp.zeros(mask.shape)
        if VALUE_HEAD in params:
            head = params[VALUE_HEAD]
            state = jax.lax.stop_gradient(before) if self.detach_values else before
            values = quantized.product(state, head["kernel"], jnp.float32)[..., 0] + head["bias"][0]
        return tuple(jnp.pad(jnp.where(mask, x, 0), ((0, 0), (1, 0))) for x in (log_probs, values))

    def _log_probs(self, heads: Params, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = decoder.logits(heads, self.config, hidden) / self.temperature
        logits = jnp.where(jnp.arange(logits.shape[-1]) < self.vocab_size, logits, -jnp.inf)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


def scorer(session: Session) -> Scorer:
    """Return the scorer in the dtype of the fit, at the temperature of sampling."""
    fit = session.config.fit
    return Scorer(
        config=dataclasses.replace(models.ref_config(session), dtype=fit.dtype or models.ref_config(session).dtype),
        temperature=session.config.generate.temperature,
        vocab_size=models.tokenizer(session).vocab_size,
        detach_values=session.config.policy.detach_values,
        remat=fit.remat,
        attend_by=attention.of_fit(session),
    )


_score = jax.jit(Scorer.__call__, static_argnums=0)


def score(session: Session, params: Params, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the mask of tokens, their log-probabilities, and V of the state before each: [N, M] each.

    All processes must call this. Raises `Stopped` in all of them if one received a SIGTERM.
    """
    most, bucket = session.config.generate.max_new_tokens, session.config.fit.length_bucket
    mask = np.arange(most) < np.asarray([len(example.response) for example in examples])[:, None]
    log_probs, values = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.float32)
    by, rows = scorer(session), sharding.round_rows(session.config.policy.batch_size)
    for width, indices in length_batches([len(example) for example in examples], rows=rows, bucket=bucket):
        multihost.stop_if_told()
        batch = sharding.place_rows(make_batch(examples, {}, indices, rows=rows, width=width))
        for numbers, scored in zip((log_probs, values), _score(by, params, batch), strict=True):
            scored = sharding.to_host(scored)
            for row, index in enumerate(indices):
                begin, end = len(examples[index].prompt), len(examples[index])
                numbers[index, : end - begin] = scored[row, begin:end]
    return mask, log_probs, values
