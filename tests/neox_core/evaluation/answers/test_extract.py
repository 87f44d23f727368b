"""The final answer of a sample."""

from __future__ import annotations

import time

import pytest

from neox_core.evaluation.answers.extract import SEARCHED_CHARACTERS, extract_answer


@pytest.mark.parametrize(
    ("sample", "answer"),
    [
        ("So it is.\nFinal Answer: The final answer is $5$. I hope it is correct.", "$5$"),
        ("Final Answer: The final answer is $\\boxed{5.}$. I hope it is correct.", "5"),
        ("Final Answer: The final answer is $1$. I hope it is correct.\nProblem: \\boxed{2}", "$1$"),
        (r"Thus \boxed{1} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"Thus \fbox{3} and \boxed{never closed", "3"),
        ("She has 3+4=7.\n#### 7", "7"),
        ("The answer is 1,234.", "1,234"),
        ("the answer is: 3.50.\n\nQ: next", "3.50"),
        ("The answer is 18. Therefore she makes 18.", "18"),
        ("The answer is not 5. The answer is 6.", "6"),
        ("Final answer is  . I hope it is correct. The answer is 5.", "5"),
        ("Nothing of the kind, 12 of them", None),
        ("", None),
        ("{" * 10_000, None),
        (r"\boxed{" * 3_000, None),
    ],
)
def test_answers(sample: str, answer: str | None) -> None:
    assert extract_answer(sample) == answer


def test_the_last_number() -> None:
    assert extract_answer("He has 3 or 4, so $1,250.", last_number=True) == "$1,250"
    assert extract_answer("none", last_number=True) is None


@pytest.mark.parametrize(
    ("sample", "answer"),
    [
        ("The answer is 12 apples.", "12"),
        ("The answer is $1,250.50 per day.", "$1,250.50"),
        ("The answer is **18**.", "18"),
        ("#### -5 degrees", "-5"),
        ("The answer is clear. He has 12.", "12"),
        ("#### 3/4", "3/4"),
        ("The answer is 5 million.", "5 million"),
        ("The answer is 3 + 4 = 7.", "3 + 4 = 7"),
        ("The answer is - 5", "- 5"),
        ("The answer is 2x.", "2x"),
        ("It costs $.50", "$.50"),
    ],
)
def test_a_number_among_words(sample: str, answer: str) -> None:
    assert extract_answer(sample, last_number=True) == answer


@pytest.mark.parametrize("filling", [" ", ".", "\n", ". ", "final answer is ", "\t."])
def test_long_fillings_take_no_time(filling: str) -> None:
    started = time.process_time()
    extract_answer("The final answer is " + filling * (SEARCHED_CHARACTERS // len(filling)), last_number=True)
    assert time.process_time() - started < 1.0


def test_only_the_end_is_read() -> None:
    assert extract_answer("#### 7\n" + "x" * SEARCHED_CHARACTERS) is None
