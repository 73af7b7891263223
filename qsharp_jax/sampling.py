"""Settings of decoding: one checked dataclass for the config, the command line, a notebook, and the decode loop.

Free of JAX, so that `--help` is quick.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from qsharp_jax.system.errors import UserError
from qsharp_jax.system.settings import (
    FRACTION,
    POSITIVE_FINITE,
    SHARE,
    Rule,
    check,
    is_number,
    is_whole,
    one_of,
    optional,
    setting,
    whole,
)

LEAST_ETA = 1e-6  # below it float32 no longer tells the values of two tokens apart, once divided by eta
DEFAULT_ETA = 0.1  # with a guide, where none is given: as in the paper's experiments
LEAST_TEMPERATURE = 1e-6  # below it, except for 0, log-probabilities of unlikely tokens leave float32's range
OTHERS = ("mass", "prefix", "zero")
MODES = ("qsharp", "cd", "expectation")

Numbers = float | Sequence[float] | np.ndarray  # one number, or one per row

ETA = Rule(lambda v: is_number(v) and bool(np.float32(v) >= np.float32(LEAST_ETA)), f"a number, at least {LEAST_ETA:g}")
TEMPERATURE = Rule(
    lambda v: is_number(v) and bool(v == 0 or np.float32(LEAST_TEMPERATURE) <= np.float32(v) < np.inf),
    f"0, which is greedy, or a finite number, at least {LEAST_TEMPERATURE:g}",
)
OWN_ETA = Rule(lambda v: v is None or ETA.passes(v) and v < math.inf, f"a number, at least {LEAST_ETA:g}, or none")
LARGEST_WEIGHT = 1e6  # far larger ones would overflow when they are multiplied by log-weights
WEIGHT = Rule(
    lambda v: is_number(v) and abs(v) <= LARGEST_WEIGHT, f"a number from {-LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
)
TEXTS = Rule(
    lambda v: isinstance(v, list | tuple) and all(isinstance(x, str) and x for x in v),
    "a list of texts that are not empty",
)
IDS = Rule(lambda v: all(is_whole(token) and token >= 0 for token in v), "token ids")

PER_ROW = ("eta", "temperature", "top_p", "top_k", "weights", "budget", "candidate_threshold")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of decoding. `dataclasses.replace` changes a field and checks again.

    The fields of `PER_ROW` may be one number or an array with one entry per row, where rows are the prompts' samples,
    a prompt's next to each other. All are data of the compiled program, except that one with truncation (some row has
    top_p < 1, top_k > 0 or temperature 0) is another program than one without.

    Raises:
      UserError: naming the first field that is out of range.
    """

    eta: Numbers = setting(
        math.inf, ETA, "weight of the KL to the reference: small is strong guidance, inf is the reference alone",
        unit="rewards",
    )  # fmt: skip
    temperature: Numbers = setting(1.0, TEMPERATURE, "divides the guided logits; 0 takes the most probable token")
    top_p: Numbers = setting(1.0, SHARE, "sample from the fewest tokens whose probability reaches this")
    top_k: Numbers = setting(0, whole(0), "sample from so many of the most probable tokens; 0 for no limit")
    top_k_candidates: int = setting(
        20, whole(1), "how many of the likeliest tokens under the reference the guide scores at each step"
    )
    others: str = setting(
        "mass", one_of(*OTHERS),
        "log-weight of the tokens that the guide does not score: mass, so that the scored ones keep their mass under"
        " the reference; prefix, the guide's own of the text so far; or zero, that of reward 0, as in the paper's"
        " program, with which even a constant guide is a top-K filter",
    )  # fmt: skip
    mode: str = setting("qsharp", one_of(*MODES), "how values tilt: log E exp(z/eta), E z/eta, or log E z")
    max_new_tokens: int = setting(256, whole(1), "longest response, its stop token included", unit="tokens")
    weights: Sequence[float] | np.ndarray | None = setting(
        None, optional(WEIGHT), "what each guide's log-weights are multiplied by, [guides] or [rows, guides]: how"
        " guides are composed, and of one guide the power of its tilt",
    )  # fmt: skip
    budget: Numbers | None = setting(
        None, optional(whole(0)), "longest response of each row, at most max_new_tokens, the default", unit="tokens"
    )
    stop_ids: Sequence[int] = setting((), IDS, "a response ends at the first of these token ids")
    stop: Sequence[str] = setting(
        (), TEXTS, "a response ends where its text has the first of these, which is cut off with what follows it"
    )
    vocab_size: int | None = setting(
        None, optional(whole(1)), "ids from here on pad the reference's embedding and are never drawn; default: none"
    )
    candidate_slots: float | None = setting(
        None, optional(POSITIVE_FINITE), "guide positions that a row has on average, shared by all rows, the most"
        " probable candidates first; default: every row has top_k_candidates of its own (V-types only)",
    )  # fmt: skip
    candidate_threshold: Numbers = setting(
        1e-3, FRACTION, "least probability under the reference of a candidate that may have a shared slot"
    )
    prompt_bucket: int = setting(
        16, whole(1), "shortest padded length of prompts; longer ones are padded to 2, 3, 4, 6, 8, ... times it",
        unit="tokens",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in PER_ROW:
            if getattr(self, name) is not None:
                array = np.asarray(getattr(self, name))
                object.__setattr__(self, name, array if array.ndim else array.item())
        object.__setattr__(self, "stop_ids", tuple(map(int, self.stop_ids)))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for field in dataclasses.fields(self):
            check(field.name, getattr(self, field.name), field.metadata["rule"])
        if self.budget is not None and np.max(self.budget, initial=0) > self.max_new_tokens:
            raise UserError(f"budget is {self.budget}; it must be at most max_new_tokens = {self.max_new_tokens}")
        if self.candidate_slots is not None and self.candidate_slots > self.top_k_candidates:
            raise UserError(
                f"candidate_slots is {self.candidate_slots}; it must be at most top_k_candidates ="
                f" {self.top_k_candidates}"
            )
