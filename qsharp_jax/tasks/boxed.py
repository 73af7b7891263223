r"""Shared by tasks that are answered in \boxed{...}: the paper's prompt, and which boxes form the answer.

The answer is the last box, together with the boxes before it that it is joined to. Two boxes are joined if only these
are between them: math and layout commands, a unit, a comma, semicolon, "and" or "or", a label like (b), and the name of
the second box's value, as in "x = \boxed{2} and x = \boxed{3}" or "\boxed{2}, and the other root is \boxed{3}". Other
words, signs or sentences separate them, as in "\boxed{2}. Wait, \boxed{3}", "\boxed{2} + \boxed{3} = \boxed{5}" or
"\boxed{2}, so that we have \boxed{4}": the earlier boxes are then steps, or were corrected.
"""

import re

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[^$\n{}]+")  # \boxed 5$, as in some of MATH's solutions
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # escaped braces are skipped

_FARTHEST = 120  # characters between two boxes that may be joined
_SIGNS = re.compile(  # of math, layout and Markdown, which separate nothing
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
    """Return the paper's prompt, one user turn."""
    return f"Problem:\n\n{question} Write your answer inside \\boxed{{}}.\n\nSolution:"


def answer(response: str) -> str | None:
    r"""Return the boxes that form the answer, comma-separated; None if the last is empty or not closed.

    Equal boxes that are joined count once. The time is linear in the length of the text.
    """
    boxes = answers(response)
    return ", ".join(boxes) if boxes else None


def answers(response: str) -> list[str]:
    """Return the same as a list of boxes."""
    joined: list[str] = []  # from the last to the first
    following = len(response)
    for box in reversed(list(_BOX.finditer(response))):
        content, end = _content(response, box.end(), following)
        braced = response.startswith("{", box.end())  # otherwise its end is uncertain
        if not content or (joined and not (braced and _are_joined(response[end:following]))):
            break
        joined.append(content)
        following = box.start()
    return list(dict.fromkeys(reversed(joined)))


def last_box(response: str) -> str | None:
    r"""Return the content of the last \boxed{...}, stripped; None if there is none, or it is empty or not closed."""
    end = None
    for box in _BOX.finditer(response):
        end = box.end()
    return _content(response, end, len(response))[0] if end is not None else None


def _content(response: str, begin: int, limit: int) -> tuple[str | None, int]:
    """Return the content of the box whose brace is at `begin`, None if not closed before `limit`, and its end."""
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
