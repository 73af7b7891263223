"""One step of guided decoding: score the pending token and the candidates, tilt, sample.

pi(y|x) ∝ pi_ref(y|x) E_{z~Z(x,y)}[exp(z/eta)] at every token (arXiv 2502.20548, Theorem 4.4), with one pass of the
reference and one of the guide. Several guides are composed as in VAS (arXiv 2405.06639): their log-weights are added,
each times its guide's weight. A guide that is a policy of its own is sampled as it is, and the reference runs beside it
for its log-probabilities and the KL.
Shapes: B rows, V vocabulary, K candidates, M outputs of the guide, S shared slots.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qsharp_jax import guidance, values
from qsharp_jax.decoding.state import Controls, Guide, Record, Settings, State, gives_values
from qsharp_jax.guidance import Packing
from qsharp_jax.models import decode_attention, decoder, kv_cache, sharding, value
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import KVCache
from qsharp_jax.models.value import ValueModel


def decode_one_token(
    ref: LanguageModel, guide: Guide | None, state: State, controls: Controls, settings: Settings
) -> tuple[State, Record]:
    """One step for every row: score the pending token, tilt, sample the next one.

    The reference sees the pending token; a value model, or each of several, sees it and the K likeliest candidates in
    the same pass, a policy it alone.
    """
    active, before = state.active(controls), (state.ref_cache, state.guide_cache)
    ref_cache, guide_cache = kv_cache.each(lambda cache: kv_cache.without_ended(cache, active), before)
    state = state.replace(ref_cache=ref_cache, guide_cache=guide_cache)
    ref_logits, ref_cache = next_logits(ref, state.ref_cache, state, settings)

    logits, guide_cache, dropped = ref_logits, None, state.dropped
    scores = None
    if isinstance(guide, LanguageModel):
        logits, guide_cache = next_logits(guide, state.guide_cache, state, settings)
    elif gives_values(guide):
        candidates = guidance.top_candidates(ref_logits, settings.candidates)
        candidates = sharding.constrain(candidates, "batch", None)  # [B, K]
        packing = None
        if settings.slots:
            packing = guidance.pack(ref_logits, candidates, settings.slots, controls.threshold, active)
            dropped = dropped + packing.dropped
        scores = score(guide, state, controls, settings, candidates, packing)
        logits = tilted(ref_logits, candidates, packing, scores, controls, settings)
        guide_cache = scores.cache

    policy = guidance.temper(logits, controls.temperature)
    ref_policy = guidance.temper(ref_logits, controls.temperature)
    truncated = policy
    if settings.truncate:
        truncate = sharding.by_row(guidance.truncate)
        top_k = controls.top_k if settings.top_k else None
        truncated = truncate(policy, controls.temperature, top_k, controls.top_p)
    # On a mesh whole rows of logits are divided over more devices than the caches' rows: the loop's arrays must not be.
    keys = row_keys(controls.seed, sharding.constrain(state.length, "batch"))
    token = sharding.constrain(guidance.sample(truncated, keys), "batch")

    new = Record(token=token)
    none = jnp.zeros_like(controls.temperature)
    if "log_probs" in settings.record:
        new = new.replace(log_prob=guidance.log_prob(policy, token), ref_log_prob=guidance.log_prob(ref_policy, token))
    if "kl" in settings.record:
        kl = none if guide is None else guidance.kl(policy, ref_policy)
        new = new.replace(kl=kl, kl_truncated=guidance.kl(truncated, ref_policy) if settings.truncate else kl)
    if "values" in settings.record:
        new = new.replace(
            value=none if scores is None else scores.mean_of(token),
            pending_value=none if scores is None else scores.pending_value,
        )

    if "top_log_probs" in settings.record:
        top = guidance.top_candidates(policy, settings.top)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(policy), top, axis=1)
        new = new.replace(top_token=top, top_log_prob=log_probs)

    stop = jnp.isin(token, jnp.asarray(settings.stop_ids, jnp.int32))
    ref_cache, guide_cache = kv_cache.each(kv_cache.with_starts, (ref_cache, guide_cache), before)
    state = state.replace(
        ref_cache=ref_cache,
        guide_cache=guide_cache,
        pending=jnp.where(active, token, 0),  # rows that have ended go on with a harmless token
        previous=state.pending,
        length=state.length + active,
        stopped=state.stopped | (active & stop),
        dropped=dropped,
        step=state.step + 1,
    )
    return state, new


def row_keys(seeds: jax.Array, steps: jax.Array) -> jax.Array:
    """Typed keys [B], one per row and step, of one generator whatever the process's default: [B] uint32, [B] int32."""
    key = functools.partial(jax.random.key, impl="threefry2x32")
    return jax.vmap(lambda seed, step: jax.random.fold_in(key(seed), step))(seeds, steps)


