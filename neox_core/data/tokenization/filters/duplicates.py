"""Exact duplicates among the documents of many parts, found by hash in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from neox_core.data.tokenization.merge import Mask

DOCUMENT = np.dtype([("hash_high", "<u8"), ("hash_low", "<u8"), ("bytes", "<u8"), ("line", "<u8")])
"""What is kept of each document of a part, apart from its ids."""
_BUCKET = 1 << 21
"""Documents compared at a time, some 100 bytes each."""

DocumentTable = np.ndarray[Any, np.dtype[np.void]]
Numbers = np.ndarray[Any, np.dtype[Any]]


def text_hash(text: str) -> tuple[int, int]:
    """128 bits of BLAKE2b of the text: among 10^9 texts two that differ share it with a chance of 10^-21."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def find_duplicates(tables: Sequence[Callable[[], DocumentTable]], references: int = 0) -> list[Mask]:
    """For each table, which of its documents equal an earlier one: of the same table or one before it.

    Args:
        tables: load a table each, once per bucket: all of them may be more than memory, or a process's files, can hold.
        references: so many of the first tables are what the others are compared with, and nothing else is.
    """
    found = [np.zeros(len(load()), dtype=np.bool_) for load in tables]
    buckets = max(1, -(-sum(map(len, found)) // _BUCKET))
    for bucket in range(buckets):
        rows, highs, lows = zip(*(_in_bucket(load(), bucket, buckets) for load in tables), strict=True)
        ends = np.cumsum([len(here) for here in rows])
        first = _first_equal(np.concatenate(highs), np.concatenate(lows))
        again = first < np.arange(len(first))
        if references:
            others = ends[references - 1]
            again = (np.arange(len(first)) >= others) & (first < others)
        for mask, here, end in zip(found, rows, ends, strict=True):
            mask[here] = again[end - len(here) : end]
    return found


def _first_equal(high: Numbers, low: Numbers) -> Numbers:
    """For each hash, the place of the first one that equals it."""
    order = np.lexsort((low, high))  # stable: of equal texts the first in order stays first
    repeated = np.concatenate([[False], (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)])[: len(order)]
    begins = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(order))))
    first = np.empty_like(order)
    first[order] = order[begins]
    return first


def _in_bucket(table: DocumentTable, bucket: int, buckets: int) -> tuple[Numbers, Numbers, Numbers]:
    """Rows of the documents that are compared in this bucket, and the halves of their hashes."""
    rows = np.flatnonzero(table["hash_high"] % buckets == bucket)
    return rows, table["hash_high"][rows], table["hash_low"][rows]
