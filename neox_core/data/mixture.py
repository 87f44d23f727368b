"""Which source each training sequence comes from: exact shares, random access, no state but a count.

Shares are rounded to counts over a period, each source's draws are spread over it, and the period repeats. Where the
weights change, another pattern begins, and every source continues where it stopped.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neox_core.errors import DataError

Indices = np.ndarray[Any, np.dtype[Any]]

PERIOD = 65_536
"""Sequences after which a pattern repeats."""


class Mixture:
    """A deterministic blend: after any number of sequences, each source is less than one from its share."""

    def __init__(self, weights: Mapping[str, float], changes: Sequence[tuple[int, Mapping[str, float]]] = ()) -> None:
        """Lay out the pattern. The order of `weights` does not matter.

        Args:
            changes: first global sequence index and the weights that hold from there, in order; the same sources.

        Raises:
            DataError: no weight is positive, one is negative or not finite, or one is too small to be drawn.
        """
        self.names = tuple(sorted(weights))
        """All sources, those of weight 0 included; source ids index this tuple."""
        self._starts = np.array([0, *(start for start, _ in changes)], dtype=np.int64)
        assert (np.diff(self._starts) > 0).all(), f"changes are not in order: {self._starts}"
        self._patterns = [_Pattern(_quantize(given, self.names)) for given in (weights, *(new for _, new in changes))]
        self._before = self._counts_at_starts()

    @property
    def period(self) -> int:
        """Sequences after which a pattern repeats; a source's share is a multiple of 1/period."""
        return PERIOD

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
        self._sources = _lay_out(counts)
        self._ranks = _ranks(self._sources)

    def locate(self, indices: Indices) -> tuple[Indices, Indices]:
        periods, offsets = np.divmod(indices, PERIOD)
        source_ids = self._sources[offsets]
        return source_ids, periods * self.counts[source_ids] + self._ranks[offsets]

    def count(self, sequences: int) -> Indices:
        periods, rest = divmod(sequences, PERIOD)
        return periods * self.counts + np.bincount(self._sources[:rest], minlength=len(self.counts))


def _quantize(given: Mapping[str, float], names: Sequence[str]) -> Indices:
    """Counts that sum to PERIOD, by largest remainder, [names]."""
    if set(given) != set(names):
        raise DataError(f"new weights are given for {sorted(given)}, but the mixture's sources are {list(names)}")
    weights = {name: given[name] for name in names}
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(f"weight of source {name!r} is {weight}: give a finite number, 0 or more")
    total = math.fsum(weights.values())
    if total <= 0:
        raise DataError(f"no source has a positive weight (sources: {', '.join(weights) or 'none'})")
    exact = np.array([weight / total * PERIOD for weight in weights.values()])
    counts = np.floor(exact).astype(np.int64)
    missing = PERIOD - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    for (name, weight), count in zip(weights.items(), counts, strict=True):
        if weight > 0 and count == 0:
            raise DataError(
                f"weight {weight:g} of source {name!r} is a share of {weight / total:.2g}, below the smallest, "
                f"1/{PERIOD}: raise it or set it to 0"
            )
    return counts


def _lay_out(counts: Indices) -> Indices:
    """The source of each of the period's places, [PERIOD].

    With k sources, a sequence exists in which every prefix is within 1 - 1/(2k-2) of every exact share (Tijdeman 1980,
    "The chairman assignment problem"). That bound gives each draw a first and a last place; taking, place by place,
    the admitted draw whose last place comes first finds such a sequence, because it fails only if none exists.
    """
    active = np.flatnonzero(counts)
    scale = max(1, 2 * len(active) - 2)
    sources = np.repeat(active, counts[active])
    nth = np.concatenate([np.arange(counts[source]) for source in active])
    first = -(-(nth * scale + 1) * PERIOD // (scale * counts[sources]))
    last = ((nth + 1) * scale - 1) * PERIOD // (scale * counts[sources]) + 1
    by_first = np.argsort(first, kind="stable")
    waiting = list(zip(first[by_first].tolist(), last[by_first].tolist(), sources[by_first].tolist(), strict=True))
    waiting.reverse()
    admitted: list[tuple[int, int]] = []
    pattern = np.empty(PERIOD, dtype=np.int64)
    for place in range(1, PERIOD + 1):
        while waiting and waiting[-1][0] <= place:
            _, deadline, source = waiting.pop()
            heapq.heappush(admitted, (deadline, source))
        pattern[place - 1] = heapq.heappop(admitted)[1]
    return pattern


def _ranks(pattern: Indices) -> Indices:
    """How often each place's source was drawn earlier in the period, [PERIOD]."""
    ranks = np.empty_like(pattern)
    for source in np.unique(pattern):
        places = np.flatnonzero(pattern == source)
        ranks[places] = np.arange(len(places))
    return ranks
