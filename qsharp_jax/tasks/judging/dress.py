r"""Normal form of an answer: one LaTeX spelling for Unicode signs, Markdown, layout, separators and units.

`undress` reads "**3½** cups" as the text 3\frac{1}{2} with the value 7/2 and the unit "cups". Equality is decided
elsewhere. Any 2,000 characters take a fraction of a second.
"""

import dataclasses
import re
import unicodedata
from fractions import Fraction

import qsharp_jax.tasks.judging.units as units

__all__ = ["Answer", "undress"]


@dataclasses.dataclass(frozen=True)
class Answer:
    r"""An answer in normal form."""

    text: str  # LaTeX, without units, percent signs and layout
    value: Fraction | None = None  # the answer's value, if it is written as a rational number; else None
    rounded: bool = False  # true for a decimal of six or more significant digits, which may be a rounded number
    percent: bool = False  # true if a percent sign follows
    unit: str = ""  # the words of its unit, "" without one; a bare letter, as in 5m, is in the text too
    name: str = ""  # the name it is assigned to, "x" in x = 5; "" without one


def undress(answer: str) -> Answer:
    """Return an answer in normal form."""
    if _PLAIN.fullmatch(answer):
        return Answer(answer, Fraction(answer))
    text, currency = _without_currency(_unicode(answer))
    text = _bases(_separators(_layout(text)))
    text, percent = _PERCENT.subn("", _TRAILING.sub("", text))
    text = _LEADING.sub("", text)
    if (word := _WORD.fullmatch(text)) and word[1].lower() in _WORDS:
        text = _WORDS[word[1].lower()]
    assigned = _ASSIGNED.fullmatch(text)
    name, content = (assigned["name"], assigned["content"]) if assigned else ("", text)
    bracketed = _BRACKETED.fullmatch(content)
    number = _NUMBER.match(bracketed[1] if bracketed else content)
    if number and (value := _value(number)) is not None:
        rest = number.string[number.end() :]
        unit = units.unit(rest)
        if unit is not None:
            shown = number.string if rest.strip() in units.LETTERS else number[0]
            spelled = f"{name} = {shown.strip()}" if name else shown.strip()
            name = re.sub(r"\s", "", name)
            return Answer(spelled, value, _rounded(number), bool(percent), unit or currency, name)
    text, unit = units.split(text)
    return Answer(text, percent=bool(percent), unit=unit or currency)


# --- Characters -----------------------------------------------------------------------------------------------------

