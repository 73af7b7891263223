"""Guided decoding: `prefill`, `decode_one_token`, `decode`, and `generate` around them.

pi(y|x) ∝ pi_ref(y|x) E_{z~Z(x,y)}[exp(z/eta)] at every token (arXiv 2502.20548, Theorem 4.4), with a static key-value
cache and one pass of the reference and one of the guide a step. Shapes: B batch, P padded prompt length, N new tokens,
V vocabulary, K candidates. It takes and gives token ids; it knows nothing about text, tasks or rewards.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import guidance, values
from qsharp_jax.errors import UserError
from qsharp_jax.models import decoder, kv_cache, value
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import KVCache
from qsharp_jax.models.value import ValueConfig, ValueModel

BLOCK = 8  # steps between two looks at whether every row has ended
CACHE_BUCKET = 8  # positions of a cache are a multiple of it: else a TPU keeps them in another order outside the loop
PROMPT_BUCKET = 16  # prompts are padded to a multiple of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compiled in: a change of any of these is a new program.

    Attributes:
      stop_ids: a row ends at the first of these.
      candidates: K, how many tokens a step the guide scores.
      mode: how the guide's distribution becomes a tilt, see `guidance.log_weights`.
      truncate: some row has top_p < 1, top_k > 0 or temperature 0.
    """

    stop_ids: tuple[int, ...]
    candidates: int
    mode: str
    truncate: bool


@flax.struct.dataclass
class Controls:
    """One entry a row [B]: arrays, so that one program serves a sweep over any of them."""

    eta: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    budget: jax.Array  # tokens that the row may have
    seed: jax.Array


@flax.struct.dataclass
class Record:
    """What is kept of each step, [B] in a step and [B, N] over the loop.

    `value` is the guide's mean at the new token (nan where it scored only other tokens), `pending_value` at the token
    before it.
    """

    token: jax.Array
    log_prob: jax.Array
    ref_log_prob: jax.Array
    kl: jax.Array
    kl_truncated: jax.Array
    value: jax.Array
    pending_value: jax.Array


@flax.struct.dataclass
class State:
    """The loop's carry. The pending token is chosen but not yet seen by the models; `previous` came before it."""

    ref_cache: KVCache
    guide_cache: KVCache | None
    pending: jax.Array  # [B]
    previous: jax.Array  # [B]
    length: jax.Array  # [B] tokens generated, the stop token among them
    stopped: jax.Array  # [B] ended by a stop token
    step: jax.Array
    record: Record  # [B, N]


@dataclasses.dataclass(frozen=True)
class Generation:
    """Generated tokens of B rows, on the host; entries past a row's length are 0 (nan for values).

    Attributes:
      tokens: [B, N] int32.
      lengths: [B], the stop token included.
      finished: [B] bool, ended by a stop token rather than by the budget.
      log_probs, ref_log_probs: [B, N] nats, of each token under the guided and the reference policy, both at the row's
        temperature (1 where it is 0) and before truncation.
      kl: [B, N] nats, KL(pi || pi_ref) at each position, exact over the vocabulary, before truncation.
      kl_truncated: [B, N] nats, the same with pi after top-k and top-p; pi_ref is never truncated.
      values: [B, N], mean reward-to-go that the guide gives each token; nan without a guide.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    log_probs: np.ndarray
    ref_log_probs: np.ndarray
    kl: np.ndarray
    kl_truncated: np.ndarray
    values: np.ndarray

    def response(self, row: int) -> list[int]:
        """The row's tokens, the stop token included."""
        return self.tokens[row, : self.lengths[row]].tolist()


# --- The three functions of decoding --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "size"))
def prefill(params: Any, config: Any, tokens: jax.Array, start: jax.Array, *, size: int) -> KVCache:
    """The cache of left-padded prompts. No logits are computed: a prompt's last token is the loop's first pending one.

    Args:
      params: a decoder's parameters, in either form.
      config: its `DecoderConfig`.
      tokens: [B, P - 1], the prompts without their last token.
      start: [B], position of each prompt's first token.
      size: positions of the cache.
    """
    chex.assert_rank(tokens, 2)
    chex.assert_shape(start, (tokens.shape[0],))
    positions = jnp.arange(tokens.shape[1]) - start[:, None]
    segments = (positions >= 0).astype(jnp.int32)
    _, kept = decoder.forward(params, config, tokens, segments, jnp.maximum(positions, 0), keep_kv=True)
    if not isinstance(kept, list):
        kept = [(kept[0][layer], kept[1][layer]) for layer in range(config.layers)]
    return kv_cache.from_prefill(kept, start, size)


