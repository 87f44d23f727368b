"""Near-duplicates: planted pairs of known similarity are found, others are not, whatever the memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from neox_core.data.tokenization.filters import near_duplicates
from neox_core.data.tokenization.filters.near_duplicates import (
    PERMUTATIONS,
    Signatures,
    find_near_duplicates,
    rows_of_band,
    signature,
)


def table(texts: list[str]) -> Signatures:
    return np.frombuffer(b"".join(map(signature, texts)), dtype="<u4").reshape(len(texts), PERMUTATIONS)


def loads(*parts: list[str]) -> list[Callable[[], Signatures]]:
    return [partial(table, part) for part in parts]


def jaccard(first: str, second: str) -> float:
    """By definition."""
    sets = []
    for text in (first, second):
        found = text.split()
        sets.append({tuple(found[start : start + 5]) for start in range(len(found) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def planted(rng: random.Random, similarity: float, size: int = 400) -> tuple[str, str]:
    """Two texts of that similarity: the second has another end."""
    first = [f"w{rng.randrange(50_000)}" for _ in range(size)]
    shared = round(2 * similarity * (size - 4) / (1 + similarity)) + 4
    return " ".join(first), " ".join(first[:shared] + [f"v{rng.randrange(50_000)}" for _ in range(size - shared)])


def share_found(similarity: float, threshold: float = 0.8, pairs: int = 400) -> float:
    rng = random.Random(round(1000 * similarity))
    made = [planted(rng, similarity) for _ in range(pairs)]
    assert np.mean([jaccard(*pair) for pair in made]) == pytest.approx(similarity, abs=0.005)
    first, second = find_near_duplicates(loads(*map(list, zip(*made, strict=True))), threshold)
    assert not first.any()
    return float(second.mean())


def test_recall_of_planted_pairs() -> None:
    """At the threshold and above it; and few of those well below it."""
    assert share_found(0.8) >= 0.95
    assert share_found(0.9) == 1.0
    assert share_found(0.6) < 0.05
    assert share_found(0.3) == 0.0


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_recall_at_other_thresholds(threshold: float) -> None:
    assert share_found(threshold, threshold) >= 0.95
    rows = rows_of_band(threshold)
    assert 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.99


@pytest.mark.parametrize("bucket", [1 << 21, 3])
def test_the_first_in_order_is_kept(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_BUCKET", bucket)
    rng = random.Random(4)
    (a, like_a), (b, like_b), (c, _) = (planted(rng, 0.95) for _ in range(3))
    found = find_near_duplicates(loads([a, b], [], [c, like_b, a], [like_a]), 0.8)
    assert [mask.tolist() for mask in found] == [[False, False], [], [False, True, True], [True]]


@pytest.mark.parametrize("bucket", [1 << 21, 3])
def test_with_references_only_their_likes_are_found(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_BUCKET", bucket)
    rng = random.Random(5)
    (a, like_a), (b, like_b), (c, like_c) = (planted(rng, 0.95) for _ in range(3))
    found = find_near_duplicates(loads([a, a], [b], [c, like_b], [like_c, like_a]), 0.8, references=2)
    assert [mask.tolist() for mask in found] == [[False, False], [False], [False, True], [False, True]]


def test_texts_without_many_words() -> None:
    texts = ["", "?!", "...", "one two", "One, two.", "one two three", "one two"]
    (found,) = find_near_duplicates(loads(texts), 0.8)
    assert found.tolist() == [False, False, False, False, True, False, True]
    (nothing,) = find_near_duplicates(loads([]), 0.8)
    assert len(nothing) == 0