def tilted(
    ref_logits: jax.Array,
    candidates: jax.Array,
    packing: Packing | None,
    scores: "Scores",
    controls: Controls,
    settings: Settings,
) -> jax.Array:
    """The tilted policy's logits [B, V]; tokens that are not scored get the log-weight that `settings.others` names."""
    if scores.of_all is not None:
        padding = ref_logits.shape[1] - scores.of_all.shape[1]  # rows that pad the embedding, whose logits are -inf
        of_all = jnp.pad(scores.of_all, ((0, 0), (0, padding)))
        others = guidance.mass_log_weight(ref_logits, of_all, controls.temperature)
        return ref_logits + guidance.relative(of_all, others)[0]
    log_weights, scored = scores.log_weights, None if packing is None else packing.scored
    if settings.others == "mass":
        ref_of_candidates = jnp.take_along_axis(ref_logits, candidates, axis=1)
        others = guidance.mass_log_weight(ref_of_candidates, log_weights, controls.temperature, scored)
    else:
        others = scores.others
    if scored is not None:
        log_weights = jnp.where(scored, log_weights, others[:, None])
    return guidance.tilt(ref_logits, candidates, *guidance.relative(log_weights, others))


def next_logits(model: LanguageModel, cache: KVCache, state: State, settings: Settings) -> tuple[jax.Array, KVCache]:
    """Float32 logits [B, V] of the token after the pending one, -inf at ids that pad the embedding; and the cache."""
    hidden, cache = advance(model.params, model.config, cache, state.pending, state.previous)
    logits = decoder.logits(model.params, model.config, hidden[:, 0])
    if settings.vocab_size < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < settings.vocab_size, logits, -jnp.inf)
    # On a mesh that divides the vocabulary each device then takes whole rows: one all-to-all, in place of a sum over
    # devices for every sum over the vocabulary, of which truncation alone has 64.
    return sharding.whole_rows(sharding.constrain(logits, "stream", "vocab")), cache


def advance(
    params: Any,
    config: Any,
    cache: KVCache,
    pending: jax.Array,
    previous: jax.Array,
    candidates: jax.Array | None = None,
    packing: Packing | None = None,
) -> tuple[jax.Array, KVCache]:
    """Hidden states of the pending tokens [B] and of candidates [B, K] for the position after them.

    The pending tokens' keys and values go into the cache, the candidates' do not. With a packing only the candidates
    that have a slot go through the layers; attention alone, which is cheap, has room for all.

    Returns:
      hidden [B, 1 + K, D], the pending token first (zeros at candidates without a slot), and the cache.
    """
    place = (cache.index - cache.start)[:, None]  # [B, 1] the pending token's position in its row
    tokens, before, positions = pending[:, None], previous[:, None], place
    if candidates is not None:
        tokens = jnp.concatenate([tokens, candidates], axis=1)
        before = jnp.concatenate([before, jnp.broadcast_to(pending[:, None], candidates.shape)], axis=1)
        positions = jnp.concatenate([positions, jnp.broadcast_to(place + 1, candidates.shape)], axis=1)

    def pack(x: jax.Array) -> jax.Array:
        return x if packing is None else packing.pack(x)

    def unpack(x: jax.Array) -> jax.Array:
        return x if packing is None else packing.unpack(x)

    tokens, before, positions = pack(tokens), pack(before), pack(positions)
    # On a mesh: what all rows share a slot of is not divided by row.
    stream = ("stream" if packing is None else None, None, None)
    x = sharding.constrain(decoder.embed(params, config, tokens, before, positions), *stream)
    turns = decoder.rotations(positions, config)
    new, written = [], []
    layers = zip(params["layers"], config.kinds, cache.layers, cache.prefix_layers, strict=True)
    for layer, kind, buffers, prefix in layers:

        def attend(query, key, value, buffers=buffers, window=kind.window, prefix=prefix):
            query, key, value = unpack(query), unpack(key), unpack(value)
            pair = key[:, :1], value[:, :1]
            after = kv_cache.write_pair(buffers, pair, cache.slot, cache.axes)
            attended = decode_attention.attend(query, key, value, buffers, after, cache, window, prefix)
            return pack(attended), (pair, after)

        x, (pair, after) = decoder.block(layer, config, x, turns[kind.rope], attend)
        x = sharding.constrain(x, *stream)
        new.append(pair)
        written.append(after)

    def write_last(x, cache, new, written):
        x, new, cache = jax.lax.optimization_barrier((x, new, cache))
        layers = zip(cache.layers, new, strict=True)
        return x, [kv_cache.write_pair(pair, added, cache.slot, cache.axes) for pair, added in layers]

    # See `decode_attention.attend` on the order of reads and writes.
    x, written = jax.lax.platform_dependent(
        x, cache.replace(prefix=None), new, written, tpu=write_last, default=lambda x, cache, new, written: (x, written)
    )
    keys, values_ = map(list, zip(*written, strict=True))
    cache = cache.replace(keys=keys, values=values_, index=cache.index + 1)
    return unpack(decoder.final_norm(params, config, x)), cache


