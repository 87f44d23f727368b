"""How long 10,000 answers take to score, and the hostile ones.

    python -m benchmarks.judge_answers [--answers 10000]

Answers are those of the table of pairs, each once as it stands and then with other numbers, so that no verdict is
remembered; a tenth are as hostile as tests/neox_core/evaluation/answers/test_judge.py has them, each in a variant of
its own. They are read out of samples first, as an evaluation does. One judge: one process apart from this one.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator

from neox_core.evaluation.answers.extract import extract_answer
from neox_core.evaluation.answers.judge import Judge
from tests.neox_core.evaluation.answers.pairs import answer_pairs
from tests.neox_core.evaluation.answers.test_judge import HOSTILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--hostile-share", type=float, default=0.1)
    asked = parser.parse_args()
    pairs = list(answers(asked.answers, asked.hostile_share))
    started, times, reasons = time.monotonic(), [], Counter[str]()
    with Judge() as judge:
        for gold, sample in pairs:
            begun = time.monotonic()
            reasons[judge.verdict(gold, extract_answer(sample)).reason] += 1
            times.append((time.monotonic() - begun, sample[:60]))
    seconds = time.monotonic() - started
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, judging = (usage.ru_utime + usage.ru_stime for usage in used)
    sys.stdout.write(
        f"CPU time: {own:.1f} s here with start and imports, {judging:.1f} s in the processes that compare\n"
    )
    sys.stdout.write(
        f"{len(pairs):,} answers in {seconds:.1f} s, {len(pairs) / seconds:,.0f} a second; {dict(reasons)}\n"
    )
    for spent, sample in sorted(times[1:], reverse=True)[:5]:
        sys.stdout.write(f"  slowest: {spent:.3f} s  {sample!r}\n")


def answers(count: int, hostile_share: float) -> Iterator[tuple[str, str]]:
    """Gold answers, and samples that hold the given ones."""
    draw, table = random.Random(0), answer_pairs()
    for number in range(count):
        pair = table[number % len(table)]
        gold, given = pair.gold, pair.given
        if draw.random() < hostile_share:
            given = f"{draw.choice(HOSTILE)}+{number}"
        elif number >= len(table):
            shift = draw.randint(1, 900)
            gold, given = shifted(gold, shift), shifted(given, shift)
        yield gold, f"So it is.\nFinal Answer: The final answer is {given}. I hope it is correct."


def shifted(text: str, shift: int) -> str:
    """The text with other numbers in it."""
    return re.sub(r"\d+", lambda found: str(int(found[0]) + shift), text)


if __name__ == "__main__":
    main()