def decode_one_token(
    ref: LanguageModel, guide: ValueModel | None, state: State, controls: Controls, settings: Settings
) -> tuple[State, Record]:
    """One step for every row: score the pending token, tilt, sample the next one.

    The reference sees the pending token; the guide sees it and the K likeliest candidates in the same pass.
    """
    hidden, ref_cache = _advance(ref.params, ref.config, state.ref_cache, state.pending[:, None], state.previous)
    ref_logits = decoder.logits(ref.params, ref.config, hidden[:, 0])  # [B, V]

    if guide is None:
        logits, guide_cache = ref_logits, None
    else:
        candidates = guidance.top_candidates(ref_logits, settings.candidates)  # [B, K]
        scored, mean_of, pending_value, guide_cache = _score_candidates(guide, state, candidates)
        log_weights = guidance.log_weights(scored, controls.eta, settings.mode)
        others = guidance.zero_log_weight(controls.eta, settings.mode)
        logits = guidance.tilt(ref_logits, candidates, log_weights, others)

    policy = guidance.temper(logits, controls.temperature)
    ref_policy = guidance.temper(ref_logits, controls.temperature)
    truncated = policy
    if settings.truncate:
        truncated = guidance.truncate(policy, controls.temperature, controls.top_k, controls.top_p)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), state.step))(controls.seed)
    token = guidance.sample(truncated, keys)

    none = jnp.zeros_like(controls.temperature)
    kl = none if guide is None else guidance.kl(policy, ref_policy)
    new = Record(
        token=token,
        log_prob=guidance.log_prob(policy, token),
        ref_log_prob=guidance.log_prob(ref_policy, token),
        kl=kl,
        kl_truncated=guidance.kl(truncated, ref_policy) if settings.truncate else kl,
        value=none if guide is None else mean_of(token),
        pending_value=none if guide is None else pending_value,
    )

    active = ~state.stopped & (state.length < controls.budget)
    stop = jnp.isin(token, jnp.asarray(settings.stop_ids, jnp.int32))
    # Rows that have ended go on computing on a harmless token; nothing of it is kept.
    new = jax.tree.map(lambda leaf: jnp.where(active, leaf, jnp.zeros_like(leaf)), new)
    state = state.replace(
        ref_cache=ref_cache,
        guide_cache=guide_cache,
        pending=new.token,
        previous=state.pending,
        length=state.length + active,
        stopped=state.stopped | (active & stop),
        step=state.step + 1,
    )
    return state, new


def first_state(
    ref_cache: KVCache, guide_cache: KVCache | None, prompts: np.ndarray, start: np.ndarray, steps: int
) -> State:
    """The carry before the first step, with the prompts' [B, P] last tokens pending and room for `steps` new ones."""
    rows, width = prompts.shape
    return State(
        ref_cache=ref_cache,
        guide_cache=guide_cache,
        pending=jnp.asarray(prompts[:, -1]),
        previous=jnp.asarray(np.where(start < width - 1, prompts[:, max(width - 2, 0)], -1)),
        length=jnp.zeros(rows, jnp.int32),
        stopped=jnp.zeros(rows, bool),
        step=jnp.zeros((), jnp.int32),
        record=Record(
            token=jnp.zeros((rows, steps), jnp.int32),
            **{name: jnp.zeros((rows, steps)) for name in Record.__dataclass_fields__ if name != "token"},
        ),
    )