_SIGNS = {
    **dict.fromkeys("−–—―‒‐‑﹣－", "-"), **dict.fromkeys("×✕⨯", r"\times "), **dict.fromkeys("·⋅∙•∗", r"\cdot "),
    **dict.fromkeys("÷∕⁄", "/"), **dict.fromkeys("°º˚", r"^\circ "), "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ",
    "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "∘": r"\circ ", "≈": r"\approx ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}",
    "⟨": "(", "⟩": ")", "∨": r"\lor ", "∧": r"\land ", "\N{ZERO WIDTH SPACE}": "", "\N{WORD JOINER}": "",
}  # fmt: skip
_GREEK = {
    letter: "\\" + (name.capitalize() if letter.isupper() else name) + " "
    for letter in "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ"
    for name in [unicodedata.name(letter).split()[-1].lower().replace("lamda", "lambda")]
}
_FRACTIONS = {
    character: rf"\frac{{{over}}}{{{under}}}"
    for character in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
    for over, under in [unicodedata.normalize("NFKC", character).split("\N{FRACTION SLASH}")]
}
_CHARACTERS = str.maketrans(_SIGNS | _GREEK | _FRACTIONS)
_SUPERSCRIPTS, _SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉"
_ROOT = re.compile(
    r"([√∛∜]|(?<![A-Za-z])\\?sqrt(?=\s*\()|(?<![A-Za-z\\])sqrt(?=\s*\d))\s*"
    r"(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+(?:\.[0-9]+)?|\\[A-Za-z]+|[A-Za-z]))"
)
_ROOTS = {"∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}


def _unicode(text: str) -> str:
    text = re.sub(f"[{_SUPERSCRIPTS}]+", lambda run: f"^{{{unicodedata.normalize('NFKC', run[0])}}}", text)
    text = re.sub(f"[{_SUBSCRIPTS}]+", lambda run: f"_{{{unicodedata.normalize('NFKC', run[0])}}}", text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    return _ROOT.sub(lambda root: f"{_ROOTS.get(root[1], chr(92) + 'sqrt')}{{{root[2] or root[3] or root[4]}}}", text)


# --- Layout ---------------------------------------------------------------------------------------------------------

_CURRENCIES = re.compile(
    r"(?<![A-Za-z\\])(?:US\s*\\?\$|USD|EUR|Rs\.?)(?![A-Za-z])|\\?\$|[€£¥₹₩¢]|\\(?:euro|pounds|texteuro)(?![A-Za-z])"
)
_UNITS_OF_CURRENCIES = {"€": "euro", "¢": "cent", "EUR": "euro", r"\euro": "euro", r"\texteuro": "euro"}

_REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!\\)\\[()\[\]]", ""),  # \( and \[ around it
        (r"(?<![\w)}*])(\*\*|__)(?=\S)(.+?)(?<=\S)\1(?![\w({*])", r"\2"),  # Markdown
        (r"^\s*([*_`])([^*_`]+)\1\s*$", r"\2"),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?", ""),
        (r"\{\s*\\(?:rm|bf|it)(?![A-Za-z])\s*([^{}]*)\}", r"\\text{\1}"),
        (r"\\(?:displaystyle|textstyle|scriptstyle|limits|small|large|Large|LARGE|huge|Huge)(?![A-Za-z])", ""),
        (r"\\!\s*", ""),
        (r"\s*\{\s*,\s*\}\s*", ","),
        (r"(?<!\\)\\[,;:> ]|\\(?:quad|qquad|thinspace|enspace|space)(?![A-Za-z])|\\hspace\{[^{}]*\}", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\\frac\s*(\{[^{}]*\})\s+\{", r"\\frac\1{"),
        (r"\\(?:textbf|textit|textrm|textnormal|textsf|texttt|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox|hbox|emph)(?=\s*\{)",
         r"\\text"),
        (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
        (r"\\(?:boxed|fbox|framebox|underline|ensuremath)\s*\{([^{}]*)\}", r"\1"),
        (r"\\text\s*\{\s*(percent|per\s?cent|percentage|pct|\\?%)\s*\}", r"\\%"),
        (r"\\text\s*\{([^{}A-Za-z]*(?![mghslL])[A-Za-z]?[^{}A-Za-z]*|[^{}]*[0-9][^{}]*)\}", r"\1"),  # no words in it
        (r"\*\*\s*(-?\d+)", r"^{\1}"),
        (r"(?:\\text\s*\{)?\s*(?<![A-Za-z\\])infinity(?![A-Za-z])\s*\}?", r"\\infty "),
        (r'["“”]', ""),
        (r"(?<![A-Za-z])(?:negative|minus)\s+(?=[\d.\\])", "-"),
        (r"(?<![A-Za-z\\])(sin|cos|tan|cot|csc|ln)(?=\s*[(\^0-9]|\s+[a-z]\b)", r"\\\1"),
        (r"([)\]])\s*U\s*(?=[(\[])", r"\1 \\cup "),
        (r"^\s*\\\{\s*[A-Za-z](?:\s*\\in\s*\\mathbb\{R\})?\s*(?:\\mid(?![A-Za-z])|:|\|)(.+)\\\}\s*$", r"\1"),
        (r"\^\s*\{?\s*(?:\\text\s*\{\s*)?(st|nd|rd|th)\s*\}*", r"\\text{\1}"),
        (r"^\s*\(?\s*([A-Za-z])\s*\)\s*$", r"\1"),  # a choice
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"(?:\\text\s*\{)?\s*\ball real numbers\b\s*\}?", r"\\mathbb{R}"),
        (r"^\s*(?:\\text\s*\{)?\s*[Nn]o solutions?\s*\}?\s*$|\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\overline\s*\{\s*([A-Z]{2})\s*\}", r"\1"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"\\(sin|cos|tan|cot|sec|csc)\s*\(?\s*(\d+)\s*\^\s*\{?\s*\\circ\s*\}?\s*\)?", r"\\\1(\2\\pi/180)"),
        (r"\\(?:lor|vee)(?![A-Za-z])", r"\\text{ or }"),
        (r"^([^=<>A-Za-z]+)=\s*([A-Za-z])$", r"\2 = \1"),  # 5 = x
        (r"\+\s*-", "- "),
        (r"(?<=[0-9}.])i(?![A-Za-z])", " i"),  # else it is taken for a real number
        (r"(?<![A-Za-z\\0-9.^_{])(\d+\.?\d*|\.\d+)[eE]([-+]?\d{1,4})(?![\w.])", r"\1 \\times 10^{\2}"),
        (r"\^\{\+", "^{"),
    ]
]  # fmt: skip
_REWRITTEN_WITHOUT_COMMANDS = [rewrite for rewrite in _REWRITTEN if not rewrite[0].pattern.startswith("\\\\")]
_REPEATING = re.compile(r"(?<![\w.])(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}")
_MIXED = re.compile(r"(?<![\w/.}^\\])(\d+) +(\d+) ?/ ?(\d+)(?![\w/.])")

_PERCENT = re.compile(r"\s*(?:\\?%|(?<![A-Za-z])(?:percent(?:age(?: points?)?)?|per cent|pct)(?![A-Za-z]))\s*$")
_TRAILING = re.compile(r"(?:[\s.,;:]|\\\\)+$")
_LEADING = re.compile(
    r"^\s*(?:(?:\\text\s*\{)?\s*(?:about|approximately|approx\.|around|roughly|exactly|(?:the )?(?:final )?answer"
    r"(?: is|:))(?![A-Za-z])\s*\}?|\\text\s*\{[A-Za-z ]+:\s*\}|=|\\approx(?![A-Za-z])|\\sim(?![A-Za-z]))?\s*",
    re.IGNORECASE,
)
_WORDS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
        " seventeen eighteen nineteen twenty".split()
    )
}
_WORD = re.compile(r"(?:\\text\s*\{)?\s*([A-Za-z]+)\s*\}?")
_ASSIGNED = re.compile(
    r"(?P<name>\\?[A-Za-z]+(?:_\{?\w+\}?)?'*(?:\([\w,\s]*\))?|\\text\s*\{[^{}]*\}|[A-Za-z][A-Za-z ]*)\s*"
    r"(?:=|\\approx(?![A-Za-z])|(?<=[A-Za-z}]{2}):)\s*(?P<content>[^=<>]+)"
)
_BRACKETED = re.compile(r"\s*[({]([^(){}]*)[)}]\s*")


