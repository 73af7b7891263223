"""From a request's body to the settings that its responses are sampled with."""

import dataclasses
import math

import numpy as np

from qsharp_jax.sampling import Sampling
from qsharp_jax.serving.protocol import ApiError, ChatBody, CompletionBody
from qsharp_jax.system.errors import UserError

LEAST_TOP_P = 1e-6  # leaves the likeliest token, as 0 does for clients of OpenAI's API
_PARAMS = {"max_new_tokens": "max_tokens"}  # fields of `Sampling` that a body calls otherwise


@dataclasses.dataclass(frozen=True)
class Served:
    """The models of a server, and the settings that it has for all requests.

    Attributes:
      ref: the reference's name; as the `model` of a request it is sampled as it is.
      guides: the guides' names; as the `model` of a request a guide steers, with `eta` and `mode`.
      sampling: what all requests share.
      created: when the server began, in seconds since 1970.
    """

    ref: str
    guides: tuple[str, ...]
    sampling: Sampling
    eta: float
    mode: str
    created: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.ref, *self.guides)


def sampling_of(served: Served, body: ChatBody | CompletionBody, new_tokens: int) -> Sampling:
    """Return the settings of a request; raises an ApiError that names the field that is wrong."""
    weights = _weights(served, body)
    eta = math.inf
    if weights is not None:
        eta = served.eta if body.eta is None else body.eta
    try:
        return dataclasses.replace(
            served.sampling, eta=eta, weights=weights, mode=body.mode or served.mode, temperature=body.temperature,
            top_p=body.top_p or LEAST_TOP_P, top_k=max(body.top_k, 0), max_new_tokens=new_tokens, stop=tuple(body.stop),
        )  # fmt: skip
    except UserError as error:
        name = str(error).split(" ", 1)[0]
        raise ApiError(400, str(error), param=_PARAMS.get(name, name), code="invalid_value") from None


def _weights(served: Served, body: ChatBody | CompletionBody) -> np.ndarray | None:
    """The weights of the guides, [G]; None where the reference is sampled as it is."""
    if body.model not in served.names:
        known = ", ".join(served.names)
        raise ApiError(404, f"the model {body.model!r} is not here: {known}", param="model", code="model_not_found")
    names = [body.guide] if isinstance(body.guide, str) else body.guide
    if names is None and body.model != served.ref:
        names = [body.model]
    elif names is None and (body.eta is not None or body.weights is not None or body.mode is not None):
        if len(served.guides) != 1:
            which = " or ".join(map(repr, served.guides)) or "none here"
            raise ApiError(400, f"say by which guide to steer: {which}", param="guide", code="invalid_value")
        names = [*served.guides]
    if names is None or body.switches_guidance_off:
        return None
    if unknown := [name for name in names if name not in served.guides]:
        known = ", ".join(served.guides) or "there are none"
        raise ApiError(400, f"the guide {unknown[0]!r} is not here: {known}", param="guide", code="invalid_value")
    if not names or len(set(names)) < len(names):
        raise ApiError(400, "name each guide once, and at least one", param="guide", code="invalid_value")
    given = [body.weights] if isinstance(body.weights, float | int) else body.weights
    given = [1.0] * len(names) if given is None else given
    if len(given) != len(names):
        words = f"there are {len(given)} weights for {len(names)} guides; give one for each"
        raise ApiError(400, words, param="weights", code="invalid_value")
    if (body.mode or served.mode) == "expectation" and min(given) <= 0:
        words = 'in the mode "expectation" weights must be above 0'
        raise ApiError(400, words, param="weights", code="invalid_value")
    weights = np.zeros(len(served.guides), np.float32)
    weights[[served.guides.index(name) for name in names]] = given
    return weights