@functools.partial(jax.jit, static_argnames=("settings",), donate_argnames=("state",))
def decode(
    ref: LanguageModel, guide: ValueModel | None, state: State, controls: Controls, *, settings: Settings
) -> State:
    """Blocks of steps until every row has ended. The carry, caches included, is updated in place.

    A block is a scan: the loop's condition, which a device has to wait for, is looked at once a block.
    """

    def going_on(state: State) -> jax.Array:
        ended = state.stopped | (state.length >= controls.budget)
        return ~ended.all() & (state.step < state.record.token.shape[1])

    def block(state: State) -> State:
        first = state.step
        state, new = jax.lax.scan(
            lambda state, _: decode_one_token(ref, guide, state, controls, settings), state, None, length=BLOCK
        )
        record = jax.tree.map(
            lambda kept, block: jax.lax.dynamic_update_slice(kept, block.T, (0, first)), state.record, new
        )
        return state.replace(record=record)

    return jax.lax.while_loop(going_on, block, state)


# --- Parts of a step ------------------------------------------------------------------------------------------------


def _advance(
    params: Any, config: Any, cache: KVCache, tokens: jax.Array, previous: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Hidden states [B, Q, D] of the pending token, tokens[:, 0], and of candidates for the position after it.

    The pending token's keys and values go into the cache, the candidates' do not.
    """
    batch, count = tokens.shape
    place = cache.index - cache.start  # [B] the pending token's position in its row
    positions = jnp.where(jnp.arange(count) == 0, place[:, None], place[:, None] + 1)
    before = jnp.where(jnp.arange(count) == 0, previous[:, None], tokens[:, :1])
    x = decoder.embed(params, config, tokens, before, positions)
    turn, block = decoder.rotation(positions, config), decoder.Block(config)
    all_keys, all_values = [], []
    for layer, keys, values_ in zip(params["layers"], cache.keys, cache.values, strict=True):

        def attend(query, key, value, keys=keys, values_=values_):
            keys = kv_cache.write(keys, key[:, :1], cache.index)
            values_ = kv_cache.write(values_, value[:, :1], cache.index)
            attention = kv_cache.attend(query, key, value, keys, values_, cache.start, cache.index)
            return attention, (keys, values_)

        x, (keys, values_) = block.apply({"params": layer}, x, turn, attend)
        all_keys.append(keys)
        all_values.append(values_)
    cache = cache.replace(keys=all_keys, values=all_values, index=cache.index + 1)
    return decoder.normalise(params, config, x), cache


def _score_candidates(
    guide: ValueModel, state: State, candidates: jax.Array
) -> tuple[values.Distribution, Callable[[jax.Array], jax.Array], jax.Array, KVCache]:
    """One pass of the guide.

    Returns:
      the distributions [B, K] at the candidates; a function that gives the means [B] at one token a row (nan where it
      was not scored); the pending token's own mean [B] (nan from a Q-type, which gave it a step before); the cache.
    """
    params, config = guide.params, guide.config
    distribution = functools.partial(values.from_outputs, config.distribution, atoms=config.atoms)
    if config.type == "q":
        hidden, cache = _advance(
            params["trunk"], config.trunk, state.guide_cache, state.pending[:, None], state.previous
        )
        scored = distribution(value.outputs_at(params, config, hidden, candidates))

        def mean_of(token: jax.Array) -> jax.Array:
            return distribution(value.outputs_at(params, config, hidden, token[:, None])).mean()[:, 0]

        return scored, mean_of, jnp.full(state.pending.shape, jnp.nan), cache

    tokens = jnp.concatenate([state.pending[:, None], candidates], axis=1)
    hidden, cache = _advance(params["trunk"], config.trunk, state.guide_cache, tokens, state.previous)
    outputs = value.outputs(params, config, hidden)  # [B, 1 + K, M]
    scored = distribution(outputs[:, 1:])

    def mean_of(token: jax.Array) -> jax.Array:
        match = candidates == token[:, None]
        return jnp.where(match.any(1), jnp.where(match, scored.mean(), 0).sum(1), jnp.nan)

    return scored, mean_of, distribution(outputs[:, 0]).mean(), cache


# --- From lists of tokens to arrays and back ------------------------------------------------------------------------


def for_decoding(model: Any) -> Any:
    """The model with unstacked layers: do it once for many calls of `generate`. Models in that form pass through."""
    trunk = model.params.get("trunk", model.params)
    if isinstance(trunk["layers"], list):
        return model
    unstack = value.unstack if isinstance(model, ValueModel) else decoder.unstack
    return model.replace(params=unstack(model.params))


def generate(
    ref: LanguageModel,
    guide: ValueModel | None,
    prompts: Sequence[Sequence[int]],
    *,
    eta: Any = jnp.inf,
    temperature: Any = 1.0,
    top_k_candidates: int = 20,
    top_p: Any = 1.0,
    top_k: Any = 0,
    max_new_tokens: int,
    budget: Any = None,
    rng: Any,
    stop_ids: Sequence[int],
    mode: str = "qsharp",
    prompt_bucket: int = PROMPT_BUCKET,
) -> Generation:
    """Samples one response a prompt from the guided policy.

    As in the paper's program and in Hugging Face's order, the tilt comes first, then temperature, then top-k and top-p.
    A row's result depends on its own prompt, settings and seed only. Every program is compiled once per number of rows,
    padded prompt length, `max_new_tokens` and `Settings`; eta, temperature, top-p, top-k, budget and seeds are data.

    Args:
      ref: the frozen reference model.
      guide: the value model; None, or eta = inf for all rows, gives exactly the reference, and then no guide runs.
      prompts: B lists of token ids, each of at least one token.
      eta: weight of the KL to the reference, > 0, in units of reward; a number or one a row. Small is strong guidance.
      temperature: >= 0; 0 takes the most probable token. A number or one a row.
      top_k_candidates: how many of the likeliest tokens under the reference the guide scores at each step.
      top_p: in (0, 1], a number or one a row.
      top_k: 0 for no limit, a number or one a row.
      max_new_tokens: length of the response at most, the stop token included; a static size.
      budget: tokens that each row may have, at most `max_new_tokens`, which is the default.
      rng: one seed a row, or an integer from which they are drawn.
      stop_ids: a response ends at the first of these.
      mode: "qsharp", "cd" or "expectation", see `guidance.log_weights`.
      prompt_bucket: prompts are padded to a multiple of this many tokens.

    Raises:
      UserError: for settings out of range, ids outside the vocabulary, or prompts that do not fit the model's context.
    """
    rows = len(prompts)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if prompt_bucket < 1:
        raise UserError(f"prompt_bucket is {prompt_bucket}; it must be at least 1")
    if mode not in guidance.MODES:
        raise UserError(f"mode is {mode!r}; it must be one of {', '.join(guidance.MODES)}")
    if mode == "expectation" and guide is not None and not _is_never_negative(guide.config):
        raise UserError(
            'mode "expectation" takes the logarithm of the mean, so the guide must not give negative ones; use a'
            " bernoulli guide, or a categorical one with atoms of 0 and more"
        )
    controls = Controls(
        eta=_per_row("eta", eta, rows, np.float32, lambda x: x > 0, "greater than 0"),
        temperature=_per_row("temperature", temperature, rows, np.float32, lambda x: x >= 0, "0 or more"),
        top_p=_per_row("top_p", top_p, rows, np.float32, lambda x: (x > 0) & (x <= 1), "in (0, 1]"),
        top_k=_per_row("top_k", top_k, rows, np.int32, lambda x: x >= 0, "0 or more"),
        budget=_per_row(
            "budget",
            max_new_tokens if budget is None else budget,
            rows,
            np.int32,
            lambda x: (x >= 0) & (x <= max_new_tokens),
            f"in 0 .. max_new_tokens = {max_new_tokens}",
        ),
        seed=_per_row(
            "rng",
            row_seeds(rng, rows) if np.ndim(rng) == 0 and rng >= 0 else rng,
            rows,
            np.int64,
            lambda x: (0 <= x) & (x < 2**32),
            "0 or more, and less than 2^32 where it is one a row",
        ).astype(np.uint32),
    )
    if guide is not None and np.isinf(controls.eta).all():
        guide = None
    width = -(-max(map(len, prompts), default=1) // prompt_bucket) * prompt_bucket
    _check_fit(ref, guide, prompts, controls.budget, top_k_candidates)
    settings = Settings(
        stop_ids=tuple(stop_ids),
        candidates=top_k_candidates,
        mode=mode,
        truncate=bool((controls.top_p < 1).any() or (controls.top_k > 0).any() or (controls.temperature == 0).any()),
    )

    padded = np.zeros((rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, width - len(prompt) :] = prompt
    start = np.asarray([width - len(prompt) for prompt in prompts], np.int32)
    steps = -(-max_new_tokens // BLOCK) * BLOCK
    size = -(-(width - 1 + steps) // CACHE_BUCKET) * CACHE_BUCKET

    ref, guide = for_decoding(ref), None if guide is None else for_decoding(guide)
    fill = functools.partial(prefill, tokens=padded[:, :-1], start=start, size=size)
    state = first_state(
        fill(ref.params, ref.config),
        None if guide is None else fill(guide.params["trunk"], guide.config.trunk),
        padded,
        start,
        steps,
    )
    state = decode(ref, guide, state, controls, settings=settings)
    state = jax.device_get(state.replace(ref_cache=None, guide_cache=None))  # the caches stay where they are
    return _to_generation(state, max_new_tokens, guided=guide is not None)


def row_seeds(seed: int, rows: int) -> np.ndarray:
    """[rows] uint32 seeds drawn from one."""
    return np.random.SeedSequence(int(seed)).generate_state(rows)


def _to_generation(state: State, max_new_tokens: int, *, guided: bool) -> Generation:
    record = jax.tree.map(lambda leaf: leaf[:, :max_new_tokens], state.record)
    within = np.arange(max_new_tokens) < state.length[:, None]
    means = np.full(within.shape, np.nan, np.float32)
    if guided:
        # A V-type reads a token's value when it was a candidate; one that was not is read a step later, as pending.
        later = np.append(record.pending_value[:, 1:], np.full((len(means), 1), np.nan, np.float32), axis=1)
        later = np.where(np.append(within[:, 1:], np.zeros((len(means), 1), bool), axis=1), later, np.nan)
        means = np.where(within, np.where(np.isnan(record.value), later, record.value), np.nan)
    return Generation(
        tokens=record.token,
        lengths=state.length,
        finished=state.stopped,
        log_probs=record.log_prob,
        ref_log_probs=record.ref_log_prob,
        kl=record.kl,
        kl_truncated=record.kl_truncated,
        values=means,
    )


def _per_row(name: str, given: Any, rows: int, dtype: Any, allowed: Any, words: str) -> np.ndarray:
    array = np.asarray(given, dtype)
    if array.ndim > 1 or (array.ndim == 1 and array.shape != (rows,)):
        raise UserError(f"{name} has shape {array.shape}; give one number, or one for each of the {rows} prompts")
    if not np.all(allowed(array)):
        raise UserError(f"{name} is {given}; it must be {words}")
    return np.broadcast_to(array, (rows,))


def _is_never_negative(config: ValueConfig) -> bool:
    return config.distribution == "bernoulli" or (config.distribution == "categorical" and config.atoms[0] >= 0)


def _check_fit(
    ref: LanguageModel, guide: ValueModel | None, prompts: Sequence[Sequence[int]], budget: np.ndarray, candidates: int
) -> None:
    if not prompts:
        raise UserError("there are no prompts; give at least one")
    configs = {"reference": ref.config} | ({} if guide is None else {"guide": guide.config.trunk})
    for name, config in configs.items():
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f"prompt {row} is empty; a prompt needs at least one token")
            if min(prompt) < 0 or max(prompt) >= config.vocab_size:
                raise UserError(f"prompt {row} has token ids outside the {name}'s vocabulary of {config.vocab_size}")
            if len(prompt) + budget[row] > config.max_positions:
                raise UserError(
                    f"prompt {row} has {len(prompt)} tokens, which with max_new_tokens = {budget[row]} is more than"
                    f" the {name}'s {config.max_positions} positions; shorten the prompt or the response"
                )
    if guide is not None:
        if guide.config.trunk.vocab_size != ref.config.vocab_size:
            raise UserError(
                f"the guide's vocabulary has {guide.config.trunk.vocab_size} entries, the reference's"
                f" {ref.config.vocab_size}; they must be the same"
            )
        if not 1 <= candidates <= ref.config.vocab_size:
            raise UserError(f"top_k_candidates is {candidates}; it must be in 1 .. {ref.config.vocab_size}")
