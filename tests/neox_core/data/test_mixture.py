"""The mixture: shares exact at any prefix, random access, no state."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from neox_core.data.mixture import PERIOD, Mixture, SequenceCounts
from neox_core.errors import DataError

LLEMMA = {"arxiv": 2, "open-web-math": 4, "algebraic-stack": 1, "pile-sample": 0.147368, "code": 0.221053}
RANDOM = {f"s{i}": float(weight) for i, weight in enumerate(np.random.default_rng(0).random(40) ** 4 + 1e-3)}
CASES = [LLEMMA, RANDOM, {"a": 1}, {"a": 1, "b": 1}, {"a": 0.998, "b": 0.001, "c": 0.001}, {"a": 3, "b": 0, "c": 4}]


@pytest.mark.parametrize("weights", CASES)
def test_every_prefix_is_within_one_of_the_exact_share(weights: dict[str, float]) -> None:
    mixture = Mixture(weights)
    total = 2 * PERIOD + 1000
    source_ids, _ = mixture.locate(np.arange(total))
    steps = np.arange(1, total + 1)
    for name, weight in weights.items():
        share = mixture.consumed(PERIOD)[name] / PERIOD
        assert abs(share - weight / sum(weights.values())) < 1 / PERIOD
        counts = np.cumsum(source_ids == mixture.names.index(name))
        assert np.abs(counts - steps * share).max() < 1


def test_shares_over_any_window() -> None:
    mixture = Mixture(LLEMMA)
    window = 1024
    source_ids, _ = mixture.locate(np.arange(20_000))
    for name, weight in LLEMMA.items():
        counts = np.cumsum(source_ids == mixture.names.index(name))
        in_windows = counts[window:] - counts[:-window]
        assert np.abs(in_windows - window * weight / sum(LLEMMA.values())).max() < 2.02


@pytest.mark.parametrize("weights", CASES)
def test_indices_within_a_source_count_up(weights: dict[str, float]) -> None:
    mixture = Mixture(weights)
    source_ids, within = mixture.locate(np.arange(3 * PERIOD // 2))
    for source_id in np.unique(source_ids):
        drawn = within[source_ids == source_id]
        assert np.array_equal(drawn, np.arange(len(drawn)))


def test_random_access_far_ahead_agrees_with_the_counts() -> None:
    mixture = Mixture(LLEMMA)
    for start in (0, 1, 65_535, 65_536, 65_537, 10**9 + 7, 10**12):
        before = mixture.consumed(start)
        assert sum(before.values()) == start
        source_ids, within = mixture.locate(np.array([start]))
        assert within[0] == before[mixture.names[source_ids[0]]]
        after = mixture.consumed(start + 1)
        assert {name for name in before if after[name] != before[name]} == {mixture.names[source_ids[0]]}


def test_counts_are_the_largest_remainders() -> None:
    total = sum(Fraction(str(weight)) for weight in LLEMMA.values())
    exact = {name: Fraction(str(weight)) / total * 65_536 for name, weight in LLEMMA.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: 65_536 - sum(counts.values())]:
        counts[name] += 1
    assert Mixture(LLEMMA).consumed(65_536) == counts


def test_order_of_the_weights_and_their_scale_do_not_matter() -> None:
    indices = np.arange(5000)
    one, other = Mixture(LLEMMA), Mixture({name: 10 * LLEMMA[name] for name in reversed(LLEMMA)})
    assert one.names == other.names
    assert np.array_equal(one.locate(indices)[0], other.locate(indices)[0])


def test_zero_weight_is_never_drawn_but_named() -> None:
    mixture = Mixture({"a": 3, "b": 0, "c": 4})
    assert mixture.names == ("a", "b", "c")
    assert mixture.consumed(10**6)["b"] == 0


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"a": 0.0}, "no source has a positive weight"),
        ({}, "no source has a positive weight"),
        ({"a": 1, "b": -1}, "'b' is -1"),
        ({"a": 1, "b": float("nan")}, "'b' is nan"),
        ({"a": 1, "b": float("inf")}, "'b' is inf"),
        ({"a": 1, "b": 1e-7}, "'b' is a share of 1e-07, below the smallest"),
    ],
)
def test_bad_weights(weights: dict[str, float], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Mixture(weights)


CHANGES = [
    (65_536 + 777, {"a": 1, "b": 5, "c": 0}),
    (65_536 + 778, {"a": 1, "b": 0, "c": 1}),
    (100_000, {"a": 0, "b": 0, "c": 3}),
    (200_000, {"a": 7, "b": 1, "c": 2}),
]


def test_changes_of_weights_lose_and_repeat_nothing() -> None:
    """Every source's sequences come once each and in order, across all changes; before one nothing is different."""
    plain, mixture = Mixture({"a": 3, "b": 0, "c": 4}), Mixture({"a": 3, "b": 0, "c": 4}, CHANGES)
    source_ids, within = mixture.locate(np.arange(300_000))
    for source_id in range(3):
        drawn = within[source_ids == source_id]
        assert np.array_equal(drawn, np.arange(len(drawn)))
    before = np.arange(CHANGES[0][0])
    assert np.array_equal(mixture.locate(before), plain.locate(before))
    assert mixture.drawn == ("a", "b", "c")
    assert plain.drawn == ("a", "c")
    # random access and counts agree with the walk through
    some = np.array([250_000, 5, 66_313, 66_312, 66_314, 99_999, 100_000, 199_999, 200_000])
    assert np.array_equal(mixture.locate(some), np.stack([source_ids[some], within[some]]))
    for end in [*some.tolist(), 0, 300_000]:
        counted = np.bincount(source_ids[:end], minlength=3).tolist()
        assert list(mixture.consumed(end).values()) == counted