def _without_currency(text: str) -> tuple[str, str]:
    """Return the text without currency signs, and the currency's unit; $ signs in pairs enclose mathematics."""
    sign = _CURRENCIES.search(text)
    if not sign or (sign[0] == "$" and text.count("$") % 2 == 0):
        return _CURRENCIES.sub(" ", text), ""
    return _CURRENCIES.sub(" ", text), _UNITS_OF_CURRENCIES.get(sign[0], "dollar" if "$" in sign[0] else "")


def _layout(text: str) -> str:
    text = " ".join(text.replace("~", " ").split())
    for pattern, replacement in _REWRITTEN if "\\" in text else _REWRITTEN_WITHOUT_COMMANDS:
        text = pattern.sub(replacement, text)
    text = _REPEATING.sub(_repeated, " ".join(text.split()))
    return _MIXED.sub(_mixed, text)


def _mixed(number: re.Match) -> str:
    """Return 3 1/2 as 3\\frac{1}{2}; 4 10/3 is not a mixed number."""
    whole, over, under = number.groups()
    return rf"{whole}\frac{{{over}}}{{{under}}}" if int(over) < int(under) else number[0]


def _repeated(decimal: re.Match) -> str:
    r"""Return a repeating decimal, 0.1\overline{6}, as a fraction."""
    whole, once, again = decimal.groups()
    over = int(whole + once + again) - int(whole + once or 0)
    return rf"\frac{{{over}}}{{{(10 ** len(again) - 1) * 10 ** len(once)}}}"


