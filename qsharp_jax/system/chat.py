"""Prompts: texts, or the messages of a chat, each with its `role` and `content`."""

from typing import Any

from qsharp_jax.system.errors import UserError

Message = dict[str, str]
Prompt = str | list[Message]


def as_text(prompt: Prompt) -> str:
    """Return a prompt for people to read; messages as "role: content", one below the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def check_messages(messages: list[Any], place: str) -> None:
    """Raise a UserError, beginning with the place in a file, for what is no chat that a model can answer."""
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{place}: the prompt has a message {message!r}; it must have a role and a content")
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError(f"{place}: the prompt's last message must be the user's, for the model to answer")


def with_system(prompt: Prompt, system: str) -> Prompt:
    """Return a prompt's messages after a system prompt; a UserError if they begin with one of their own."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[0]["role"] == "system":
        raise UserError(f"the prompt {as_text(prompt)[:60]!r} has a system prompt of its own; leave --system out")
    return [{"role": "system", "content": system}, *messages]