def test_shares_after_a_change_are_exact_over_every_prefix() -> None:
    mixture = Mixture({"a": 3, "b": 0, "c": 4}, CHANGES)
    ends = [start for start, _ in CHANGES[1:]] + [300_000]
    for (start, weights), end in zip(CHANGES, ends, strict=True):
        source_ids, _ = mixture.locate(np.arange(start, end))
        steps = np.arange(1, end - start + 1)
        for name, weight in weights.items():
            counts = np.cumsum(source_ids == mixture.names.index(name))
            share = weight / sum(weights.values())
            assert np.abs(counts - steps * share).max() < 1 + (end - start) / PERIOD


def test_a_change_must_name_the_same_sources() -> None:
    with pytest.raises(DataError, match=r"given for \['a', 'c'\], but the mixture's sources are \['a', 'b'\]"):
        Mixture({"a": 1, "b": 1}, [(10, {"a": 1, "c": 1})])


EXACT = [
    {"large": 900_000, "tiny": 1, "small": 488, "none": 0, "middle": 123_457},
    {f"s{i}": int(count) for i, count in enumerate(np.random.default_rng(2).integers(0, 4000, 300))},
    {"a": 5, "b": 2},
    {"a": PERIOD, "b": PERIOD},
    {"a": 10**6 - 1, **{f"t{i}": 1 for i in range(40)}},
]


@pytest.mark.parametrize("counts", EXACT)
def test_counts_are_exact_and_spread_over_all_sequences(counts: dict[str, int]) -> None:
    mixture, total = Mixture(SequenceCounts(counts)), sum(counts.values())
    assert mixture.consumed(total) == counts
    assert mixture.consumed(3 * total) == {name: 3 * count for name, count in counts.items()}
    source_ids, within = mixture.locate(np.arange(total))
    steps = np.arange(1, total + 1)
    for name, count in counts.items():
        drawn = source_ids == mixture.names.index(name)
        assert np.array_equal(within[drawn], np.arange(count))
        assert np.abs(np.cumsum(drawn) - steps * (count / total)).max(initial=0) < 2
    # random access: the period after the first, and counts in the middle of a block
    some = np.random.default_rng(1).integers(0, total, 50)
    again, numbers = mixture.locate(some + total)
    assert np.array_equal(again, source_ids[some])
    assert np.array_equal(numbers, within[some] + [counts[mixture.names[source]] for source in again.tolist()])
    for end in some[:5].tolist():
        expected = np.bincount(source_ids[:end], minlength=len(counts)).tolist()
        assert list(mixture.consumed(end).values()) == expected