class Scores(NamedTuple):
    """Scores of the next tokens by one guide, or by several with their weights.

    Attributes:
      log_weights: [B, K] of the candidates, of no meaning at those without a slot.
      others: [B], the log-weight of all other tokens, for `others` "prefix" (of the pending token) and "zero".
      of_all: [B, vocab_size], log-weights of the whole vocabulary where a Q-type scores it all; else None.
      mean_of: gives the means [B] at one token per row, nan where it was not scored.
      pending_value: [B], the pending token's own mean; nan from a Q-type, which gave it a step before.
      cache: of the guide, or a tuple of them.
    """

    log_weights: jax.Array
    others: jax.Array
    of_all: jax.Array | None
    mean_of: Callable[[jax.Array], jax.Array]
    pending_value: jax.Array
    cache: Any


def composed(parts: Sequence[Scores], weights: jax.Array) -> Scores:
    """Add the scores of several guides, each times its guide's weight [B, G].

    Means are added alike; that of one guide stays its own, for its weight is a power of the tilt.
    """

    def add(leaves: Sequence[jax.Array]) -> jax.Array:
        return guidance.compose(leaves, weights)

    of_all = [part.of_all for part in parts if part.of_all is not None]

    def add_means(means: Sequence[jax.Array]) -> jax.Array:
        return add(means) if len(means) > 1 else means[0]

    return Scores(
        log_weights=add([part.log_weights for part in parts]),
        others=add([part.others for part in parts]),
        of_all=add(of_all) if of_all else None,
        mean_of=lambda token: add_means([part.mean_of(token) for part in parts]),
        pending_value=add_means([part.pending_value for part in parts]),
        cache=tuple(part.cache for part in parts),
    )


def score(
    guide: ValueModel | tuple[ValueModel, ...],
    state: State,
    controls: Controls,
    settings: Settings,
    candidates: jax.Array,
    packing: Packing | None,
) -> Scores:
    """Score by one pass of the guide; of several guides, each passes and the weighted scores are added."""
    if isinstance(guide, tuple):
        each = zip(guide, state.guide_cache, strict=True)
        parts = [
            score(member, state.replace(guide_cache=cache), controls, settings, candidates, packing)
            for member, cache in each
        ]
        return composed(parts, controls.weights)
    params, config = guide.params, guide.config
    distribution = functools.partial(values.from_outputs, config.distribution, atoms=config.atoms)

    def of_mode(function: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
        if controls.mode is None:
            return function(*arguments, controls.eta, settings.mode)
        return guidance.of_each_mode(lambda mode: function(*arguments, controls.eta, mode), controls.mode)

    weigh = functools.partial(of_mode, guidance.log_weights)
    see = functools.partial(advance, params["trunk"], config.trunk, state.guide_cache, state.pending, state.previous)
    others = of_mode(guidance.zero_log_weight)
    if config.type == "q":
        hidden, cache = see()
        scored = distribution(value.outputs_at(params, config, hidden, candidates))

        def mean_of_any(token: jax.Array) -> jax.Array:
            return distribution(value.outputs_at(params, config, hidden, token[:, None])).mean()[:, 0]

        of_all = None
        if settings.others == "prefix":  # one hidden state scores every token
            outputs = value.outputs_of_all(params, config, hidden[:, 0])[:, : settings.vocab_size]
            of_all = sharding.whole_rows(weigh(distribution(outputs)))
        unknown = jnp.full(state.pending.shape, jnp.nan, jnp.float32)
        return Scores(weigh(scored), others, of_all, mean_of_any, unknown, cache)

    hidden, cache = see(candidates, packing)
    outputs = value.outputs(params, config, hidden)  # [B, 1 + K, M]
    means = distribution(outputs).mean()
    log_weights = weigh(distribution(outputs))  # of both in one array, so that equal outputs round alike
    if settings.others == "prefix":
        others = log_weights[:, 0]

    def mean_of(token: jax.Array) -> jax.Array:
        match = candidates == token[:, None]
        if packing is not None:
            match &= packing.scored
        return jnp.where(match.any(1), jnp.where(match, means[:, 1:], 0).sum(1), jnp.nan)

    return Scores(log_weights[:, 1:], others, None, mean_of, means[:, 0], cache)
