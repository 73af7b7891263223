r"""Word problems of one to three steps, small enough for a language model trained on a CPU.

"Sam has 54 eggs. Sam gives 12 eggs to Mia. How many eggs does Sam have?" is answered "54-12=42. \boxed{42}". In the
pre-training corpus a step may use the wrong operation; later steps are computed correctly from its result. Prompt and
response together show such a reading error, so a value model can learn to see it, and a guide to avoid it.

config: max_events         a story has 1..max_events events after its opening; at most 3
        equation_fraction  share of the pre-training texts that are bare equations, without a prompt
        error_scale        multiplies every kind's probability of a reading error; 0 gives a corpus without errors
"""

import dataclasses
import functools
import itertools
import math
import random
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qsharp_jax.system.chat import as_text
from qsharp_jax.tasks import base
from qsharp_jax.tasks.base import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FINITE = SYMBOLIC = False

# Every equation that exists here: sums and differences within 0..99, the multiplication table to 9x9, its inverse.
RESULT = {
    **{("+", a, b): a + b for a in range(100) for b in range(100 - a)},
    **{("-", a, b): a - b for a in range(100) for b in range(a + 1)},
    **{("*", a, b): a * b for a in range(10) for b in range(10)},
    **{("/", a * b, b): a for a in range(10) for b in range(1, 10)},
}
_STEPS = {op: [step for step in RESULT if step[0] == op] for op in "+-*/"}
_BARE_EQUATIONS = 6  # per bare text, which makes it nearly as long as a problem with its response

_COUNTS = range(1, 98)  # values of a story's count at which some event can be read both correctly and wrongly

MISREAD = {"+": "-", "-": "+", "*": "+", "/": "-"}  # the operation that a reading error takes instead

