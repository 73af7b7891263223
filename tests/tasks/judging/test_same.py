r"""Which answers are the same, by the whole way from a box to the verdict: right ones in every dress, and wrong ones."""

import json

import pytest
from small_data import REAL

from qsharp_jax.tasks import registry
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.judging import Judge

CASES = REAL.parent / "cases"

# Gold answers with right and wrong ones.
ANSWERS = {
    # Numbers that are written exactly.
    r"\frac{1}{2^{60}}": ([r"2^{-60}"], [r"\frac{1}{2^{61}}", "0"]),
    r"\frac{1}{2004!}": ([r"\frac{2005}{2005!}"], [r"\frac{1}{2006!}"]),
    "e^{-50}": [[r"\frac{1}{e^{50}}"], ["e^{-60}", "0"]],
    "2^{100}": ([str(2**100)], ["2^{100}+1", str(2**100 + 1)]),
    r"\sqrt{2}": ([r"\frac{2}{\sqrt{2}}", "√2", "2^{0.5}"], [r"\sqrt{2}+10^{-30}", "1.414", "2"]),
    r"\sqrt{2}+\sqrt{3}": ([r"\sqrt{5+2\sqrt{6}}"], [r"\sqrt{5+2\sqrt{7}}"]),
    r"\frac{x}{2^{60}}": ([r"2^{-60}x"], [r"\frac{x}{2^{61}}"]),
    r"\begin{pmatrix} 10^{-20} \\ 1 \end{pmatrix}": ([r"\begin{pmatrix}1e-20\\1.0\end{pmatrix}"], [r"\begin{pmatrix}0\\1\end{pmatrix}"]),
    "0": (["0.0", "-0"], ["10^{-20}", "e^{-100}", "2x+4=0"]),
    # Decimals.
    r"\frac{1}{3}": (["0.333333", "0.33333333333", "⅓", r"0.\overline{3}"], ["0.333", "0.3333", "0.34"]),
    r"\frac{1}{6}": (["0.166667"], ["0.1667"]),
    "1": (["1.0", r"0.\overline{9}"], ["0.9999999", "1.0000000000000001"]),
    "12345.67": (["12345.670"], ["12345.68"]),
    "0.1": (["10^{-1}"], ["0.1000001"]),
    r"\pi": (["3.14159265", "π"], ["3.14", r"\frac{22}{7}"]),
    # Bases.
    "2516_8": (["2516_{8}", "2516₈", r"2516_{\text{eight}}", "(2516)_8"], ["2516", "2516_7", "1358"]),
    "10": (["10_{10}"], ["10_2", "1010_2"]),
    # Dress.
    "18": (["18 dollars", r"\$18.00", "18 eggs", r"18\text{ m}^2", "**18**", "x = 18", r"\text{Total} = 18", "18%", "18 m"],
           ["18 or 19", "18x", "18!", "1800", "x = 17 = 18", "0.18", "x > 18", "9 + 8 = 18", r"\pm 18"]),
    "70000": (["70 000", r"70\,000", "70{,}000", "7e4", "7 × 10⁴"], ["70.000", "70"]),
    r"\frac{7}{2}": (["3 1/2", "3½", r"3\frac12", "3.5"], [r"3 \cdot \frac12", "3 and 1/2"]),
    "-5": (["−5", "–5"], ["5"]),
    r"5.4 \text{ cents}": (["5.4", r"5.4\text{ cents}"], [r"5.4 \text{ dollars}", r"\$5.40"]),
    r"15\mbox{ cm}^2": (["15", r"15 \text{ square centimeters}"], [r"15 \text{ cm}"]),
    "3t": (["t \\cdot 3"], ["3"]),
    # Percent.
    r"28\%": (["28", "28 percent"], ["0.28", r"\frac{7}{25}"]),
    "0.28": ([r"28\%", r"\frac{7}{25}"], ["28", r"0.28\%"]),
    # Complex numbers.
    "14-i": (["14.0 + -1.0i", r"14 - \mathrm{i}"], ["14+i", "14"]),
    "2i": (["(1+i)^2"], ["2"]),
    # Intervals and inequalities.
    r"(-\infty, 3)": (["x < 3", "3 > x", r"x \in (-∞, 3)", r"-\infty < x < 3"], [r"x \le 3", "x > 3"]),
    "[-2,7]": ([r"-2 \le x \le 7", "7 ≥ x ≥ -2"], [r"-2 < x \le 7", "(-2,7)", "-2,7,8"]),
    r"(-\infty,2)\cup(3,\infty)": ([r"x<2 \text{ or } x>3", "(3,∞) ∪ (-∞,2)"], ["x<2", r"x<2 \text{ and } x>3"]),
    "1<x<3": (["3>x>1", "(1,3)"], [r"1 \le x \le 3"]),
    # Sets, tuples and lists.
    "(1,2)": (["(1, 2.0)", "1,2"], [r"\{1,2\}", "(2,1)", "[1,2]"]),
    r"\{1,2\}": ([r"\{2,1\}", "2,1"], ["(1,2)", "[1,2]", r"\{1,2,3\}", "1"]),
    "1,2": (["2,1", "1 and 2", "[1, 2]", r"x = 1 \text{ or } x = 2"], ["1", "12", "1.2", "1,2,3"]),
    r"1 \pm \sqrt{19}": ([r"1-\sqrt{19}, 1+\sqrt{19}"], [r"1+\sqrt{19}"]),
    # Equations.
    "y = 2x+3": (["2x+3", "y=3+2x"], ["y = 2x-3"]),
    "x=5": (["5", "x = 2+3 = 5"], ["y=5", "x=5=6=5"]),
    # Words and choices.
    r"\text{even}": (["even", "Even", r"\textbf{even}"], ["odd", "not even"]),
    r"\text{Evelyn}": (["Evelyn"], ["Angela"]),
    "2125": (["2,125"], ["-2125"]),
    "p - q": (["p-q"], ["p+q"]),
    r"\text{(C)}": (["C", "(C)", "C.", r"\textbf{(C)}\ 12"], ["D", "(D) C"]),
    "12:00": (["12:00"], ["1:00"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def judge():
    judge = Judge(registry.get("math"), workers=2)
    yield judge
    judge.close()


def test_answers(judge):
    pairs = [
        (gold, answer, verdict)
        for gold, groups in ANSWERS.items()
        for verdict, answers in zip((1.0, 0.0), groups, strict=True)
        for answer in [*answers, *[gold] * int(verdict)]
    ]
    judgements = judge([Problem("p", "", gold) for gold, _, _ in pairs], [rf"\boxed{{{a}}}" for _, a, _ in pairs])
    assert [pair for pair, judgement in zip(pairs, judgements, strict=True) if judgement.reward != pair[2]] == []


@pytest.mark.parametrize(
    ("response", "gold", "reward"),
    [
        (r"The roots are $\boxed{2}$ and $\boxed{3}$.", "2,3", 1.0),
        (r"The roots are $\boxed{2}$ and $\boxed{3}$.", r"\{3, 2\}", 1.0),
        (r"The roots are $\boxed{2}$ and $\boxed{3}$.", "3", 0.0),
        (r"\boxed{2}. Wait, that is wrong. It is \boxed{3}.", "3", 1.0),
        (r"\boxed{2}. Wait, that is wrong. It is \boxed{3}.", "2", 0.0),
        (r"\boxed{2}. Wait, that is wrong. It is \boxed{3}.", "2,3", 0.0),
        (r"$\boxed{5}$, $\boxed{204}$", "5204", 0.0),
    ],
)
def test_several_boxes(judge, response, gold, reward):
    (judgement,) = judge([Problem("p", "", gold)], [response])
    assert judgement.reward == reward


@pytest.mark.skipif(not CASES.is_dir(), reason=f"there are no shared cases in {CASES}")
def test_the_shared_cases(judge):
    rows, wrong = 0, []
    for name in ("judge_math", "judge_gsm8k", "several_boxes"):
        task = registry.get("gsm8k" if name == "judge_gsm8k" else "math")
        lines = (CASES / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        cases = [json.loads(line) for line in lines if line]
        problems = [Problem("p", "", task.gold(case["answer"])) for case in cases]
        judgements = judge(problems, [case["response"] for case in cases])
        rows += len(cases)
        wrong += [case for case, judgement in zip(cases, judgements, strict=True) if judgement.reward != case["right"]]
    print(f"{rows - len(wrong)} of {rows} shared cases judged as labeled; not so: {wrong}")
    assert len(wrong) <= rows * 6 // 154
