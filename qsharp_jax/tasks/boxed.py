r"""Tasks whose answer stands in \boxed{...} share this: the paper's prompt, and which boxes are the answer.

The last box is, together with those before it that it is joined to. Two boxes are joined if nothing stands between
them but signs of mathematics and layout, a unit, a comma, semicolon, "and" or "or", a label as (b), and the symbol that
the second is the value of, as in "x = \boxed{2} and x = \boxed{3}" or "\boxed{2}, and the other root is \boxed{3}". Any
other words, signs or sentences between two boxes part them, as in "\boxed{2}. Wait, \boxed{3}", "\boxed{2} + \boxed{3}
= \boxed{5}" or "\boxed{2}, so that we have \boxed{4}": the boxes before are then steps, or corrected.

It knows nothing of what is in a box.
"""

import re

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[^$\n{}]+")  # \boxed 5$, as MATH's solutions have it here and there
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is none

_FARTHEST = 120  # characters between two boxes that may be joined
_SIGNS = re.compile(  # of mathematics, of layout and of Markdown, which part nothing
    r"\\[()\[\],;:! ]|\\q?quad(?![A-Za-z])|\\(?:text|mathrm|textbf|mbox)(?=\s*\{)|\\\\|[$&{}*~]|\s"
    r"|\\(?:begin|end)\{[a-z]+\*?\}"
)
_JOINED = re.compile(
    r"(?:\^ ?\\circ|\\?%|(?:mm|cm|m|km|inch(?:es)?|feet|ft|yards?|miles?|units?|dollars?|cents?|degrees?|seconds?"
    r"|minutes?|hours?|days?|years?|grams?|kg)(?![A-Za-z]))?"  # a unit
    r"(?: ?(?:[,;]|and|or|as well as)(?![A-Za-z])){0,3}"
    r"(?: ?\(?(?:(?:part|case) )?(?:[b-h]|[2-9]|ii|iii|iv|v|vi)[).:])?"  # a label
    r"(?: ?also| ?the (?:other|second|third|fourth|next|last)(?: (?:one|root|solution|answer|value|number))?(?: is)?)?"
    r"(?: ?(?:\\(?:angle|sin|cos|tan) ?|\|)?"
    r"(?:[A-Za-z]|[A-Z]{2,4}|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega))"
    r"(?:_ ?\w{1,4})?'*(?: ?\([\w, ]{1,8}\))?\|? ?(?:=|:|\\in(?![A-Za-z]))"  # a name
    r")?"
)


def prompt(question: str) -> str:
    """The paper's, one user turn."""
    return f"Problem:\n\n{question} Write your answer inside \\boxed{{}}.\n\nSolution:"


def answer(response: str) -> str | None:
    r"""Content of the boxes that are the answer, with commas between; None if the last is empty or not closed.

    Equal boxes that are joined count once. Time is linear in the text's length, whatever it holds.
    """
    boxes = answers(response)
    return ", ".join(boxes) if boxes else None


def answers(response: str) -> list[str]:
    """The same, box by box; none if the last is empty or not closed."""
    joined, following = [], len(response)  # from the last to the first
    for box in reversed(list(_BOX.finditer(response))):
        content, end = _content(response, box.end(), following)
        braced = response.startswith("{", box.end())  # else nobody knows where it ends
        if not content or (joined and not (braced and _are_joined(response[end:following]))):
            break
        joined.append(content)
        following = box.start()
    return list(dict.fromkeys(reversed(joined)))


def last_box(response: str) -> str | None:
    r"""What the last \boxed{...} holds, without blanks around it; None if there is none, or it is empty or not closed.

    Time is linear in the text's length, whatever it holds.
    """
    end = None
    for box in _BOX.finditer(response):
        end = box.end()
    return _content(response, end, len(response))[0] if end is not None else None


def _content(response: str, begin: int, limit: int) -> tuple[str | None, int]:
    """Content of the box whose brace is at `begin`, if it is closed before `limit`, and where it ends."""
    if not response.startswith("{", begin):
        bare = _BARE.match(response, begin, limit)
        return ((bare and bare[0].strip()) or None), bare.end() if bare else begin
    depth = 0
    for brace in _BRACE.finditer(response, begin, limit):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return response[begin + 1 : brace.start()].strip() or None, brace.end()
    return None, limit


def _are_joined(between: str) -> bool:
    if len(between) > _FARTHEST:
        return False
    return bool(_JOINED.fullmatch(" ".join(_SIGNS.sub(" ", between).split())))
