"""The permutation: a bijection for every n, well mixed, and the same for ever."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from neox_core.data.permutation import hashes, permute, seed_of

SIZES = [*range(1, 70), 127, 128, 129, 1000, 4095, 4096, 4097, 65_535, 65_536, 65_537]


def permute_all(indices: Iterable[int], n: int, key: str) -> np.ndarray:
    return np.array([permute(int(index), n, key) for index in indices])


@pytest.mark.parametrize("n", SIZES)
def test_bijection(n: int) -> None:
    for key in ("a", "b"):
        assert np.array_equal(np.sort(permute_all(range(n), n, key)), np.arange(n))


@pytest.mark.parametrize("index", [-1, 10])
def test_index_outside(index: int) -> None:
    with pytest.raises(AssertionError, match=rf"{index} is not in range\(10\)"):
        permute(index, 10, "k")


def test_huge_range() -> None:
    n = 10**12 + 39
    values = permute_all(range(10_000), n, "k")
    assert len(np.unique(values)) == 10_000
    assert values.min() >= 0
    assert values.max() < n
    # uniform on [0, n): mean within 5 standard errors
    assert abs(values.mean() / n - 0.5) < 5 * np.sqrt(1 / 12 / 10_000)


@pytest.mark.parametrize("n", [1000, 4096, 50_001])
def test_well_mixed(n: int) -> None:
    """Neighbours, places and keys are uncorrelated, as for a random permutation (5 standard errors)."""
    order = np.arange(n)
    first, second = permute_all(order, n, "1234/arxiv/0"), permute_all(order, n, "1234/arxiv/1")
    limit = 5 / np.sqrt(n)
    for one, other in ((order, first), (first[:-1], first[1:]), (first, second), (first[:-7], first[7:])):
        assert abs(np.corrcoef(one, other)[0, 1]) < limit
    assert np.count_nonzero(first == order) < 10  # a random permutation has 1 fixed point on average
    assert np.count_nonzero(np.diff(first) == 1) < 10
    halves = np.count_nonzero(first[: n // 2] < n // 2)
    assert abs(halves - n / 4) < 5 * np.sqrt(n / 16)


def test_every_place_is_reached_alike_in_a_small_range() -> None:
    n, keys = 6, 6000
    reached = np.zeros((n, n))
    for key in range(keys):
        reached[np.arange(n), permute_all(range(n), n, str(key))] += 1
    assert np.abs(reached - keys / n).max() < 5 * np.sqrt(keys / n)


def test_order_is_fixed_for_ever() -> None:
    """A change here would change the data order of runs that resume."""
    assert permute_all(range(10), 10, "1234/arxiv/train/0").tolist() == [3, 9, 5, 0, 1, 7, 4, 2, 8, 6]
    far = permute_all([0, 1, 10**9], 10**12, "1234/arxiv/train/0")
    assert far.tolist() == [182696859999, 29303717528, 431267827115]


def test_hashes_are_splitmix64() -> None:
    """Against the outputs for seed 1234567 that implementations are compared by."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert hashes(4, 1234567).tolist() == expected
    assert hashes(2, 1234567).tolist() == expected[:2]
    assert hashes(2, 2**64 - 1).dtype == np.uint64


def test_sorted_hashes_reach_every_place_alike() -> None:
    n, keys = 6, 6000
    reached = np.zeros((n, n))
    for key in range(keys):
        reached[np.arange(n), hashes(n, seed_of(str(key))).argsort()] += 1
    assert np.abs(reached - keys / n).max() < 5 * np.sqrt(keys / n)


def test_seeds_are_fixed_for_ever() -> None:
    assert seed_of("1234/arxiv/train/0/shifts") == 3395865929996968139
