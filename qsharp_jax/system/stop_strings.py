"""Stop strings: a text ends where the first of them begins. Pure functions of texts."""

from collections.abc import Sequence


def contains(text: str, stop: Sequence[str]) -> bool:
    """Return True if the text has one of the stop strings."""
    return any(string in text for string in stop)


def cut(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string; all of it if it has none."""
    begins = [begin for string in stop if (begin := text.find(string)) >= 0]
    return text[: min(begins, default=len(text))]


def certain(text: str, stop: Sequence[str]) -> str:
    """Return the text without an end that may turn out to be the beginning of a stop string."""
    longest = max(map(len, stop), default=0)
    for begin in range(max(0, len(text) - longest + 1), len(text)):
        if any(string.startswith(text[begin:]) for string in stop):
            return text[:begin]
    return text
