"""Answers in the form of OpenAI's API."""

from types import SimpleNamespace

from qsharp_jax.serving.protocol import CompletionBody
from qsharp_jax.serving.replies import Reply
from qsharp_jax.serving.requests import Update


class PartsOfCharacters:
    """A tokenizer with tokens that are no whole character, which all have the same text."""

    eos_ids = ()

    def decode(self, tokens):
        return "".join(map(self.decode_one, tokens))

    def decode_one(self, token):
        return "\ufffd" if token > 9 else str(token)


def test_of_alternatives_with_the_same_text_the_likeliest_is_told():
    body = CompletionBody(model="small", prompt="x", logprobs=3)
    reply = Reply(body, PartsOfCharacters(), prompt_tokens=1, choices=1)
    top = [(11, -0.5), (3, -1.5), (12, -2.5)]
    update = Update(SimpleNamespace(is_guided=False), 0, [3], [-1.5], [-1.5], [0.0], [float("nan")], [top], "stop")
    reply.add(0, update)
    told = reply.whole()["choices"][0]["logprobs"]
    assert [[*top.items()] for top in told["top_logprobs"]] == [[("\ufffd", -0.5), ("3", -1.5)]]
    assert told["token_logprobs"] == [-1.5]
