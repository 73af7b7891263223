"""Bodies of requests, in the shape that OpenAI's client sends them, with what steers in `extra_body`.

https://platform.openai.com/docs/api-reference/chat/create and .../completions/create, read for version 3 of the client.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qsharp_jax.sampling import LARGEST_WEIGHT, LEAST_ETA, LEAST_TEMPERATURE, MODES
from qsharp_jax.system.chat import Message

MOST_CHOICES = 64  # of `n`
MOST_STOPS = 16
MOST_PROMPTS = 64  # of one request to /v1/completions
COMPLETION_TOKENS = 16  # of /v1/completions, as at OpenAI

# Fields of OpenAI's that would change the answer: the values with which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")


_Weight = Annotated[float, Field(ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT, allow_inf_nan=False)]


class ApiError(Exception):
    """An answer that is an error, with OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, fields: Any) -> Any:
        """Null means the default, except for eta, where it means no guidance."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None or name == "eta"}


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None  # models' templates have no place for it
    annotations: Annotated[list, Field(max_length=0)] = []  # in answers of other servers that are sent back

    def as_message(self) -> Message:
        texts = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": texts}


class _Body(_Strict):
    """Fields of both kinds of requests."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0  # 0 leaves the likeliest token

    # What steers; OpenAI's client sends it by `extra_body`.
    eta: Annotated[float, Field(ge=LEAST_ETA, allow_inf_nan=False)] | None = None
    guide: str | list[str] | None = None
    weights: _Weight | list[_Weight] | None = None
    mode: str | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0  # 0 leaves all; so does -1, vLLM's word for it
    return_guidance: bool = False

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name, neutral in NEUTRAL.items():
            if (value := fields.get(name)) is not None and value not in neutral:
                raise _Unsupported(name)
        return {name: value for name, value in fields.items() if name not in NEUTRAL and name not in IGNORED}

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str]) -> list[str]:
        stop = [stop] if isinstance(stop, str) else stop
        if not all(stop) or len(stop) > MOST_STOPS:
            raise ValueError(f"give at most {MOST_STOPS} texts that are not empty")
        return stop

    @field_validator("mode")
    @classmethod
    def _check_mode(cls, mode: str | None) -> str | None:
        if mode is not None and mode not in MODES:
            raise ValueError(f"must be one of {', '.join(MODES)}")
        return mode

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, temperature: float) -> float:
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"must be 0, or at least {LEAST_TEMPERATURE:g}")
        return temperature

    @property
    def switches_guidance_off(self) -> bool:
        return self.eta is None and "eta" in self.model_fields_set

    @property
    def counts_usage(self) -> bool:
        """True if a stream's last chunk says how many tokens there were."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(_Body):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @model_validator(mode="after")
    def _check_together(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise _Impossible("top_logprobs", "needs logprobs: true")
        if self.messages[-1].role == "assistant":
            raise _Impossible("messages", "the last message must be the user's, for the model to answer")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """Number of the most probable tokens to tell; None for no log-probabilities."""
        return self.top_logprobs if self.logprobs or self.return_guidance else None


class CompletionBody(_Body):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        if not len(prompt):
            raise ValueError("is empty; give a text")
        if isinstance(prompt, list) and not isinstance(prompt[0], int) and len(prompt) > MOST_PROMPTS:
            raise ValueError(f"has {len(prompt)} prompts; give at most {MOST_PROMPTS} at a time")
        return prompt

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    @property
    def new_tokens(self) -> int:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (0 if self.return_guidance else None) if self.logprobs is None else self.logprobs


class _Unsupported(Exception):
    """A field that this server does not have."""


class _Impossible(Exception):
    """Fields that do not go together: the field, and why."""


Body = TypeVar("Body", ChatBody, CompletionBody)


def parse(kind: type[Body], fields: Any) -> Body:
    """Check a body; raises an ApiError that names the first field that is wrong."""
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(fields)
    except _Unsupported as error:
        name = error.args[0]
        words = f"{name} is not supported; leave it out"
        raise ApiError(400, words, param=name, code="unsupported_parameter") from None
    except _Impossible as error:
        name, why = error.args
        raise ApiError(400, f"{name}: {why}", param=name, code="invalid_value") from None
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    place = ".".join(str(x) for x in first["loc"] if not str(x).startswith(("function-", "constrained-")))
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{place} is unknown; leave it out", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{place} is missing; give it", param=param, code="missing_required_parameter")
    words = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{place}: {words[0].lower()}{words[1:]}", param=param, code="invalid_value")
