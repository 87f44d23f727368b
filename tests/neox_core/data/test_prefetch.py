"""Reading ahead: the same items in the same order, bounded, with the source's errors, and no thread left behind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from neox_core.data.prefetch import Prefetcher


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_in_order_then_the_end() -> None:
    with Prefetcher(iter(range(50)), depth=3) as items:
        assert list(items) == list(range(50))
        assert list(items) == []
    assert threads() == []


def test_it_reads_ahead_and_no_further_than_its_depth() -> None:
    made: list[int] = []
    enough = threading.Semaphore(0)

    def source() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            enough.release()
            yield number

    with Prefetcher(source(), depth=3) as items:
        for _ in range(4):  # three in the queue and one in hand, without anyone asking
            assert enough.acquire(timeout=300)
        assert not enough.acquire(timeout=0.3)
        assert made == [0, 1, 2, 3]
        assert next(items) == 0
        assert enough.acquire(timeout=300)
        assert made == [0, 1, 2, 3, 4]
    assert threads() == []


def test_an_error_comes_where_its_item_would() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("disk gone")

    with Prefetcher(source()) as items:
        assert next(items) == 1
        for _ in range(2):  # asking again must not wait for ever
            with pytest.raises(ValueError, match="disk gone"):
                next(items)
    assert threads() == []


def test_leaving_early_ends_the_thread() -> None:
    def leave() -> None:
        with Prefetcher(itertools.count(), depth=1) as items:
            next(items)
            raise KeyError

    with pytest.raises(KeyError):
        leave()
    assert threads() == []
