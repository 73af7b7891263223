r"""What tasks share whose answer stands in the last \boxed{...}: the paper's prompt, and the box.

It knows nothing of what is in the box.
"""

import re

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[^$\n{}]+")  # \boxed 5$, as MATH's solutions have it here and there
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is none


def prompt(question: str) -> str:
    """The paper's, one user turn."""
    return f"Problem:\n\n{question} Write your answer inside \\boxed{{}}.\n\nSolution:"


def last_box(response: str) -> str | None:
    r"""What the last \boxed{...} holds, without blanks around it; None if there is none, or it is empty or not closed.

    Time is linear in the text's length, whatever it holds.
    """
    boxes = list(_BOX.finditer(response))
    if not boxes:
        return None
    begin = boxes[-1].end()
    if not response.startswith("{", begin):
        bare = _BARE.match(response, begin)
        return (bare and bare[0].strip()) or None
    depth = 0
    for brace in _BRACE.finditer(response, begin):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return response[begin + 1 : brace.start()].strip() or None
    return None
