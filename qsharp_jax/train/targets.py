"""Targets computed from the values themselves rather than from the observed reward: TD(lambda), Bellman backups.

As in the papers, they use the current parameters, without a gradient and without a second, older network. The reward
comes at a response's last token. Shapes: B rows, T tokens, D embed, V vocabulary.
"""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

from qsharp_jax import guidance, values
from qsharp_jax.data.batches import Batch
from qsharp_jax.models import decoder, value
from qsharp_jax.models.attention import Attention
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import Params
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.train.chunked import NUMBERS


def last_tokens(batch: Batch) -> jax.Array:
    """[B, T] bool: the last token of each response, stop token or not."""
    continues = batch.response_mask[:, 1:] & (batch.segments[:, 1:] == batch.segments[:, :-1])
    return batch.response_mask & ~jnp.pad(continues, ((0, 0), (0, 1)))


# --- TD(lambda) -----------------------------------------------------------------------------------------------------


def td_lambda(params: Params, hidden: jax.Array, batch: Batch, *, config: ValueConfig, decay: float) -> jax.Array:
    """`lambda_returns` of a guide's own means, [B, T], from its trunk's hidden states [B, T, D]."""
    before = value.read_from(config, hidden, batch.tokens, batch.segments)
    outputs = value.read(params, config, before, batch.tokens)
    means = values.from_outputs(config.distribution, outputs, config.atoms).mean()
    return lambda_returns(means, batch.reward_to_go, last_tokens(batch), decay)


def lambda_returns(means: jax.Array, reward: jax.Array, at_end: jax.Array, decay: float) -> jax.Array:
    """G_T = r at the last token, and before it G_t = (1 - lambda) V(x, y_1..t+1) + lambda G_t+1: [B, T].

    The sum weighs later values by (1 - lambda) lambda^k and the reward by the rest (Sutton 1988; arXiv 2405.06639,
    section 3). lambda 1 is the reward itself, 0 the next token's value.

    Args:
      means: [B, T], V(x, y_1..t) at each token t.
      reward: [B, T], read at the last tokens.
      at_end: [B, T] bool.
      decay: the lambda, in [0, 1].
    """
    chex.assert_rank([means, reward, at_end], 2)
    chex.assert_equal_shape([means, reward, at_end])

    def back(later: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        next_mean, reward, at_end = at
        target = jnp.where(at_end, reward, (1 - decay) * next_mean + decay * later)
        return target, target

    next_means = jnp.pad(means[:, 1:], ((0, 0), (0, 1)))
    by_position = (next_means.T, reward.T, at_end.T)
    return jax.lax.scan(back, jnp.zeros_like(means[:, 0]), by_position, reverse=True)[1].T


# --- The Bellman backup ---------------------------------------------------------------------------------------------


def bellman(
    params: Params,
    hidden: jax.Array,
    batch: Batch,
    *,
    config: ValueConfig,
    ref_config: DecoderConfig,
    sampling: Mapping[str, float],
    vocab_size: int,
    attend_by: Attention = "xla",
    packed: bool = True,
) -> jax.Array:
    """`backup` of a Q-type guide's own means under pi_ref, whose forward pass is computed here: [B, T].

    Args:
      params: the guide's, with pi_ref's under "ref".
      hidden: [B, T, D], of the guide's trunk.
      ref_config: pi_ref's shape.
      sampling: the temperature, top_k and top_p of pi_ref's rollouts, whose policy the values describe.
      vocab_size: ids from here on pad the embedding, and are never drawn.
      attend_by, packed: see `decoder.forward`.
    """
    ref = params["ref"]
    ref_hidden, _ = decoder.forward(
        ref, ref_config, batch.tokens, batch.segments, batch.positions, attend_by=attend_by, packed=packed
    )

    def expected(at: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Expected value of the next position: [B, D], [B, D] -> sum_z pi_ref(z | x, y) V(x, y z), [B]."""
        hidden, ref_hidden = at
        pi_ref = _probabilities(decoder.logits(ref, ref_config, ref_hidden)[:, :vocab_size], **sampling)
        outputs = value.outputs_of_all(params, config, hidden)[:, :vocab_size]
        return jnp.sum(pi_ref * values.from_outputs(config.distribution, outputs, config.atoms).mean(), axis=-1)

    rows, length = batch.tokens.shape
    positions = max(NUMBERS // (rows * config.trunk.vocab_size * config.outputs), 1)  # with logits at the same time
    by_position = hidden.swapaxes(0, 1), ref_hidden.swapaxes(0, 1)
    following = jax.lax.map(expected, by_position, batch_size=min(positions, length)).T
    return backup(following, batch.reward_to_go, last_tokens(batch))


def _probabilities(logits: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """Probabilities of the next token as `generate` draws it, [B, V]."""
    temperatures = jnp.full(len(logits), temperature, jnp.float32)
    logits = guidance.temper(logits, temperatures)
    if temperature == 0 or top_k > 0 or top_p < 1:
        top_ks, top_ps = jnp.full(len(logits), top_k), jnp.full(len(logits), top_p, jnp.float32)
        logits = guidance.truncate(logits, temperatures, top_ks, top_ps)
    return jax.nn.softmax(logits)


def backup(following: jax.Array, reward: jax.Array, at_end: jax.Array) -> jax.Array:
    """v_t = r at the last token, and before it E_{z ~ pi_ref}[V(x, y_1..t z)] (arXiv 2310.17022, CD-Q): [B, T].

    `following` is that expectation; `reward` is read at the last tokens; [B, T] each.
    """
    chex.assert_equal_shape([following, reward, at_end])
    return jnp.where(at_end, reward, following)
