"""Script that compares pairs of answers with `math_verify`; `pool.py` runs it in processes, and nothing imports it.

    python worker.py SECONDS BYTES

It writes "ready" once it has started, or the error that prevents it. For each line with two answers, the gold one
first, as a JSON list, it writes "1" or "0". SECONDS of processor time on one line end the process; BYTES limit its
address space. Windows has neither limit and macOS only the first; there `pool.py`'s limit on wall time ends a worker.

`math_verify` parses, and compares sets, intervals, equations and matrices part by part. Numbers, which it compares with
an absolute tolerance, are compared here (`equal`).
"""

import functools
import itertools
import json
import os
import re
import signal
import sys

try:
    import resource
except ImportError:  # Windows, where neither memory nor processor time can be limited
    resource = None  # type: ignore[assignment]

seconds, memory = float(sys.argv[1]), int(sys.argv[2])
replies = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # so that what a library prints is not taken for a reply
try:
    import math_verify
    import sympy
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import grader
except BaseException as error:
    replies.write(f"{type(error).__name__}: {error}".replace("\n", " ") + "\n")
    raise

RELATIVE = 5e-6  # largest error of rounding to six significant digits
SIGNIFICANT = 6  # digits from which a decimal is taken for a rounded number
DIGITS = (100, 1000)  # precisions at which the difference of two exact numbers is computed before it counts as zero

# Only answers that parse as a whole count (otherwise the last number of any text does); no letters are cut as units.
LATEX = math_verify.LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    ),
)
INEQUALITIES = (sympy.StrictGreaterThan, sympy.GreaterThan, sympy.StrictLessThan, sympy.LessThan, sympy.Unequality)
OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])")
DOTS = re.compile(r"\\[lc]?dots|\.\.\.")


# --- Numbers --------------------------------------------------------------------------------------------------------


def equal(a: sympy.Basic, b: sympy.Basic, float_rounding: int = 6, numeric_precision: int = 15) -> bool:
    """Compare two numbers, expressions or matrices: exactly, or within `RELATIVE` if they contain decimals.

    It replaces `math_verify`'s `sympy_numeric_eq`, for which all numbers below 1e-16 are equal, and has its arguments.
    `math_verify` then simplifies expressions that are not equal here.
    """
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return (
            isinstance(a, sympy.MatrixBase)
            and isinstance(b, sympy.MatrixBase)
            and a.shape == b.shape
            and all(
                grader.sympy_expr_eq(x, y, float_rounding, numeric_precision)
                for x, y in zip(a.flat(), b.flat(), strict=True)
            )
        )
    x, y = exact(a), exact(b)
    if x.free_symbols or y.free_symbols or not (x.is_number and y.is_number):
        return x == y or sympy.expand(x - y) == 0
    difference = x - y
    zero = difference == 0 if difference.is_Rational else vanishes(difference)
    if zero or not (a.has(sympy.Float) or b.has(sympy.Float)):
        return zero
    gap, size = (value if value.is_Rational else value.evalf(20) for value in (abs(difference), abs(x)))
    return bool(gap <= RELATIVE * size) and bool(gap < last_place(a, b))


def exact(expression: sympy.Basic) -> sympy.Basic:
    """Evaluate an expression, with each decimal as the fraction that it is written as."""
    floats = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    return expression.xreplace(floats).doit()


def vanishes(number: sympy.Expr) -> bool:
    """Return true if a number is zero to all `DIGITS`, or by algebra."""
    for digits in DIGITS:
        value = number.evalf(10, maxn=digits)
        if value == 0:
            return True
        parts = value.atoms(sympy.Float)
        if not parts or any(part._prec > 1 for part in parts):
            return False  # a digit is certain
        if sympy.simplify(number) == 0:
            return True
    return True


def last_place(*numbers: sympy.Basic) -> sympy.Number:
    """Return the largest difference from a rounded decimal: a unit in the last place of the shorter one.

    Zero for decimals of few digits, which are exact; infinity if decimals are only parts of expressions.
    """
    decimals = [sympy.Rational(str(number)) for number in numbers if isinstance(number, sympy.Float)]
    if not decimals:
        return sympy.oo
    scales = [next(10**place for place in itertools.count() if 10**place % decimal.q == 0) for decimal in decimals]
    rounded = [
        scale for decimal, scale in zip(decimals, scales, strict=True) if len(str(abs(decimal) * scale)) >= SIGNIFICANT
    ]
    return sympy.Rational(1, min(rounded)) if rounded else sympy.Integer(0)


# --- Answers --------------------------------------------------------------------------------------------------------


