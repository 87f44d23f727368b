"""Which source each training sequence comes from: exact shares, random access, no state but a count.

Weights are rounded to counts over a period, each source's draws are spread over it, and the period repeats. Counts may
also be given, of any number of sequences: the period is all of those, and is laid out block by block. Where the weights
change, another pattern begins, and every source continues where it stopped.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from neox_core.errors import DataError

Indices = np.ndarray[Any, np.dtype[Any]]

PERIOD = 65_536
"""Sequences after which a pattern of weights repeats, and of a block of a longer pattern."""

_BLOCKS_KEPT = 4


@dataclass(frozen=True)
class SequenceCounts:
    """How many of the next sequences come from each source, exactly; all over again after those."""

    of: Mapping[str, int]


Shares = Mapping[str, float] | SequenceCounts
"""Weights, or counts."""


class Mixture:
    """A deterministic blend: after any number of sequences, each source is less than one from its share; with counts
    of more than PERIOD sequences, less than two."""

    def __init__(self, shares: Shares, changes: Sequence[tuple[int, Shares]] = ()) -> None:
        """Lay out the pattern. The order of the sources does not matter.

        Args:
            changes: first global sequence index and the shares that hold from there, in order; the same sources.

        Raises:
            DataError: no weight is positive, one is negative or not finite, or one is too small to be drawn.
        """
        self.names = tuple(sorted(shares.of if isinstance(shares, SequenceCounts) else shares))
        """All sources, those of weight 0 included; source ids index this tuple."""
        self._starts = np.array([0, *(start for start, _ in changes)], dtype=np.int64)
        assert (np.diff(self._starts) > 0).all(), f"changes are not in order: {self._starts}"
        self._patterns = [_Pattern(_counts(given, self.names)) for given in (shares, *(new for _, new in changes))]
        self._before = self._counts_at_starts()

    @property
    def drawn(self) -> tuple[str, ...]:
        """The sources that are drawn from, before or after a change."""
        counts = np.sum([pattern.counts for pattern in self._patterns], axis=0)
        return tuple(name for name, count in zip(self.names, counts, strict=True) if count)

    def locate(self, indices: Indices) -> tuple[Indices, Indices]:
        """For global sequence indices [n]: the source ids [n] and the indices within those sources [n], int64."""
        indices = np.asarray(indices, dtype=np.int64)
        source_ids, within = np.empty_like(indices), np.empty_like(indices)
        segments = np.searchsorted(self._starts, indices, side="right") - 1
        for segment in np.unique(segments):
            here = segments == segment
            sources, ranks = self._patterns[segment].locate(indices[here] - self._starts[segment])
            source_ids[here], within[here] = sources, self._before[segment][sources] + ranks
        return source_ids, within

    def consumed(self, sequences: int) -> dict[str, int]:
        """How many of the first `sequences` sequences come from each source."""
        segment = int(np.searchsorted(self._starts, sequences, side="right")) - 1
        counts = self._before[segment] + self._patterns[segment].count(sequences - int(self._starts[segment]))
        return {name: int(count) for name, count in zip(self.names, counts, strict=True)}

    def _counts_at_starts(self) -> list[Indices]:
        """What each segment finds taken of every source, [sources] each."""
        before = [np.zeros(len(self.names), dtype=np.int64)]
        for pattern, length in zip(self._patterns, np.diff(self._starts).tolist(), strict=False):
            before.append(before[-1] + pattern.count(length))
        return before


class _Pattern:
    """One mixture without changes."""

    def __init__(self, counts: Indices) -> None:
        self.counts = counts
        """Draws of each source in a period, [sources]."""
        self._period = int(counts.sum())
        self._before = _before_blocks(counts)
        self._block = lru_cache(_BLOCKS_KEPT)(self._laid_out)

    def locate(self, indices: Indices) -> tuple[Indices, Indices]:
        periods, offsets = np.divmod(indices, self._period)
        source_ids, within = np.empty_like(offsets), np.empty_like(offsets)
        blocks, places = np.divmod(offsets, PERIOD)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            sources, ranks = self._block(block)
            drawn = sources[places[here]]
            source_ids[here] = drawn
            within[here] = periods[here] * self.counts[drawn] + self._before[block][drawn] + ranks[places[here]]
        return source_ids, within

    def count(self, sequences: int) -> Indices:
        periods, rest = divmod(sequences, self._period)
        block, place = divmod(rest, PERIOD)
        drawn = self._block(block)[0][:place] if place else ()
        inside = np.bincount(np.asarray(drawn, dtype=np.int64), minlength=len(self.counts))
        return periods * self.counts + self._before[block] + inside

    def _laid_out(self, block: int) -> tuple[Indices, Indices]:
        """The source of each place of a block, and how often it was drawn earlier in the block."""
        sources = _lay_out(self._before[block + 1] - self._before[block])
        return sources, _ranks(sources)


def _before_blocks(counts: Indices) -> Indices:
    """Draws of each source before each block of PERIOD places, and at the end: int64 [blocks + 1, sources].

    Each block takes what brings every source nearest to its share, by largest remainder. No source gets more than its
    share rounded up, as a block only has to share out the fractions that are left; so all end with their counts.
    """
    total = int(counts.sum())
    before = [np.zeros(len(counts), dtype=np.int64)]
    for start in range(0, total, PERIOD):
        end = min(start + PERIOD, total)
        # In exact integers: shares of 10^9 sequences are not exact in floating point.
        whole, rest = zip(*(divmod(int(count) * end, total) for count in counts), strict=True)
        taken = np.maximum(np.array(whole) - before[-1], 0)
        missing = end - start - int(taken.sum())
        if missing >= 0:
            ahead = before[-1] > np.array(whole)  # rounded up before: the fraction is theirs already
            fractions = np.where(ahead, -1.0, np.array(rest, dtype=np.float64))
            taken[np.argsort(-fractions, kind="stable")[:missing]] += 1
        for _ in range(-missing):
            taken[taken.argmax()] -= 1
        before.append(before[-1] + taken)
    return np.array(before)


def _counts(given: Shares, names: Sequence[str]) -> Indices:
    """Draws of each source in a period, [names]."""
    known = given.of if isinstance(given, SequenceCounts) else given
    if set(known) != set(names):
        raise DataError(f"new weights are given for {sorted(known)}, but the mixture's sources are {list(names)}")
    if isinstance(given, SequenceCounts):
        return np.array([given.of[name] for name in names], dtype=np.int64)
    return _quantize({name: given[name] for name in names})


def _quantize(weights: Mapping[str, float]) -> Indices:
    """Counts that sum to PERIOD, by largest remainder, [weights]."""
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(f"weight of source {name!r} is {weight}: give a finite number, 0 or more")
    total = math.fsum(weights.values())
    if total <= 0:
        raise DataError(f"no source has a positive weight (sources: {', '.join(weights) or 'none'})")
    counts = largest_remainder(np.array([weight / total * PERIOD for weight in weights.values()]), PERIOD)
    for (name, weight), count in zip(weights.items(), counts, strict=True):
        if weight > 0 and count == 0:
            raise DataError(
                f"weight {weight:g} of source {name!r} is a share of {weight / total:.2g}, below the smallest, "
                f"1/{PERIOD}: raise it or set it to 0"
            )
    return counts


def largest_remainder(exact: Indices, total: int) -> Indices:
    """Whole numbers that sum to `total`, each less than one from `exact`, which does so too: int64 [n]."""
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


def _lay_out(counts: Indices) -> Indices:
    """The source of each of a block's places, [sum of the counts].

    With k sources, a sequence exists in which every prefix is within 1 - 1/(2k-2) of every exact share (Tijdeman 1980,
    "The chairman assignment problem"). That bound gives each draw a first and a last place; taking, place by place,
    the admitted draw whose last place comes first finds such a sequence, because it fails only if none exists.
    """
    total = int(counts.sum())
    active = np.flatnonzero(counts)
    scale = max(1, 2 * len(active) - 2)
    sources = np.repeat(active, counts[active])
    nth = np.concatenate([np.arange(counts[source]) for source in active])
    first = -(-(nth * scale + 1) * total // (scale * counts[sources]))
    last = ((nth + 1) * scale - 1) * total // (scale * counts[sources]) + 1
    by_first = np.argsort(first, kind="stable")
    waiting = list(zip(first[by_first].tolist(), last[by_first].tolist(), sources[by_first].tolist(), strict=True))
    waiting.reverse()
    admitted: list[tuple[int, int]] = []
    pattern = np.empty(total, dtype=np.int64)
    for place in range(1, total + 1):
        while waiting and waiting[-1][0] <= place:
            _, deadline, source = waiting.pop()
            heapq.heappush(admitted, (deadline, source))
        pattern[place - 1] = heapq.heappop(admitted)[1]
    return pattern


def _ranks(pattern: Indices) -> Indices:
    """How often each place's source was drawn earlier in the block, of the block's shape."""
    ranks = np.empty_like(pattern)
    for source in np.unique(pattern):
        places = np.flatnonzero(pattern == source)
        ranks[places] = np.arange(len(places))
    return ranks
