"""The table of answers and verdicts, and what is known of math-verify's."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """A gold answer, a given one, and whether they are equal."""

    kind: str
    gold: str
    given: str
    equal: bool


def answer_pairs() -> list[Pair]:
    """The hand-written table."""
    with (Path(__file__).parent / "answer_pairs.tsv").open(encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [Pair(row["kind"], row["gold"], row["given"], row["equal"] == "1") for row in rows]
