"""Verdicts against a hand-written table, against math-verify, on GSM8K's gold answers, and on hostile answers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from neox_core.evaluation.answers.extract import extract_answer
from neox_core.evaluation.answers.judge import Judge, Verdict
from tests.neox_core.evaluation.answers.pairs import Pair, answer_pairs
from tests.paths import SHARED

GSM8K = SHARED / "data" / "eval" / "gsm8k_test.jsonl"
MATH_VERIFY_ERRS = {
    # It knows no repeating decimals, no mixed numbers without LaTeX, no root sign.
    (r"\frac{1}{3}", r"0.\overline{3}"), (r"\frac{1}{7}", r"0.\overline{142857}"), (r"0.1\overline{6}", r"\frac{1}{6}"),
    ("3 1/2", "3.5"), ("√2", r"\sqrt{2}"),
    # It rounds to six digits, and so takes 3.14159265358979 for pi, but not Avogadro's number in two notations.
    ("3.14159265358979", r"\pi"), (r"6.02 \times 10^{23}", "602000000000000000000000"),
    # Complex values in two forms differ to it.
    (r"\sqrt{-4}", "2i"), (r"e^{i\pi}", "-1"), ("(1+i)^2", "2i"),
    # A unit that it does not know, and plus-minus within a fraction.
    ("16 years old", "16"), (r"\frac{-1\pm\sqrt{5}}{2}", r"\frac{-1+\sqrt{5}}{2},\frac{-1-\sqrt{5}}{2}"),
    # A number's base is read as an index and dropped.
    ("101_2", "101"), ("2516_8", "2516_7"),
    # It knows no thousands that blanks part, no 1e3, no raised digits or fractions of one character, no \\bar.
    (r"1\,000\,000", "1000000"), (r"12\,345", "12345"), ("5 000", "5000"), ("1 000 000", "1,000,000"),
    ("1e3", "1000"), ("1.5e-3", "0.0015"), ("4.5e33", r"4.5 \times 10^{33}"), ("5×10²", "500"), ("x²", "x^2"),
    ("½", "0.5"), ("2½", "2.5"), ("1⁄2", "0.5"), (r"0.\bar{3}", "1/3"),
    # A root is the principal one, which is complex; lg, and the two signs of the empty set, differ to it.
    (r"\sqrt[3]{-8}", "-2"), (r"\lg 100", "2"), (r"\operatorname{arccos}(0)", r"\pi/2"), (r"\emptyset", r"\varnothing"),
    # A name on the right, capitals that are names, brackets of a displayed formula.
    ("3=x", "3"), ("AB", "Ab"), (r"\[5\]", "5"),
    # As a gold answer an interval equals no inequality, only the other way round.
    (r"(-\infty,3)", "x<3"), (r"(-\infty,3]", r"x \le 3"), (r"(-\infty,3]", r"x \leq 3"), (r"[3,\infty)", r"x \ge 3"),
    (r"(3,\infty)", "x > 3"), (r"(3,\infty)", "3 < x"), ("(2,5]", r"2 < x \le 5"), ("(2,5]", r"5 \ge x > 2"),
    # To it any words that are set as text go, also where they change the number, and so do indices.
    (r"5\text{ million}", "5"), (r"T_\text{h}", r"T_\text{c}"), (r"V_{\mathrm{m}}", r"V_{\mathrm{s}}"),
    (r"5 \text{ or more}", "5"), (r"2 \text{ thirds}", "2"), (r"3 \text{ squared}", "3"), (r"A^{\mathrm{T}}", "A"),
    (r"2 \text{ pi}", "2"), (r"3 \text{ and a half}", "3"),
    (r"x \text{ apples}", "x"), (r"3\text{ billion}", r"3\text{ million}"),
    # No words for powers of ten, no millionth of a unit, no stop within a text, no mixed number of percent.
    (r"33\frac{1}{3}\%", r"33\frac13"), (r"\$1.5 million", "1500000"), (r"\text{Evelyn}", r"\text{Evelyn.}"),
    (r"\text{\$}5", "5"), (r"6 \frac{2}{5}\%", "6.4"), (r"40\,\mu\text{m}", "40"),
    (r"2 \times 10^6", r"2 \text{ million}"), (r"7\text{ thousand}", "7000"),
    # Inequalities and intervals, the rest of those; a column, and angle brackets, are no tuple, but a set is one.
    (r"(-\infty, 0] \cup [2, \infty)", r"x \le 0 \text{ or } x \ge 2"), ("[-2, 7)", r"-2 \leq x < 7"),
    (r"\left( -\frac{1}{2}, \infty \right)", "x > -0.5"), (r"(-\infty, 2) \cup (2, \infty)", r"x \ne 2"),
    (r"\begin{pmatrix} -7 \\ 16 \\ 5 \end{pmatrix}", "(-7,16,5)"), (r"\langle 1, -2, 3 \rangle", "(1,-2,3)"),
    (r"\{2,4\}", "(2,4)"), (r"\{x \mid x > 3\}", r"(3,\infty)"),
    (r"(-\infty, -3] \cup [3, \infty)", r"x \le -3, x \ge 3"),
    (r"x < -1 \text{ or } x > 1", r"(-\infty,-1)\cup(1,\infty)"),
    (r"(-\infty,-1)\cup(1,\infty)", r"(-\infty,-1),(1,\infty)"),
    # Values and functions in two forms.
    (r"1.6 \times 10^{-19} \text{ C}", "1.6e-19"),
    (r"\frac{3 \pm i\sqrt{7}}{4}", r"\frac{3}{4} \pm \frac{\sqrt{7}}{4}i"), (r"\frac{1}{1+i}", r"\frac{1-i}{2}"),
    (r"e^{i\pi/2}", "i"), (r"5\operatorname{cis} 0", "5"), ("|3+4i|", "5"), (r"\sin(2t)", r"2 \sin t \cos t"),
    ("4.8e14", r"4.8 \times 10^{14}"), (r"y(t) = e^{-t}\cos(2t)", r"e^{-t}\cos 2t"), (r"\omega_0 t", r"t\omega_{0}"),
    (r"\frac{dy}{dx} = 2x", "2x"), ("I(0) = 3", "3"), (r"1+i\sqrt{3}", r"2e^{i\pi/3}"),
    (r"\operatorname{arctan}(2)", r"\tan^{-1}(2)"), (r"6.67 \cdot 10^{-11}", "6.67e-11"),
    (r"\frac{3}{7}", "0.428571"), (r"0.\overline{27}", r"\frac{3}{11}"), (r"2\operatorname{cis}\pi", "-2"),
}  # fmt: skip
"""Pairs on which math-verify 0.9.0 differs from the table; in each, the table is right."""


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge() as judge:
        yield judge


def test_the_table(judge: Judge) -> None:
    pairs = answer_pairs()
    assert len(pairs) >= 200
    wrong = [pair for pair in pairs if judge.verdict(pair.gold, pair.given).correct != pair.equal]
    assert wrong == []


def test_the_table_both_ways(judge: Judge) -> None:
    wrong = [pair for pair in answer_pairs() if judge.verdict(pair.given, pair.gold).correct != pair.equal]
    assert wrong == []


def math_verify(pair: Pair) -> bool:
    math_verify = pytest.importorskip("math_verify", reason="math-verify comes with the dev extra")
    gold, given = (math_verify.parse(f"${text.strip('$')}$", parsing_timeout=None) for text in (pair.gold, pair.given))
    return bool(math_verify.verify(gold, given, timeout_seconds=None))


def test_math_verify_agrees_but_for_what_is_listed() -> None:
    differing = {(pair.gold, pair.given) for pair in answer_pairs() if math_verify(pair) != pair.equal}
    assert differing == MATH_VERIFY_ERRS


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K is not at hand")
def test_gsm8k_gold_answers(judge: Judge) -> None:
    items = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    for item, other in zip(items, [*items[1:], items[0]], strict=True):
        found = extract_answer(item["solution"])
        assert found is not None
        assert judge.verdict(item["answer"], found).correct, item["id"]
        expected = math_verify(Pair("", item["answer"], other["answer"], True))
        assert judge.verdict(item["answer"], other["answer"]).correct == expected, item["id"]


HOSTILE = [
    "9" * 1_000_000,
    "9" * 900,
    "9^{9^{9^{9}}}",
    "(((9^{999})^{999})^{999})",
    "2^{10^{18}}",
    "10^{-10^{9}}",
    "(" * 900,
    "(" * 400 + "1" + ")" * 400,
    "-" * 990 + "1",
    "1" + "!" * 900,
    "99999!",
    r"\binom{10^9}{10^8}",
    r"\sqrt{" * 150 + "2" + "}" * 150,
    "1+" * 499,
    "(x+1)^{9999}-(x+2)^{9999}",
    "(a+b+c+d+e+f+g+h)^{60}=0",
    r"\sin^{5000}(\tan(\tan(\tan(x))))",
    r"\begin{pmatrix}" + "1&" * 450 + r"1\end{pmatrix}",
    "{1," * 300,
    r"\pm" * 300,
    "\x00\ud800",
    r"\frac" * 190,
    "x_" * 400,
    r"__import__('os').system('true')",
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_answers_are_wrong_and_the_judge_goes_on(judge: Judge, number: int) -> None:
    assert not judge.verdict("(x+1)^2", HOSTILE[number]).correct
    assert judge.verdict("(x+1)^2", "x^2+2x+1") == Verdict(True, "symbolic")


def test_the_right_side_of_an_equation_is_not_always_the_answer(judge: Judge) -> None:
    assert not judge.verdict("5x-7y+11z+4=0", "0").correct
    assert judge.verdict("0", "x+y=0").correct
    assert judge.verdict("I(0)=0", "0").correct


def test_equations_are_not_multiplied_out(judge: Judge) -> None:
    assert judge.verdict("(x-759)^{759}+y^{759}=1", "2y^{759}=2-2(x-759)^{759}") == Verdict(True, "symbolic")
    assert judge.verdict("(x-759)^{759}+y^{759}=1", "y^{759}=2-(x-759)^{759}") == Verdict(False, "different")
    assert not judge.verdict("x+y=1", "2(x+1)=2x+2").correct


def test_a_stuck_process_is_replaced() -> None:
    with Judge(wall_seconds=1e-3) as hasty:
        assert hasty.verdict("(x+1)^{900}", "(x+2)^{900}-1") == Verdict(False, "time limit")
    with Judge(cpu_seconds=1e-4) as hasty:
        assert hasty.verdict("(x+1)^{90}", "(x+2)^{90}-1").reason == "time limit"
        assert hasty.verdict("7", "7").correct


def test_a_process_that_cannot_be_started_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise OSError("no memory for another process")

    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", refuse)
    with pytest.raises(OSError, match="no memory for another process"), Judge() as judge:
        judge.verdict("1/2", "0.5")


def test_majority(judge: Judge) -> None:
    assert judge.majority(["1/2", None, "3", "0.5", "4", "3", r"\frac12"]) == "1/2"
    assert judge.majority(["2", "3", "3", "2"]) == "2"
    assert judge.majority([None, " "]) is None
