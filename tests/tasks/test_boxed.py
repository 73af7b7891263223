r"""The last \boxed{...} against a recursive descent over the text, and in linear time."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsharp_jax.tasks import boxed


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} or rather \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),  # escaped braces are no braces
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\fbox{5}, \framebox{204}", "204"),
        ("$\\boxed 9$.", "9"),
        (r"\boxed {3}", "3"),
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxedx{3}", None),
        (r"\boxed{42", None),  # cut off by the budget
        (r"\boxed{1} and \boxed{2", None),  # the last one counts
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed", None),
        ("42", None),
        ("", None),
        ("\\boxed{1\\", None),
    ],
)
def test_the_last_box(response, expected):
    assert boxed.last_box(response) == expected


def balanced(text: str) -> str | None:
    """Up to the brace that closes the first one, found one character at a time."""
    depth, escaped = 0, False
    for at, character in enumerate(text):
        if not escaped and character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[1:at].strip() or None
        escaped = character == "\\" and not escaped
    return None


@given(st.text("ab{}\\ ", max_size=30), st.text("ab{}\\ ", max_size=10))
def test_a_box_ends_at_its_own_brace(inside, before):
    r"""Whatever stands before it; backslashes escape each other too."""
    assert boxed.last_box(before + r"\boxed{" + inside) == balanced("{" + inside)


@pytest.mark.parametrize(
    "hostile",
    ["{" * 100_000, r"\boxed{" * 15_000, r"\boxed{" + "{" * 100_000, r"\boxed a" * 12_000, "\\" * 100_000 + "boxed{1}"],
)
def test_time_is_linear(hostile):
    begin = time.perf_counter()
    boxed.last_box(hostile)
    assert time.perf_counter() - begin < 0.5  # some milliseconds; a quadratic search takes minutes


def test_the_prompt_is_the_papers():
    assert boxed.prompt("How many?") == "Problem:\n\nHow many? Write your answer inside \\boxed{}.\n\nSolution:"
