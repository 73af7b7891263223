"""Bodies of answers, in OpenAI's shape: whole, and in the chunks of a stream."""

import dataclasses
import json
import math
import time
import uuid
from typing import Any

from qsharp_jax.data.tokenizer import TextStream, Tokenizer
from qsharp_jax.serving.protocol import ChatBody, CompletionBody
from qsharp_jax.serving.requests import Update

LEAST_LOG_PROB = -9999.0  # JSON has no -inf; OpenAI's value for it

DONE = "data: [DONE]\n\n"


@dataclasses.dataclass
class Usage:
    """Tokens of a request."""

    prompt: int
    completion: int = 0

    def body(self) -> dict[str, int]:
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


class Reply:
    """The answer to one request: `add` takes what comes, `chunks` and `whole` give what is sent.

    `chat` replies and those of completions differ in the names of their parts.
    """

    def __init__(self, body: ChatBody | CompletionBody, tokenizer: Tokenizer, prompt_tokens: int, choices: int):
        self._body, self._tokenizer = body, tokenizer
        self._is_chat = isinstance(body, ChatBody)
        self.usage = Usage(prompt_tokens)
        self._texts = [TextStream(tokenizer, body.stop) for _ in range(choices)]
        self._offsets = [0] * choices  # in the texts, of the next tokens
        self._parts: list[list[str]] = [[] for _ in range(choices)]
        self._entries: list[list[dict[str, Any]]] = [[] for _ in range(choices)]
        self._finish: list[str | None] = [None] * choices
        self._shared = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }

    @property
    def is_done(self) -> bool:
        return all(self._finish)

    # --- Whole --------------------------------------------------------------------------------------------------------

    def add(self, index: int, update: Update) -> None:
        """Take an update of one choice."""
        text, entries = self._text(index, update), self._logprobs(update)
        self._parts[index].append(text)
        self._entries[index] += entries

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for index, parts in enumerate(self._parts):
            text, logprobs = "".join(parts), self._shape(index, self._entries[index])
            content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
            choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": self._finish[index]})
        kind = "chat.completion" if self._is_chat else "text_completion"
        return self._shared | {"object": kind, "choices": choices, "usage": self.usage.body()}

    # --- In chunks ----------------------------------------------------------------------------------------------------

    def first(self) -> list[str]:
        """Events before any token: the role of a chat's answers."""
        if not self._is_chat:
            return []
        return [self._chunk(index, {"role": "assistant", "content": ""}, None) for index in range(len(self._texts))]

    def chunks(self, index: int, update: Update) -> list[str]:
        """Events for an update of one choice."""
        text, entries = self._text(index, update), self._logprobs(update)
        if not text and not entries and not update.finish:
            return []
        content = ({"content": text} if text else {}) if self._is_chat else text
        return [self._chunk(index, content, self._shape(index, entries), update.finish)]

    def last(self) -> list[str]:
        """Events after all tokens."""
        usage = [self._event({"choices": [], "usage": self.usage.body()})] if self._body.counts_usage else []
        return [*usage, DONE]

    def _chunk(self, index: int, content: Any, logprobs: Any, finish: str | None = None) -> str:
        content = {"delta" if self._is_chat else "text": content}
        return self._event({"choices": [{"index": index, **content, "logprobs": logprobs, "finish_reason": finish}]})

    def _event(self, fields: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        usage = {"usage": None} if self._body.counts_usage else {}
        return event(self._shared | {"object": kind} | usage | fields)

    # --- Tokens -------------------------------------------------------------------------------------------------------

    def _text(self, index: int, update: Update) -> str:
        self.usage.completion += len(update.tokens)
        text = self._texts[index].add(update.tokens)
        if update.finish:
            self._finish[index] = update.finish
            text += self._texts[index].end()
        return text

    def _logprobs(self, update: Update) -> list[dict[str, Any]]:
        """An entry for each token, in the shape of a chat's."""
        if self._body.alternatives is None:
            return []
        entries = []
        for place, token in enumerate(update.tokens):
            entry = self._entry(token, update.log_probs[place])
            top = update.top[place][: self._body.alternatives] if update.top else []
            entry["top_logprobs"] = [self._entry(*pair) for pair in top]
            if self._body.return_guidance:
                value = update.values[place]
                entry |= {
                    "kl": update.kl[place],
                    "value": None if math.isnan(value) else value,
                    "ref_logprob": max(update.ref_log_probs[place], LEAST_LOG_PROB),
                }
            entries.append(entry)
        return entries

    def _entry(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self._tokenizer.decode_one(token)
        # A token may be a part of a character; which bytes it has is then not known from its text.
        data = None if "\ufffd" in text else [*text.encode()]
        return {"token": text, "logprob": max(log_prob, LEAST_LOG_PROB), "bytes": data}

    def _shape(self, index: int, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Entries in the shape of the kind of answer."""
        if self._body.alternatives is None:
            return None
        if self._is_chat:
            return {"content": entries, "refusal": None}
        offsets = []
        for entry in entries:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(entry["token"])
        shaped: dict[str, Any] = {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [_by_text(entry["top_logprobs"]) for entry in entries],
            "text_offset": offsets,
        }
        if self._body.return_guidance:
            shaped |= {name: [entry[name] for entry in entries] for name in ("kl", "value", "ref_logprob")}
        return shaped


def event(fields: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(fields, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _by_text(alternatives: list[dict[str, Any]]) -> dict[str, float]:
    """Log-probabilities by text, likeliest first; of tokens with the same text, like parts of characters, one."""
    told: dict[str, float] = {}
    for entry in alternatives:
        told.setdefault(entry["token"], entry["logprob"])
    return told