# Possible numbers of an event; two numbers are multiplied first: 3 boxes of 8 eggs are 24 eggs.
_ONE = tuple((n,) for n in range(2, 100))
_TWO = tuple(itertools.product(range(2, 10), repeat=2))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of event."""

    name: str  # for the problem's identity
    op: str  # operation on the count and the event's number that gives the new count
    misread: float  # probability of a reading error in each of its steps
    text: str  # the sentence, with the number or numbers as {0} and {1}
    numbers: tuple[tuple[int, ...], ...] = _ONE  # their possible values, if the result is one of `_COUNTS`
    question: str = ""  # if not empty, the story ends with this event and this question
    what: str = ""  # the thing counted from here on; empty if that does not change
    passes_on: bool = False  # whether the count is the other person's from here on


# At these rates 44% of a corpus's responses are correct. All are below 1/2: the likeliest reading is the correct one.
KINDS = (
    Kind("boxes", "+", 0.2, "{who} buys {0} boxes of {1} {what}.", _TWO),
    Kind("buy", "+", 0.15, "{who} buys {0} {what}."),
    Kind("give", "-", 0.25, "{who} gives {0} {what} to {other}."),
    Kind("lose", "-", 0.3, "{who} loses {0} {what}."),
    Kind("pack", "/", 0.35, "{who} packs the {what} into bags of {0}.", what="bags"),
    Kind("double", "*", 0.45, "The number of {what} doubles.", numbers=((2,),)),
    Kind("share", "/", 0.4, "{who} shares the {what} among {0} kids.",
         question="How many {what} does each kid get?"),
    Kind("more", "+", 0.3, "{other} has {0} more {what} than {who}.", passes_on=True),
    Kind("fewer", "-", 0.35, "{other} has {0} fewer {what} than {who}.", passes_on=True),
    Kind("total", "+", 0.2, "{other} has {0} {what}.", question="How many {what} do they have in total?"),
    Kind("sells each", "*", 0.45, "{who} sells the {what} for {0} dollars each.",
         question="How many dollars does {who} get?"),
)  # fmt: skip
_KINDS_OF = {op: [kind for kind in KINDS if kind.op == op] for op in MISREAD}
_OPENING = "{who} has {0} {what}."
_QUESTION = "How many {what} does {who} have?"
_NAMES = ("Ana", "Ben", "Mia", "Sam")
_THINGS = ("apples", "cards", "coins", "eggs", "shells")

# A word includes the space before it, and the space after it if a number or the box follows; so does a full stop.
# So every space is part of a token, and a digit is the same token everywhere.
_PIECE = r"\\boxed\{|(?: ?[A-Za-z]+|\.)(?: (?=[0-9\\]))?|."

_Events = list[tuple[Kind, tuple[int, ...]]]


def check(config: Any) -> None:
    # Each event may bring a new person into the story, who needs a name.
    if not 1 <= config.max_events < len(_NAMES):
        raise ValueError(f"max_events is {config.max_events}; it must be in 1..{len(_NAMES) - 1}")
    if not 0 <= config.equation_fraction <= 1:
        raise ValueError(f"equation_fraction is {config.equation_fraction}; it must be in [0, 1]")
    # Much above 1 some kinds would be misread more often than read, and the corpus would teach the wrong operation.
    if not 0 <= config.error_scale <= 1:
        raise ValueError(f"error_scale is {config.error_scale}; it must be in [0, 1]")


def make_tokenizer(config: Any) -> "PreTrainedTokenizerFast":
    """Build a tokenizer of about 70 tokens: the digits, the signs and the words of the sentences above."""
    from tokenizers import Regex, decoders, pre_tokenizers

    check(config)
    later = (_QUESTION, *(text for kind in KINDS for text in (kind.text, kind.question) if text))
    things = (*_THINGS, *(kind.what for kind in KINDS if kind.what))
    texts = [" ".join(map(_equation, RESULT)) + r" \boxed{0}"]
    for template in (_OPENING, *(" " + text for text in later)):  # only the opening has no space before it
        for who, what in itertools.product(_NAMES, things):
            texts.append(template.format(0, 0, who=who, other=who, what=what))
    pieces = sorted({piece for text in texts for piece in re.findall(_PIECE, text)})
    return base.word_level_tokenizer(pieces, pre_tokenizers.Split(Regex(_PIECE), "isolated"), decoders.Fuse())


def problems(config: Any, split: str, count: int, seed: int) -> list[Problem]:
    check(config)
    draws = _stories(config, base.generator("arithmetic", split, seed))
    return [problem for problem, _ in base.take(draws, split, count, distinct=True)]


def pretraining_texts(config: Any, count: int, seed: int) -> list[tuple[str, str]]:
    """Return stories with responses that may misread them, mixed with bare equations, which are always correct."""
    check(config)
    rng = base.generator("arithmetic", "pretraining", seed)
    bare = round(count * config.equation_fraction)
    texts = [("", _bare_equations(rng)) for _ in range(bare)]
    for problem, (opening, events) in base.take(_stories(config, rng), "train", count - bare, distinct=False):
        texts.append((as_text(problem.prompt), _response(rng, opening, events, config.error_scale)))
    rng.shuffle(texts)
    return texts


def parse(response: str) -> str | None:
    r"""Return the number in the last \boxed{...}, without leading zeros; None if the box is unclosed or holds more."""
    _, box, rest = response.rpartition(r"\boxed{")
    number = re.match(r"([0-9]+)\}", rest) if box else None
    return (number[1].lstrip("0") or "0") if number else None


def reward(problem: Problem, response: str) -> float:
    """Return 1.0 if the last box holds the answer, regardless of the steps."""
    return float(parse(response) == problem.answer)


def _stories(config: Any, rng: random.Random) -> Iterator[tuple[Problem, tuple[int, _Events]]]:
    """Yield endless stories: the problem, and the opening number with the events."""
    while True:
        what = rng.choice(_THINGS)
        who, *others = rng.sample(_NAMES, len(_NAMES))
        # Counts to multiply, counts to divide, and any: otherwise products and quotients would be rare.
        opening = value = rng.choice((rng.randint(2, 9), math.prod(rng.choice(_TWO)), rng.randint(10, _COUNTS[-1])))
        sentences = [_OPENING.format(opening, who=who, what=what)]
        events: _Events = []
        length = max(rng.randint(1, config.max_events) for _ in range(2))  # longer stories are likelier
        while len(events) < length:
            kind = rng.choice(_KINDS_OF[rng.choice("+-*/")])  # by operation first, so that none is rare
            choices = _choices(kind, value)
            if not choices or kind.what == what or (kind.question and len(events) < length - 1):
                continue
            numbers, other = rng.choice(choices), others.pop()
            sentences.append(kind.text.format(*numbers, who=who, other=other, what=what))
            events.append((kind, numbers))
            value = RESULT[kind.op, value, math.prod(numbers)]
            what = kind.what or what
            who = other if kind.passes_on else who
        sentences.append((kind.question or _QUESTION).format(who=who, what=what))
        # The same events about other people or things are the same problem.
        content = f"{opening} {[(kind.name, *numbers) for kind, numbers in events]}"
        yield Problem(base.content_id(content), " ".join(sentences), str(value)), (opening, events)


@functools.cache
def _choices(kind: Kind, value: int) -> list[tuple[int, ...]]:
    """Return the numbers with which such an event turns `value` into another of `_COUNTS`.

    The wrong operation also has an equation with them, so the kind alone decides how likely an error is.
    """
    return [
        numbers
        for numbers in kind.numbers
        if RESULT.get((kind.op, value, math.prod(numbers))) in _COUNTS
        and (MISREAD[kind.op], value, math.prod(numbers)) in RESULT
    ]


def _response(rng: random.Random, opening: int, events: _Events, error_scale: float) -> str:
    """Write the events as equations, each with a reading error at its kind's probability, and the result in a box."""
    value = None
    while value is None:  # errors led to a step that has no equation: start again
        value, equations = opening, list[str]()
        for kind, numbers in events:
            misread = kind.misread * error_scale
            amount = _step(rng, equations, "*", *numbers, misread) if len(numbers) == 2 else numbers[0]
            value = _step(rng, equations, kind.op, value, amount, misread)
    return " ".join([*equations, rf"\boxed{{{value}}}"])


def _step(
    rng: random.Random, equations: list[str], op: str, left: int | None, right: int | None, misread: float
) -> int | None:
    """Append the equation of one step and return its result; if neither operation has an equation, return None."""
    ops = (MISREAD[op], op) if rng.random() < misread else (op, MISREAD[op])
    for step in ((op, left, right) for op in ops):
        if step in RESULT:
            equations.append(_equation(step))
            return RESULT[step]
    return None


def _bare_equations(rng: random.Random) -> str:
    return " ".join(_equation(rng.choice(_STEPS[rng.choice("+-*/")])) for _ in range(_BARE_EQUATIONS))


def _equation(step: tuple[str, int, int]) -> str:
    op, left, right = step
    return f"{left}{op}{right}={RESULT[step]}."