@functools.lru_cache(64)  # the samples of a problem have one gold answer
def parse(answer: str) -> list:
    """Parse an answer to its expression, if any, and its text, both of which `math_verify` compares."""
    if re.fullmatch("-?[0-9]{1,100}", answer):  # the parser's result, in a hundredth of the time
        return [sympy.Integer(answer), answer]
    parsed = math_verify.parse(rf"\boxed{{{answer}}}", [LATEX], parsing_timeout=None)
    if parsed and not isinstance(parsed[0], str):
        parsed[0] = normalize_inequalities(parsed[0], answer)
        if contradicts_itself(parsed[0]):
            return []
        parsed[0] = with_i(parsed[0])
    return parsed


def with_i(parsed: sympy.Basic) -> sympy.Basic:
    """Replace the symbol i, as which the imaginary unit is parsed."""
    if isinstance(parsed, sympy.Eq):
        return sympy.Eq(*map(with_i, parsed.args), evaluate=False)
    if isinstance(parsed, sympy.Expr | sympy.MatrixBase):
        return parsed.xreplace({sympy.Symbol("i", real=False): sympy.I})
    return parsed


def normalize_inequalities(parsed: sympy.Basic, answer: str) -> sympy.Basic:
    """Turn 3 > x > 1 into 1 < x < 3, and a list of inequalities in one symbol into a set: where all hold, or any."""
    if isinstance(parsed, grader.And) and all(isinstance(part, INEQUALITIES) for part in parsed.args):
        ascending = [part.reversed if isinstance(part, INEQUALITIES[:2]) else part for part in parsed._unsorted_args]
        return grader.And(*sorted(ascending, key=sympy.default_sort_key))
    if not isinstance(parsed, sympy.FiniteSet) or len(parsed.free_symbols) != 1:
        return parsed
    parts = [part.args if isinstance(part, grader.And) else (part,) for part in parsed.args]
    if not all(isinstance(part, INEQUALITIES) for part in itertools.chain(*parts)):
        return parsed
    sets = [part.as_set() for part in parsed.args]
    return sympy.Union(*sets) if OR.search(answer) else sympy.Intersection(*sets)


def contradicts_itself(parsed: sympy.Basic) -> bool:
    """Return true if a chain of equations equates different numbers, like x = 5 = 6."""
    if not grader.is_equation(parsed):
        return False
    equations = parsed.args if isinstance(parsed, grader.And) else (parsed,)
    numbers = [side for equation in equations for side in equation.args if getattr(side, "is_number", False)]
    return any(not equal(left, right) for left, right in itertools.pairwise(numbers))


def is_unsolved(parsed: list) -> bool:
    """Return true for an equation like 2x + 4 = 0, whose right side is not an answer."""
    if not parsed or not isinstance(parsed[0], sympy.Eq) or parsed[0].rhs != 0:
        return False
    return bool(parsed[0].lhs.free_symbols) and not parsed[0].lhs.atoms(sympy.Number) <= {sympy.S.NegativeOne}


def brackets(answer: str) -> str:
    r"""Return the signs that enclose the whole answer, like "()" or "[)", with ⦃⦄ for \{ \}; "" if none do."""
    text = answer.replace(r"\{", "⦃").replace(r"\}", "⦄")
    if not text or text[0] not in "([⦃" or text[-1] not in ")]⦄":
        return ""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([⦃") - (character in ")]⦄")
        if depth == 0:
            return text[0] + text[-1] if place == len(text) - 1 else ""
    return ""


def unbracketed(answer: str) -> str:
    r"""Strip parentheses around other brackets: (\{1, 2\})."""
    inside = answer[1:-1].strip()
    return inside if brackets(answer) == "()" and brackets(inside) else answer


def same(gold: str, answer: str) -> bool:
    try:
        gold, answer = unbracketed(gold), unbracketed(answer)
        of_gold, of_answer = brackets(gold), brackets(answer)
        if "⦃" in of_gold + of_answer and of_gold and of_answer and of_gold != of_answer:
            return False  # a set is no pair
        if bool(DOTS.search(gold)) != bool(DOTS.search(answer)):
            return False
        if not of_gold and of_answer in ("()", "[]") and "," in gold and not re.search(r"[(\[<>=]|\\[{lg]", gold):
            answer = answer[1:-1]  # a list, which has no brackets in the gold answer
        expected, parsed = parse(gold), parse(answer)
        if is_unsolved(parsed) and not (expected and grader.is_relation(expected[0])):
            return False
        return math_verify.verify(expected, parsed, timeout_seconds=None, allow_set_relation_comp=True)
    except (Exception, MemoryError):  # from parsers and algebra, on text that may not be mathematics
        return False


grader.sympy_numeric_eq = equal
same("1", "2")  # loads what is loaded at first use
if resource and sys.platform != "darwin":  # macOS refuses to limit addresses
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
# The timer's signal ends a process, in the middle of a long product too.
limit = functools.partial(signal.setitimer, signal.ITIMER_PROF) if hasattr(signal, "setitimer") else lambda _: None
replies.write("ready\n")
for line in sys.stdin:
    limit(seconds)
    verdict = same(*json.loads(line))
    limit(0)
    replies.write(f"{verdict:d}\n")
