r"""The last \boxed{...} against a recursive descent over the text, which boxes are the answer, and in linear time."""

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
    assert boxed.last_box(before + r"\boxed{" + inside) == balanced("{" + inside)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"The roots are $\boxed{2}$ and $\boxed{3}$.", "2, 3"),
        (r"The roots are $x = \boxed{2}$ and $x = \boxed{3}$.", "2, 3"),
        (r"The roots are $\boxed{2}, \boxed{3}$.", "2, 3"),
        (r"\boxed{2}, \boxed{3}, and \boxed{\frac{1}{2}} are the roots.", r"2, 3, \frac{1}{2}"),
        (r"$x_{1} = \boxed{2}$ \quad \text{or} \quad $x_{2} = \boxed{-3}$", "2, -3"),
        (r"\begin{align*} x &= \boxed{2} \\ y &= \boxed{3} \end{align*}", "2, 3"),
        ("(a) $\\boxed{2}$\n\n(b) $\\boxed{3}$", "2, 3"),
        (r"One root is \boxed{2}, and the other root is \boxed{3}.", "2, 3"),
        (r"**\boxed{2}** **\boxed{3}**", "2, 3"),
        (r"The sides are \boxed{12} cm and \boxed{5} cm.", "12, 5"),
        (r"\boxed{2} and \boxed{3} and \boxed{2}", "2, 3"),
        (r"\boxed{2}. Wait, that is wrong. It is \boxed{3}.", "3"),
        (r"\boxed{2}, no, \boxed{3}", "3"),
        (r"\boxed{2} or rather \boxed{3}", "3"),
        (r"\boxed{2}. \boxed{3}", "3"),
        (r"$\boxed{2} + \boxed{3} = \boxed{5}$", "5"),
        (r"$a = \boxed{2}$ and $b = \boxed{3}$, so $a + b = \boxed{5}$", "5"),
        (r"She has \boxed{12} eggs, and so she gets \boxed{24} dollars.", "24"),
        (r"\boxed{12}. The answer is \boxed{12}.", "12"),
        ("\\boxed{6}\n\nFinal answer: \\boxed{7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{6} $\Rightarrow x = $ \boxed{7}", "7"),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{1} and \boxed{}", None),
        (r"\boxed 9$", "9"),
        (r"\boxed 9 and \boxed{8}", "8"),
        ("no box", None),
    ],
)
def test_which_boxes_are_the_answer(response, expected):
    assert boxed.answer(response) == expected


@given(st.lists(st.sampled_from(["{1}", "{2", "2}", "{3}", " and ", ". ", r"\boxed", "{", "}"]), max_size=12))
def test_the_last_box_is_in_the_answer(pieces):
    response = "".join(pieces)
    last, answer = boxed.last_box(response), boxed.answer(response)
    assert (last is None) == (answer is None) and (last is None or last in answer.split(", "))


@pytest.mark.parametrize(
    "hostile",
    [
        "{" * 100_000, r"\boxed{" * 15_000, r"\boxed{" + "{" * 100_000, r"\boxed a" * 12_000,
        "\\" * 100_000 + "boxed{1}", r"\boxed{1} and " * 7000, r"\boxed{" + r"\boxed{1} , " * 7000,
    ],
)  # fmt: skip
def test_time_is_linear(hostile):
    begin = time.perf_counter()
    boxed.last_box(hostile)
    boxed.answer(hostile)
    assert time.perf_counter() - begin < 0.5  # some milliseconds; a quadratic search takes minutes