# --- Numbers --------------------------------------------------------------------------------------------------------

_THOUSANDS = re.compile(r"(?<![\w.,])\d{1,3}(?:(?:,\d{2})*(?:,\d{3})+(?!,?\d)|(?: \d{3})+(?! ?[\d/]))")
_BASED = re.compile(
    r"(?<![A-Za-z0-9\\])\(?(\d[0-9A-Z]*(?: \d{3,4})*|[A-F]+)\)?\s*"
    r"(?:_\s*(?:\\text)?\{?\s*\(?|\(?\s*(?:\\text\s*\{\s*\(?)?\s*(?:in )?base\s*\}?\s*_?\{?)"
    r"\s*(?:\\text\s*\{)?(?:\s*base\s*\}?)?(\d+|two|three|four|five|six|seven|eight|nine|ten|twelve|sixteen)(?![\w])\s*\)?\}*\)?"
)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
          "twelve": 12, "sixteen": 16}  # fmt: skip
_PLAIN = re.compile("-?[0-9]{1,100}")
_NUMBER = re.compile(
    r"\s*(?P<sign>[-+]?)\s*(?:"
    r"(?P<whole>\d+)?\s*\\frac\{\s*(?P<minus>-?)\s*(?P<over>\d+)\s*\}\{\s*(?P<under>\d+)\s*\}"
    r"|(?P<decimal>\d+(?:\.\d*)?|\.\d+)"
    r"(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*\{?\s*(?P<power>[-+]?\d{1,4})\s*\}?|\s*/\s*(?P<divisor>\d+))?"
    r"(?P<scale>\s+(?:hundred|thousand|million|billion|trillion)(?![A-Za-z]))?"
    r")(?![\d.])"
)
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ENOUGH = 6  # significant digits of a decimal that may be rounded


def _separators(text: str) -> str:
    """Remove separators between thousands, unless brackets make a comma part of a list."""
    if re.search(r"[(\[]|\\\{", text):
        return text
    return _THOUSANDS.sub(lambda number: re.sub("[ ,]", "", number[0]), text)


def _bases(text: str) -> str:
    r"""Write a number in a base other than ten as its value times a symbol of its base: 204_5 as 54 \varrho_{5}."""

    def valued(number: re.Match) -> str:
        base = _BASES.get(number[2]) or int(number[2])
        try:
            value = int(number[1].replace(" ", ""), base)
        except ValueError:  # a digit that the base does not have
            return number[0]
        return str(value) if base == 10 else rf"{value} \varrho_{{{base}}}"

    return _BASED.sub(valued, text)


def _value(number: re.Match) -> Fraction | None:
    sign = -1 if number["sign"] == "-" else 1
    if number["under"]:
        under = int(number["under"])
        part = Fraction(int(number["minus"] + number["over"]), under) if under else None
        if part is None or (number["whole"] and not 0 < part < 1):
            return None
        return sign * (int(number["whole"] or 0) + part)
    value = Fraction(number["decimal"]) * Fraction(10) ** int(number["power"] or 0)
    if number["divisor"]:
        return sign * value / int(number["divisor"]) if int(number["divisor"]) else None
    return sign * value * _SCALES.get((number["scale"] or "").strip(), 1)


def _rounded(number: re.Match) -> bool:
    """Return true for a decimal with enough digits, not all zeros after the point."""
    whole, point, decimals = (number["decimal"] or "").partition(".")
    return bool(point and decimals.strip("0") and len((whole + decimals).lstrip("0")) >= _ENOUGH)
