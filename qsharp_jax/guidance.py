"""From reward-to-go to next token: candidates, the tilt of the reference's logits, sampling filters, exact KL.

pi*_eta(y|x) ∝ pi_ref(y|x) E_{z~Z*(x,y)}[exp(z/eta)] ("Q#", arXiv 2502.20548). A step is `tilt`, `temper`, `truncate`,
`sample`, in the order of Hugging Face's processors and warpers and of the paper's program, so temperature divides the
tilt too. Shapes: B batch, V vocabulary, K candidates. Logits are float32; eta, temperature, top_k and top_p are arrays
[B], so that one compiled program serves a sweep over them.
"""

import functools
from collections.abc import Callable, Sequence

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.sampling import MODES
from qsharp_jax.values import Distribution

GROUP = 128  # tokens that `sample` and `top_k_by_groups` choose first as a group
DIGIT = 4  # bits of a threshold that CUDA finds in one pass over the vocabulary, with 15 sums


def top_candidates(ref_logits: jax.Array, k: int) -> jax.Array:
    """The k tokens of largest reference logit, best first, ties by lower id: [B, V] -> [B, K] int32.

    Raises:
      ValueError: if k is not in [1, V].
    """
    chex.assert_rank(ref_logits, 2)
    chex.assert_type(ref_logits, float)
    if not 1 <= k <= ref_logits.shape[-1]:
        raise ValueError(f"{k} candidates of a vocabulary of {ref_logits.shape[-1]}; take 1 to that many")
    # XLA has a kernel on CUDA for k up to 16 only; above, it sorts the vocabulary.
    return jax.lax.platform_dependent(
        ref_logits, cuda=lambda x: top_k_by_groups(x, k), default=lambda x: jax.lax.top_k(x, k)[1].astype(jnp.int32)
    )


