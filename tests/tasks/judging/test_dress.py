r"""Answers without their dress: what is read as which number, with which unit, and what is left as it is."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsharp_jax.tasks.judging import units
from qsharp_jax.tasks.judging.dress import undress

NUMBERS = {
    "18": ["18", "18.0", r"\$18", "$18", "18€", "18 dollars", r"18\text{ dollars}", r"\text{18 dollars}", "**18**", "`18`",
           r"\textbf{18}", r"\boxed{18}", r"\color{red}{18}", "１８", r"\(18\)", "18.", "+18", "(18)", r"18\ \mathrm{cm}^2",
           "18 cm²", "18 miles/hour", "18 red marbles", "18th", "18°", r"18^{\circ}", "about 18", "eighteen"],
    "-5": ["-5", "−5", "–5", "- 5", r"-\$5", "(-5)"],
    "70000": ["70,000", "70{,}000", r"70\,000", "70 000", "70~000", "70\u202f000", r"70,\!000", "7e4", "7.0E+4",
              r"7 \times 10^4", "7 × 10⁴", r"7 \cdot 10^{4}", "70 thousand", "70,000.00"],
    "7/2": ["3 1/2", "3½", "3 ½", r"3\frac12", r"3\ \frac{1}{2}", "7/2", r"\dfrac{7}{2}", "3.5", "3 1/2 cups"],
    "-7/2": ["-3 1/2", r"-\frac72", r"\frac{-7}{2}"],
    "1/3": ["⅓", r"0.\overline{3}", r"\frac 1 3", "1⁄3"],
    "1/1250": ["0.0008", "8e-4", r"8 \times 10^{-4}", "8 × 10⁻⁴"],
}  # fmt: skip


@pytest.mark.parametrize(("value", "written"), [(value, text) for value, texts in NUMBERS.items() for text in texts])
def test_numbers(value, written):
    assert undress(written).value == Fraction(value)


@pytest.mark.parametrize(
    "answer",
    [
        "12 or 13", r"\text{12 or 13}", "1,2", "1.234.567", "5 hours and 30 minutes", "12x", "3t", "12!", "12^2", r"12\pi",
        "12 squared", "3 halves", "not 12", "at least 12", "> 12", "x = 5 = 6", "5 if x > 0", "12:00", "2516_8", "1/0",
        r"\frac{1}{0}", "4 10/3", "12 less than x", r"(1,234)", "12 ft 5 in", "", " ",
    ],
)  # fmt: skip
def test_no_numbers(answer):
    assert undress(answer).value is None


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("√2", r"\sqrt{2}"), ("2√(x+1)", r"2\sqrt{x+1}"), ("x² − 1", "x^{2} - 1"), ("π/2", r"\pi /2"),
        ("14.0 + -1.0i", "14.0 - 1.0 i"), (r"\left( 3, 4 \right]", "( 3, 4 ]"), (r"3\sqrt{2} \text{ cm}", r"3\sqrt{2}"),
        (r"864 \mbox{ inches}^2", "864"), (r"\text{(C)}", "C"), (r"\text{even}", r"\text{even}"), ("2**3", "2^{3}"),
        (r"204_5", r"54 \varrho_{5}"), (r"204_{\text{five}}", r"54 \varrho_{5}"), ("204 (base 5)", r"54 \varrho_{5}"),
        ("204₁₀", "204"), (r"\log_2 8", r"\log_2 8"), ("x_2", "x_2"), ("29_8", "29_8"), (r"\cos 60^\circ", r"\cos(60\pi/180)"),
    ],
)  # fmt: skip
def test_texts(written, text):
    assert undress(written).text == text


@pytest.mark.parametrize(
    ("answer", "percent", "unit", "name"),
    [
        (r"28\%", True, "", ""), ("28 percent", True, "", ""), (r"28\text{ percent}", True, "", ""), ("5 cm", False, "cm", ""),
        ("x = 5 cm", False, "cm", "x"), (r"\text{Area} = 5", False, "", r"\text{Area}"), ("5m", False, "m", ""),
    ],
)  # fmt: skip
def test_percent_units_and_names(answer, percent, unit, name):
    undressed = undress(answer)
    assert (undressed.percent, undressed.unit, undressed.name) == (percent, unit, name)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("cm", "m", True), ("cm", "centimeters", False), ("cm^2", "square centimeters", False), ("cm^2", "cm", True),
        ("dollars", "cents", True), ("mph", "miles per hour", False), ("miles/hour", "km/h", True), ("eggs", "cm", False),
        ("hours", "minutes", True), ("", "cm", False),
    ],
)  # fmt: skip
def test_units_that_are_not_each_other(one, other, expected):
    assert units.conflict(one, other) is units.conflict(other, one) is expected


@given(
    st.fractions(), st.sampled_from([r"\frac{{{}}}{{{}}}", r"\dfrac{{{}}}{{{}}}", "{}/{}", "({}/{})", "**{}/{}** cm"])
)
def test_fractions_are_read_back(fraction, written):
    assert undress(written.format(fraction.numerator, fraction.denominator)).value == fraction


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=3))
def test_decimals_are_read_back(decimal):
    for written in (f"{decimal}", f"{decimal:,}", rf"\${decimal:,}", f"{decimal:,}".replace(",", "\u2009") + " km"):
        assert undress(written).value == Fraction(decimal)


PIECES = st.lists(
    st.sampled_from(
        [*"19 ,.$\\{}()[]^_%*√½²−/=xei٣", r"\text{", r"\frac{1}", "cm", " per ", "^2", "base 8", "_8", "e9", "or"]
    )
)


@given(PIECES.map("".join), PIECES.map("".join))
def test_any_text_is_read(one, other):
    a, b = undress(one), undress(other)
    assert units.conflict(a.unit, b.unit) is units.conflict(b.unit, a.unit)


@pytest.mark.parametrize(
    "piece", ["1", " ", "$", "~", "{", "1,000", "\\text{", "√(", "\\frac{1}", "x=", "½", "**", "\\text or"]
)
def test_time_is_bounded(piece):
    begin = time.perf_counter()
    undress((piece * 2000)[:2000])
    assert time.perf_counter() - begin < 1  # some hundredths of a second
