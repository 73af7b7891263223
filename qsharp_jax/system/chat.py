"""Prompts: texts, or the messages of a chat, each with its `role` and `content`."""

Message = dict[str, str]
Prompt = str | list[Message]


def as_text(prompt: Prompt) -> str:
    """Return a prompt for people to read; messages as "role: content", one below the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
