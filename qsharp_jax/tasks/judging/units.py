r"""Units after a number: which words form one, and which two differ.

"18 dollars" answers 18, whatever the unit, but two known units must agree: "5 m" does not answer "5 cm".
"""

import re

__all__ = ["LETTERS", "conflict", "split", "unit"]

LETTERS = frozenset("mghslL")  # single letters that are a unit if the other answer is a plain number

_NAMES = {
    "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre", "m": "m meter metre",
    "km": "km kilometer kilometre", "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard",
    "mi": "mi mile", "ms": "ms millisecond", "s": "s sec second", "min": "min minute", "h": "h hr hour",
    "day": "day", "week": "wk week", "month": "month", "year": "yr year", "mg": "mg milligram", "g": "g gram gm",
    "kg": "kg kilogram", "oz": "oz ounce", "lb": "lb pound", "ton": "ton tonne", "ml": "ml mL milliliter millilitre",
    "l": "l L liter litre", "gal": "gal gallon", "dollar": "dollar USD usd", "cent": "cent", "euro": "euro EUR",
    "degree": "degree deg", "radian": "radian rad", "mph": "mph", "am": "am", "pm": "pm", "GB": "GB gigabyte",
    "MB": "MB megabyte",
}  # fmt: skip
_KNOWN = {alias: name for name, aliases in _NAMES.items() for alias in aliases.split()}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_ORDINALS = {"th", "st", "nd", "rd"}

# Next to these words a number is part of another number, or not the whole answer.
_NO_UNIT = frozenset(
    "and or not is are was be if when where for than then to but minus plus times over divided by mod modulo base half"
    " halves third thirds fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth"
    " tenths hundredth hundredths factorial hundred hundreds thousand thousands million millions billion billions"
    " trillion percent percentage pct infinity pi sqrt root sin cos tan cot csc log ln exp wrong incorrect most least"
    " unknown".split()
)  # fmt: skip
_MOST_WORDS = 7

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![A-Za-z])")
_QUOTIENT = re.compile(r"\\frac\s*\{((?:\\text\{)?[A-Za-z]+\}?)\}\s*\{((?:\\text\{)?[A-Za-z]+\}?)\}")
_POWER = re.compile(r"\s*\^\s*\{?\s*([23])\s*\}?")
_RAISED = re.compile(r"([A-Za-z]+)(?:\^([23]))?")
_WORDS = re.compile(r"[(/]? ?[A-Za-z][A-Za-z.'/()^23\s-]*")
_LAST_TEXT = re.compile(r"\\text\s*\{[^{}]*\}\s*(?:\^\s*\{?\s*[23]\s*\}?)?$|\^\s*\{?\s*\\circ\s*\}?$")
_LAST_WORDS = re.compile(r"(?<=[\s}])[A-Za-z]{2,}[A-Za-z/^{}23 ]*$")


def unit(rest: str) -> str | None:
    """Return the unit in `rest`, the text after a number, in plain words; "" without text, None if it is no unit."""
    if not rest.strip():
        return ""
    bare = not rest.lstrip().startswith(("\\text", "^", "\\degree"))
    words = _TEXT.sub(r" \1 ", _DEGREES.sub(" degrees ", _QUOTIENT.sub(r"\1/\2", rest)))
    words = _POWER.sub(r"^\1", words).replace("\\cdot", " ").strip()
    parts = re.findall("[A-Za-z]+", words)
    if not _WORDS.fullmatch(words) or len(parts) > _MOST_WORDS or parts[0].lower() in ("squared", "cubed"):
        return None
    if not _NO_UNIT.isdisjoint(part.lower() for part in parts):
        return None
    if bare and len(words) == 1:
        return words if words in LETTERS else None
    if bare and not _known(parts[0]) and parts[0] not in _ORDINALS and (not rest[0].isspace() or len(parts[0]) < 3):
        return None  # 5ab, 5 ab
    return " ".join(words.split())


def split(text: str) -> tuple[str, str]:
    r"""Split an expression from the unit after it, as in 3\sqrt{2} \text{ cm}; "" without a unit."""
    for pattern in (_LAST_TEXT, _LAST_WORDS):
        match = pattern.search(text)
        if match is None:
            continue
        body = text[: match.start()].rstrip()
        if re.search(r"[0-9A-Za-z}]", _TEXT.sub("", body)) and re.search(r"[\w)}\]]$", body):
            words = unit(" " + match[0])
            if words and (
                pattern is _LAST_TEXT
                or all(_known(part) or part in ("unit", "units") for part in re.findall("[A-Za-z]+", words))
            ):
                return body, words
    return text, ""


def conflict(first: str, second: str) -> bool:
    """Return true if both are known units and differ."""
    if not first or not second:
        return False
    a, b = _canonical(first), _canonical(second)
    return a is not None and b is not None and a != b


def _known(word: str) -> str | None:
    if word in _POWERS:
        return word
    return _KNOWN.get(word) or _KNOWN.get(word.lower()) or _KNOWN.get(word.lower().removesuffix("s"))


def _canonical(unit: str) -> tuple | None:
    """Return names and powers of its parts, ("mi", 1), ("h", 1) for miles per hour; None for unknown words."""
    parts = []
    for part in re.split(r"/|\bper\b|\ban?\b", unit.replace("mph", "miles per hour")):
        words = part.replace(".", "").split()
        power = next((_POWERS[word] for word in words if word in _POWERS), 1)
        names = [word for word in words if word not in _POWERS]
        if len(names) != 1:
            return None
        known = _RAISED.fullmatch(names[0])
        if not known or not _known(known[1]):
            return None
        parts.append((_known(known[1]), int(known[2] or power)))
    return tuple(parts)
