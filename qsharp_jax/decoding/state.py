"""Data of the decode loop: its settings, its carry, and its result. Shapes: B rows, N new tokens, K candidates."""

import dataclasses
from typing import Any, TypeGuard

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.kv_cache import KVCache
from qsharp_jax.models.value import ValueModel

RECORDED = ("log_probs", "kl", "values")  # what is kept of each step, beside the token
RECORDS = (*RECORDED, "top_log_probs")  # what can be kept
TOP = 20  # tokens of "top_log_probs", if the vocabulary has so many

Array = Any  # of jax in the loop, of numpy on the host; None for what is not there
# Value models may be several, which are composed; a policy of its own may be in their place. See `generate`.
Guide = ValueModel | tuple[ValueModel, ...] | LanguageModel


def gives_values(guide: Guide | None) -> TypeGuard[ValueModel | tuple[ValueModel, ...]]:
    """Return True for value models, which tilt the reference, and False for a policy or None."""
    return isinstance(guide, ValueModel | tuple)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The part of `Sampling` that is compiled in: changing any of it compiles a new program.

    Attributes:
      stop_ids: a row ends at the first of these.
      vocab_size: ids from here on are rows that pad the embedding; they are never drawn.
      candidates: K, how many tokens the guide scores per step.
      slots: guide positions that the candidates of all rows share in a step; 0 gives every row its own K.
      mode: how the guide's distribution becomes a tilt, see `guidance.log_weights`.
      others: log-weight of the tokens that the guide does not score, of `sampling.OTHERS`.
      truncate: some row has top_p < 1, top_k > 0 or temperature 0.
      top_k: some row has top_k > 0.
      record: which of `RECORDS` are kept; what is not is not computed.
    """

    stop_ids: tuple[int, ...]
    vocab_size: int
    candidates: int
    mode: str = "qsharp"
    others: str = "mass"
    slots: int = 0
    truncate: bool = False
    top_k: bool = False
    record: tuple[str, ...] = RECORDED

    @property
    def top(self) -> int:
        """Number of tokens of "top_log_probs"."""
        return min(TOP, self.vocab_size)


class Controls(flax.struct.PyTreeNode):
    """The part of `Sampling` that is data, one entry per row [B]: one program serves a sweep over any of it."""

    eta: Array
    temperature: Array
    top_p: Array
    top_k: Array
    threshold: Array  # least reference probability of a candidate that may have a shared slot
    budget: Array  # tokens that the row may have
    seed: Array
    weights: Array = None  # [B, G], of G guides that are composed; None where there is one
    mode: Array = None  # places in `sampling.MODES`; None where all rows have that of `Settings`

    @classmethod
    def none(cls, rows: int, guides: int) -> "Controls":
        """Arrays of the host for rows that decode nothing, each with a mode and weights of its own to be set."""
        return cls(
            eta=np.full(rows, np.inf, np.float32),
            temperature=np.ones(rows, np.float32),
            top_p=np.ones(rows, np.float32),
            top_k=np.zeros(rows, np.int32),
            threshold=np.zeros(rows, np.float32),
            budget=np.zeros(rows, np.int32),
            seed=np.zeros(rows, np.uint32),
            weights=np.zeros((rows, guides), np.float32),
            mode=np.zeros(rows, np.int32),
        )


class Record(flax.struct.PyTreeNode):
    """Results of the steps, [B, ...] in one step and [B, N, ...] over the loop; None for what is not recorded.

    `value` is the guide's mean at the new token (nan where it scored only other tokens), `pending_value` at the token
    before it.
    """

    token: Array
    log_prob: Array = None
    ref_log_prob: Array = None
    kl: Array = None
    kl_truncated: Array = None
    value: Array = None
    pending_value: Array = None
    top_token: Array = None  # [..., T], see `Settings.top`
    top_log_prob: Array = None  # [..., T]


class State(flax.struct.PyTreeNode):
    """The loop's carry. The pending token is chosen but not yet seen by the models; `previous` came before it."""

    ref_cache: KVCache
    guide_cache: Any  # a KVCache, a tuple of them for several guides, or None
    pending: Array  # [B]
    previous: Array  # [B]
    length: Array  # [B] tokens generated, the stop token among them
    stopped: Array  # [B] ended by a stop token
    dropped: Array  # [B] candidates for which there was no shared slot, over all steps
    step: Array
    record: Record  # [B, N]

    def active(self, controls: Controls) -> jax.Array:
        """[B] bool: rows that have not ended."""
        return ~self.stopped & (self.length < controls.budget)


def first_state(
    ref_cache: KVCache,
    guide_cache: Any,
    prompts: np.ndarray,
    start: np.ndarray,
    steps: int,
    settings: Settings,
) -> State:
    """The carry before the first step, with the prompts' [B, P] last tokens pending and room for `steps` new ones.

    Args:
      start: [B], position of each prompt's first token.
    """
    rows, width = prompts.shape
    return State(
        ref_cache=ref_cache,
        guide_cache=guide_cache,
        pending=jnp.asarray(prompts[:, -1]),
        previous=jnp.asarray(np.where(start < width - 1, prompts[:, max(width - 2, 0)], -1)),
        length=jnp.zeros(rows, jnp.int32),
        stopped=jnp.zeros(rows, bool),
        dropped=jnp.zeros(rows, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        record=empty_record(rows, steps, settings),
    )


def empty_record(rows: int, steps: int, settings: Settings) -> Record:
    """Room for the results of `steps` steps, as of `settings.record`."""
    names = {
        "log_probs": ("log_prob", "ref_log_prob"),
        "kl": ("kl", "kl_truncated"),
        "values": ("value", "pending_value"),
    }
    record = Record(
        token=jnp.zeros((rows, steps), jnp.int32),
        **{name: jnp.zeros((rows, steps), jnp.float32) for kind in settings.record for name in names.get(kind, ())},
    )
    if "top_log_probs" in settings.record:
        shape = (rows, steps, settings.top)
        record = record.replace(top_token=jnp.zeros(shape, jnp.int32), top_log_prob=jnp.zeros(shape, jnp.float32))
    return record


@dataclasses.dataclass(frozen=True)
class Generation:
    """Generated tokens of B rows, on the host; entries past a row's length are 0 (nan for values).

    Attributes:
      tokens: [B, N] int32.
      lengths: [B], the stop token included.
      finished: [B] bool, ended by a stop token rather than by the budget.
      dropped: [B], candidates that passed the threshold but got no shared slot, over all steps.
      log_probs, ref_log_probs: [B, N] nats, of each token under the guided and the reference policy, both at the row's
        temperature (1 where it is 0) and before truncation. None if not recorded, as the following.
      kl: [B, N] nats, KL(pi || pi_ref) at each position, exact over the vocabulary, before truncation.
      kl_truncated: [B, N] nats, the same with pi after top-k and top-p; pi_ref is never truncated.
      values: [B, N], mean reward-to-go that the guide gives each token, of several guides the sum by their weights (of
        one its own, whatever the power of its tilt); nan without a guide.
      top_tokens, top_log_probs: [B, N, 20], the most probable tokens of the guided policy at each position, before
        truncation, best first; None unless asked for.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    dropped: np.ndarray
    log_probs: np.ndarray | None
    ref_log_probs: np.ndarray | None
    kl: np.ndarray | None
    kl_truncated: np.ndarray | None
    values: np.ndarray | None
    top_tokens: np.ndarray | None = None
    top_log_probs: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that there are, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

    def response(self, row: int) -> list[int]:
        """Return the row's tokens, the stop token included."""
        return self.tokens[row, : self.lengths[row]].tolist()