def top_k_by_groups(x: jax.Array, k: int) -> jax.Array:
    """The indices of `jax.lax.top_k`, exactly, without a sort of the whole: [B, V] -> [B, K] int32.

    The k largest numbers are in the k groups of `GROUP` numbers with the largest maxima: another group has k numbers
    before its own in those, which are larger, or equal with lower indices.
    """
    rows, size = x.shape
    if size <= k * GROUP:
        return jax.lax.top_k(x, k)[1].astype(jnp.int32)
    groups = jnp.pad(x, ((0, 0), (0, -size % GROUP)), constant_values=-jnp.inf).reshape(rows, -1, GROUP)
    best = jnp.sort(jax.lax.top_k(groups.max(-1), k)[1], axis=-1)  # [B, K], ascending, so that ties keep their order
    within = jnp.take_along_axis(groups, best[..., None], axis=1).reshape(rows, -1)  # [B, K * GROUP]
    place = jax.lax.top_k(within, k)[1]
    return (jnp.take_along_axis(best, place // GROUP, axis=1) * GROUP + place % GROUP).astype(jnp.int32)


@flax.struct.dataclass
class Packing:
    """An assignment of [B, K] candidates to S slots shared by all rows; `pack` and `unpack` convert between layouts.

    Attributes:
      scored: [B, K] bool, whether a candidate has a slot.
      dropped: [B] int32, number of candidates above the threshold without a slot.
      order: [B + S], places in the flattened [B, 1 + K] of the pending tokens and of the slots' candidates.
      slot: [B, 1 + K], the inverse: the place in B + S, or B + S itself without a slot.
    """

    scored: jax.Array
    dropped: jax.Array
    order: jax.Array
    slot: jax.Array

    def pack(self, x: jax.Array) -> jax.Array:
        """[B, 1 + K, ...] -> [1, B + S, ...]."""
        return x.reshape(-1, *x.shape[2:])[self.order][None]

    def unpack(self, x: jax.Array) -> jax.Array:
        """[1, B + S, ...] -> [B, 1 + K, ...], zeros where there is no slot."""
        return jnp.concatenate([x[0], jnp.zeros_like(x[0, :1])])[self.slot]


def pack(ref_logits: jax.Array, candidates: jax.Array, slots: int, threshold: jax.Array, active: jax.Array) -> Packing:
    """Assign slots to the most probable of all rows' candidates.

    Most steps have one or two plausible tokens, so the rows together need far fewer than K slots each. If no candidate
    above its threshold is dropped, the result equals that of scoring all of these.

    Args:
      ref_logits: [B, V].
      candidates: [B, K], distinct within a row.
      slots: S, in 1 .. B * K.
      threshold: [B], the least reference probability of a candidate to score.
      active: [B] bool, rows that still need candidates.
    """
    chex.assert_rank([ref_logits, candidates, threshold, active], [2, 2, 1, 1])
    rows, count = candidates.shape
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(ref_logits), candidates, axis=1)
    wanted = (log_probs >= jnp.log(threshold)[:, None]) & active[:, None]
    best, chosen = jax.lax.top_k(jnp.where(wanted, log_probs, -jnp.inf).reshape(-1), slots)
    scored = jnp.zeros(rows * count, bool).at[chosen].set(best > -jnp.inf).reshape(rows, count)
    order = jnp.concatenate([jnp.arange(rows) * (count + 1), chosen // count * (count + 1) + 1 + chosen % count])
    slot = jnp.full(rows * (count + 1), rows + slots).at[order].set(jnp.arange(rows + slots))
    dropped = (wanted & ~scored).sum(1, dtype=jnp.int32)
    return Packing(scored, dropped, order, slot.reshape(rows, count + 1))


def log_weights(distribution: Distribution, eta: jax.Array, mode: str) -> jax.Array:
    """Log-weights [B, K], in nats, to add to the candidates' logits.

    "qsharp" is log E exp(z/eta), optimal for KL-regularized reward; "cd" is E z / eta (Controlled Decoding, arXiv
    2310.17022, and VAS, 2405.06639); "expectation" is log E z (FUDGE, 2104.05218), which does not depend on eta.

    Args:
      distribution: of the reward-to-go after each candidate, batch dimensions [B, K].
      eta: [B], in (0, inf]; inf is pi_ref itself in every mode.
      mode: one of `MODES`; others raise a ValueError.
    """
    chex.assert_rank(eta, 1)
    eta = eta[:, None]
    if mode == "qsharp":
        return distribution.log_mgf(eta)
    if mode == "cd":
        return distribution.mean() / eta
    if mode == "expectation":
        return jnp.where(jnp.isinf(eta), 0, distribution.log_mean())
    raise ValueError(f"unknown guidance mode {mode!r}: known are {', '.join(MODES)}")


def of_each_mode(function: Callable[[str], jax.Array], modes: jax.Array) -> jax.Array:
    """A function of the mode, [B, ...], with a mode for each row: `modes` [B] are places in `MODES`."""
    chex.assert_rank(modes, 1)
    each = [function(mode) for mode in MODES]
    modes = modes.reshape(-1, *(1,) * (each[0].ndim - 1))
    return jax.lax.select_n(jnp.broadcast_to(modes, each[0].shape), *each)


def zero_log_weight(eta: jax.Array, mode: str) -> jax.Array:
    """The log-weight of a certain reward-to-go of 0, [B]: `others="zero"`, as in the paper's program.

    log E exp(0/eta) = 0 and 0/eta = 0; but log E z = -inf, so that in "expectation" mode only candidates are drawn.
    Candidates with a positive value then gain on all other tokens, so even a constant guide acts as a top-K filter.
    """
    chex.assert_rank(eta, 1)
    return jnp.where((mode == "expectation") & jnp.isfinite(eta), -jnp.inf, jnp.zeros_like(eta))


def mass_log_weight(
    ref_logits: jax.Array, log_weights: jax.Array, temperature: jax.Array, scored: jax.Array | None = None
) -> jax.Array:
    """The log-weight of all other tokens under which the scored ones keep their mass under pi_ref: `others="mass"`.

    It is the log of the pi_ref-weighted mean of exp(log_weights) over the scored tokens. At a temperature T other than
    1 policy and reference are both taken at T: T log E exp(log_weights / T).

    Args:
      ref_logits, log_weights: [B, K], the candidates' reference logits and log-weights in nats.
      temperature: [B], as in `temper`.
      scored: [B, K] bool, the candidates that count; by default all.

    Returns:
      [B] in nats; 0 where no candidate is scored. Equal log-weights are returned exactly.
    """
    chex.assert_rank([ref_logits, log_weights, temperature], [2, 2, 1])
    chex.assert_equal_shape([ref_logits, log_weights])
    scored = ref_logits > -jnp.inf if scored is None else scored
    temperature = _divisor(temperature)
    probs = jax.nn.softmax(temper(ref_logits, temperature), where=scored, axis=-1)
    largest = jnp.max(log_weights, axis=-1, where=scored, initial=-jnp.inf)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    excess = jnp.where(scored, log_weights - largest[:, None], 0) / temperature[:, None]  # <= 0
    # Near 1 the mean is taken as its difference to 1, which is exactly 0 where all log-weights are equal.
    mean = jnp.sum(probs * jnp.exp(excess), axis=-1)
    difference = jnp.sum(probs * jnp.expm1(excess), axis=-1)
    log_mean = jnp.where(mean > 0.5, jnp.log1p(difference), jnp.log(mean))
    return jnp.where(scored.any(axis=-1), largest + temperature * log_mean, 0)


def relative(log_weights: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Subtract `others` [B], where finite, from `log_weights` [B, K] and from itself.

    The policy is unchanged, and equal log-weights leave pi_ref bit for bit.
    """
    chex.assert_rank([log_weights, others], [2, 1])
    shift = jnp.where(jnp.isfinite(others), others, 0)
    return log_weights - shift[:, None], others - shift


def compose(parts: Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    """sum_g weights[:, g] parts[g] over guides: G arrays [B, ...], [B, G] -> [B, ...].

    For log-weights this is a product of tilts, each to the power of its guide's weight; for CD and VAS it is the tilt
    by the weighted sum of rewards. A guide of weight 0 adds nothing, even where it says -inf or nan.
    """
    chex.assert_rank(weights, 2)
    chex.assert_shape(weights, (len(parts[0]), len(parts)))
    chex.assert_equal_shape(parts)
    weights = weights.reshape(*weights.shape, *(1,) * (parts[0].ndim - 1))
    used = [jnp.where(weights[:, g] == 0, 0, weights[:, g] * part) for g, part in enumerate(parts)]
    return jnp.asarray(sum(used))


def tilt(
    ref_logits: jax.Array, candidates: jax.Array, log_weights: jax.Array, others: jax.Array | float = 0.0
) -> jax.Array:
    """Add the log-weights at the candidates, and `others` at every other token: [B, V].

    Args:
      ref_logits: [B, V].
      candidates: [B, K] int, distinct within a row.
      log_weights: [B, K].
      others: a number or [B], the log-weight of the tokens that are not scored.
    """
    chex.assert_rank([ref_logits, candidates, log_weights], 2)
    chex.assert_equal_shape([candidates, log_weights])
    chex.assert_equal_shape_prefix([ref_logits, candidates], 1)
    chex.assert_type([ref_logits, candidates, log_weights], [float, int, float])
    rows = jnp.arange(ref_logits.shape[0])[:, None]
    tilted = jnp.take_along_axis(ref_logits, candidates, axis=1) + log_weights
    ref_logits = ref_logits + jnp.broadcast_to(others, ref_logits.shape[:1])[:, None]
    return ref_logits.at[rows, candidates].set(tilted, unique_indices=True)


def temper(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Divide by the temperature relative to the largest logit, which becomes 0: [B, V], [B] -> [B, V].

    Temperature 0 is greedy decoding, defined as temperature 1 followed by truncation to the argmax (see `truncate`), so
    that the policy before truncation, and its KL, stay finite. With the largest logit at 0, likely tokens keep their
    digits at small temperatures. Others must be at least `sampling.LEAST_TEMPERATURE`.
    """
    chex.assert_rank([logits, temperature], [2, 1])
    chex.assert_type([logits, temperature], float)
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / _divisor(temperature)[:, None]


def _divisor(temperature: jax.Array) -> jax.Array:
    return jnp.where(temperature == 0, 1, temperature)


def truncate(logits: jax.Array, temperature: jax.Array, top_k: jax.Array | None, top_p: jax.Array) -> jax.Array:
    """Set all logits but the kept ones to -inf, [B, V]; among equal logits, lower ids are kept first.

    top_k comes first; then top_p keeps the smallest set of most probable tokens whose probability, renormalized within
    the top k, reaches top_p. At least one token is kept.

    Args:
      logits: [B, V], after `temper`.
      temperature: [B]; 0 keeps the argmax alone, other values have no effect here.
      top_k: [B] int; 0 is off. None is off for all rows, at no cost.
      top_p: [B], in [0, 1]; 1 keeps everything exactly.
    """
    chex.assert_rank([logits, temperature, top_p], [2, 1, 1])
    chex.assert_type([logits, temperature, top_p], [jnp.float32, float, float])
    if top_k is not None:
        chex.assert_rank(top_k, 1)
        chex.assert_type(top_k, int)
        count = jnp.where(top_k == 0, jnp.float32(jnp.inf), top_k)
        logits = jnp.where(_fewest(logits, jnp.ones_like(logits), count), logits, -jnp.inf)
    mass = jnp.where(temperature == 0, 0, jnp.where(top_p >= 1, jnp.inf, top_p))  # at least one token reaches 0
    return jnp.where(_fewest(logits, jax.nn.softmax(logits), mass), logits, -jnp.inf)


def sample(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Draw one token per row, [B] int32, from logits [B, V] with a key per row [B]; -inf is never drawn.

    Rows do not depend on each other. Two uniform numbers per row choose a group of tokens by its probability, then a
    token of the group by its own; Gumbel noise would take V of them.
    """
    chex.assert_rank([logits, keys], [2, 1])
    chex.assert_equal_shape_prefix([logits, keys], 1)
    rows, size = logits.shape
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -size % GROUP))).reshape(rows, -1, GROUP)
    uniform = jax.vmap(functools.partial(jax.random.uniform, shape=(2,), dtype=jnp.float32))(keys)
    group = _draw(weights.sum(-1), uniform[:, 0])
    within = jnp.take_along_axis(weights, group[:, None, None], axis=1)[:, 0]
    return (group * GROUP + _draw(within, uniform[:, 1])).astype(jnp.int32)


def _draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first place where the running sum exceeds `uniform` times the total: [B, N], [B] in [0, 1) -> [B]."""
    upto = jnp.cumsum(weights, axis=-1)
    passed = (upto > uniform[:, None] * upto[:, -1:]) & (weights > 0)  # despite rounding, never one of weight 0
    return jnp.where(passed.any(-1), passed.argmax(-1), weights.argmax(-1))


def log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log pi(token) of one token per row: [B, V], [B] int -> [B] in nats."""
    chex.assert_rank([logits, tokens], [2, 1])
    chex.assert_type([logits, tokens], [float, int])
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)[:, 0]


def kl(logits: jax.Array, ref_logits: jax.Array) -> jax.Array:
    """KL(pi || pi_ref), exact over the vocabulary: [B, V], [B, V] -> [B] in nats, >= 0.

    A token that pi excludes (-inf) adds 0; one that only pi_ref excludes makes the KL +inf. Equal logits have a KL of
    exactly 0, for any vocabulary size.
    """
    chex.assert_rank([logits, ref_logits], 2)
    chex.assert_equal_shape([logits, ref_logits])
    chex.assert_type([logits, ref_logits], float)
    in_policy, in_ref = logits > -jnp.inf, ref_logits > -jnp.inf
    both = in_policy & in_ref
    log_pi = jax.nn.log_softmax(logits)
    # Masked before the subtraction rather than after: -inf - -inf is nan, and so would be its gradient.
    log_ratio = jnp.where(both, log_pi, 0) - jnp.where(both, jax.nn.log_softmax(ref_logits), 0)
    finite = jnp.sum(jnp.exp(log_pi) * log_ratio, axis=-1)
    # The two log_softmax may round differently over a large vocabulary, and the sum be slightly off 0.
    finite = jnp.where(jnp.all(logits == ref_logits, axis=-1), 0, jnp.maximum(finite, 0))
    return jnp.where(jnp.any(in_policy & ~in_ref, axis=-1), jnp.inf, finite)


def _fewest(logits: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """The fewest tokens (at least one), by logit and then by id, whose weights sum to the target: [B, V] bool.

    Searches for the bits of the smallest logit and, among equal logits, for the largest id, with sums over the
    vocabulary: over ten times as fast as a sort on CPU. A target out of reach keeps every token, and so does inf.

    Args:
      logits, weights: [B, V]; weights >= 0.
      target: [B], >= 0.
    """
    lowest = jnp.iinfo(jnp.int32).min
    ranks = _order_preserving_int(logits)
    threshold = _largest(
        lambda rank: jnp.where(ranks >= rank, weights, 0),
        lambda mass: mass >= target,
        low=jnp.full(target.shape, lowest, jnp.int32),
        high=jnp.where(jnp.isinf(target), lowest, jnp.max(ranks, axis=-1)),
        bits=32,
    )[:, None]
    above, tied = ranks > threshold, ranks == threshold
    ids = jnp.arange(logits.shape[-1])
    last_id = _largest(
        lambda token: jnp.where(above | (tied & (ids < token)), weights, 0),
        lambda mass: mass < target,
        low=jnp.min(jnp.where(tied, ids, ids.size), axis=-1),
        high=jnp.max(jnp.where(tied, ids, -1), axis=-1),  # low itself unless logits are equal: nothing to search
        bits=ids.size.bit_length(),
    )[:, None]
    return above | (tied & (ids <= last_id))


def _order_preserving_int(x: jax.Array) -> jax.Array:
    """float32 -> int32 with the same order: a positive float's bits already have it, a negative's are flipped."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.int32)  # one zero, not two
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def _largest(
    weights: Callable[[jax.Array], jax.Array],
    accepts: Callable[[jax.Array], jax.Array],
    low: jax.Array,
    high: jax.Array,
    bits: int,
) -> jax.Array:
    """The largest int32 in (low, high] whose weights have an accepted sum, if all smaller ones' have, else low: [B].

    CUDA takes several bits with each pass over the vocabulary: there the host waits for a loop's condition.

    Args:
      weights: [B, 1] int32 -> [B, V].
      accepts: sums [B] -> [B] bool.
      low, high: [B] int32.
      bits: the most that `high` - `low` has.
    """

    def bisect(low: jax.Array, high: jax.Array) -> jax.Array:
        def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up, without overflow
            accepted = accepts(jnp.sum(weights(middle[:, None]), axis=-1))
            searching = low < high  # a finished row waits for the others
            return jnp.where(searching & accepted, middle, low), jnp.where(searching & ~accepted, middle - 1, high)

        return jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, (low, high))[0]

    def by_digits(low: jax.Array, high: jax.Array) -> jax.Array:
        digits = -(-bits // DIGIT)

        def find_digit(number: jax.Array, low: jax.Array) -> jax.Array:
            shift = DIGIT * (digits - 1 - number)
            tried = [low + (jnp.int32(digit) << shift) for digit in range(1, 1 << DIGIT)]  # int32 wraps around
            # One reduction of many arrays: XLA reads what they are computed from once.
            sums = jax.lax.reduce(
                [weights(x[:, None]) for x in tried], [np.float32(0)] * len(tried),
                lambda one, other: [jnp.add(*pair) for pair in zip(one, other, strict=True)], (1,),
            )  # fmt: skip
            accepted = [accepts(mass) & (x <= high) for mass, x in zip(sums, tried, strict=True)]
            return low + (jnp.sum(jnp.stack(accepted), axis=0, dtype=jnp.int32) << shift)

        return jax.lax.fori_loop(0, digits, find_digit, low, unroll=True)

    return jax.lax.platform_dependent(low, high, cuda=by_digits, default=bisect)
