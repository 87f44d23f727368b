"""Near-duplicates among the documents of many parts: MinHash signatures, and buckets of equal bands (LSH).

Two texts' similarity is the Jaccard index of their sets of 5 words in a row (Broder 1997, "On the resemblance and
containment of documents"). Signatures lie in files and are compared band by band, bucket by bucket, so that memory does
not grow with the number of documents; the index of a library would hold them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import rensa

from neox_core.data.tokenization.filters.words import words
from neox_core.data.tokenization.merge import Mask

PERMUTATIONS = 128
SIGNATURE_BYTES = 4 * PERMUTATIONS
_SHINGLE = 5
"""Words in a row."""
_SEED = 1
_FOUND = 0.99
"""Least chance that a pair at the threshold has a band in common."""
_BUCKET = 1 << 21
"""Documents whose bands are sorted at a time, some 60 bytes each."""
_PAIRS = 1 << 15
"""Pairs compared at a time, of a kilobyte each."""

Signatures = np.ndarray[Any, np.dtype[np.uint32]]
Numbers = np.ndarray[Any, np.dtype[Any]]
Load = Callable[[], Signatures]


def signature(text: str) -> bytes:
    """MinHash signature of a text, u32 [PERMUTATIONS]: the share of places at which two are equal is, on average, their
    texts' similarity. A text of fewer words than a shingle is one shingle; without words it is itself."""
    found = words(text)
    count = max(1, len(found) - _SHINGLE + 1)
    shingles = [" ".join(found[start : start + _SHINGLE]) for start in range(count)] if found else [text]
    minhash = rensa.RMinHash(PERMUTATIONS, _SEED)
    minhash.update(shingles)
    return np.array(minhash.digest(), dtype="<u4").tobytes()


def rows_of_band(threshold: float) -> int:
    """The most rows with which a pair at the threshold is found with the chance _FOUND: 1 - (1 - t^rows)^bands."""
    chances = ((rows, 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows)) for rows in range(1, PERMUTATIONS + 1))
    return max((rows for rows, chance in chances if chance >= _FOUND), default=1)


def find_near_duplicates(tables: Sequence[Load], threshold: float, references: int = 0) -> list[Mask]:
    """For each table, which of its documents are similar to an earlier one: of the same table or one before it.

    A pair at the threshold is found with a chance of 0.97; one well below it seldom is (half of those that are two
    standard deviations, 0.07 at 0.8, below it).

    Args:
        tables: load a table of signatures each, [documents, PERMUTATIONS]; they may be more than memory can hold.
        threshold: least similarity.
        references: so many of the first tables are what the others are compared with, and nothing else is.
    """
    lengths = [len(load()) for load in tables]
    starts = np.cumsum([0, *lengths])
    near = np.zeros(starts[-1], dtype=np.bool_)
    first_other = int(starts[references])
    slack = 2 * math.sqrt(threshold * (1 - threshold) / PERMUTATIONS)
    least = math.ceil((threshold - slack) * PERMUTATIONS)
    rows = rows_of_band(threshold)
    buckets = max(1, -(-len(near) // _BUCKET))
    for band in range(PERMUTATIONS // rows):
        for bucket in range(buckets):
            keys, numbers = _keys(tables, starts, slice(band * rows, (band + 1) * rows), bucket, buckets)
            for later, earlier in _pairs(keys, numbers, first_other):
                open_pairs = ~near[later]
                if references:
                    open_pairs &= (later >= first_other) & (earlier < first_other)
                later, earlier = later[open_pairs], earlier[open_pairs]
                for at in range(0, len(later), _PAIRS):
                    one, other = later[at : at + _PAIRS], earlier[at : at + _PAIRS]
                    equal = (_rows(tables, starts, one) == _rows(tables, starts, other)).sum(axis=1)
                    near[one[equal >= least]] = True
    return [near[start : start + length] for start, length in zip(starts[:-1].tolist(), lengths, strict=True)]


def _keys(tables: Sequence[Load], starts: Numbers, band: slice, bucket: int, buckets: int) -> tuple[Numbers, Numbers]:
    """A band's hash of the documents in a bucket, and their numbers, sorted by both."""
    found_keys, found_numbers = [], []
    for load, start in zip(tables, starts.tolist(), strict=False):
        keys = np.zeros(len(table := load()), dtype=np.uint64)
        for column in range(band.start, band.stop):
            keys ^= table[:, column]
            keys *= np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
        here = np.flatnonzero(keys % np.uint64(buckets) == bucket)
        found_keys.append(keys[here])
        found_numbers.append(here + start)
    keys, numbers = np.concatenate(found_keys), np.concatenate(found_numbers)
    order = keys.argsort(kind="stable")
    return keys[order], numbers[order]


def _pairs(keys: Numbers, numbers: Numbers, first_other: int) -> Iterator[tuple[Numbers, Numbers]]:
    """Documents with a band in common with an earlier one: with the first, and with the one before; or, if there are
    references, with the last of them."""
    begins = np.flatnonzero(np.diff(keys, prepend=keys[:1] + np.uint64(1)))
    sizes = np.diff(begins, append=len(keys))
    first = np.repeat(begins, sizes)
    later = np.flatnonzero(np.arange(len(keys)) != first)
    yield numbers[later], numbers[first[later]]
    before = later - 1
    if first_other:
        is_reference = numbers < first_other
        last = (
            first + np.repeat(np.add.reduceat(is_reference.astype(np.int64), begins), sizes) - 1
            if len(begins)
            else first
        )
        before = np.maximum(last, first)[later]
    yield numbers[later], numbers[before]


def _rows(tables: Sequence[Load], starts: Numbers, numbers: Numbers) -> Signatures:
    """Signatures of some documents, [numbers, PERMUTATIONS]."""
    output = np.empty((len(numbers), PERMUTATIONS), dtype=np.uint32)
    owners = np.searchsorted(starts, numbers, side="right") - 1
    for owner in np.unique(owners).tolist():
        here = owners == owner
        output[here] = tables[owner]()[numbers[here] - starts[owner]]
    return output
