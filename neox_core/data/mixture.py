"""Which source each training sequence comes from: exact shares, random access, no state but a count.

Shares are rounded to counts over a period, each source's draws are spread over it, and the period repeats.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from neox_core.errors import DataError

Indices = np.ndarray[Any, np.dtype[Any]]

_PERIOD = 65_536


class Mixture:
    """A deterministic blend: after any number of sequences, each source is less than one from its share."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Lay out the period. The order of `weights` does not matter.

        Raises:
            DataError: no weight is positive, one is negative or not finite, or one is too small to be drawn.
        """
        self.names = tuple(sorted(weights))
        """All sources, those of weight 0 included; source ids index this tuple."""
        self._counts = _quantize({name: weights[name] for name in self.names})
        self._pattern = _lay_out(self._counts)
        self._ranks = _ranks(self._pattern)

    @property
    def period(self) -> int:
        """Sequences after which the pattern repeats; a source's share is a multiple of 1/period."""
        return _PERIOD

    def locate(self, indices: Indices) -> tuple[Indices, Indices]:
        """For global sequence indices [n]: the source ids [n] and the indices within those sources [n], int64."""
        periods, offsets = np.divmod(np.asarray(indices, dtype=np.int64), _PERIOD)
        source_ids = self._pattern[offsets]
        return source_ids, periods * self._counts[source_ids] + self._ranks[offsets]

    def consumed(self, sequences: int) -> dict[str, int]:
        """How many of the first `sequences` sequences come from each source."""
        periods, rest = divmod(sequences, _PERIOD)
        counts = periods * self._counts + np.bincount(self._pattern[:rest], minlength=len(self.names))
        return {name: int(count) for name, count in zip(self.names, counts, strict=True)}


def _quantize(weights: Mapping[str, float]) -> Indices:
    """Counts that sum to _PERIOD, by largest remainder."""
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(f"weight of source {name!r} is {weight}: give a finite number, 0 or more")
    total = math.fsum(weights.values())
    if total <= 0:
        raise DataError(f"no source has a positive weight (sources: {', '.join(weights) or 'none'})")
    exact = np.array([weight / total * _PERIOD for weight in weights.values()])
    counts = np.floor(exact).astype(np.int64)
    missing = _PERIOD - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    for (name, weight), count in zip(weights.items(), counts, strict=True):
        if weight > 0 and count == 0:
            raise DataError(
                f"weight {weight:g} of source {name!r} is a share of {weight / total:.2g}, below the smallest, "
                f"1/{_PERIOD}: raise it or set it to 0"
            )
    return counts


def _lay_out(counts: Indices) -> Indices:
    """The source of each of the period's places, [_PERIOD].

    With k sources, a sequence exists in which every prefix is within 1 - 1/(2k-2) of every exact share (Tijdeman 1980,
    "The chairman assignment problem"). That bound gives each draw a first and a last place; taking, place by place,
    the admitted draw whose last place comes first finds such a sequence, because it fails only if none exists.
    """
    active = np.flatnonzero(counts)
    scale = max(1, 2 * len(active) - 2)
    sources = np.repeat(active, counts[active])
    nth = np.concatenate([np.arange(counts[source]) for source in active])
    first = -(-(nth * scale + 1) * _PERIOD // (scale * counts[sources]))
    last = ((nth + 1) * scale - 1) * _PERIOD // (scale * counts[sources]) + 1
    by_first = np.argsort(first, kind="stable")
    waiting = list(zip(first[by_first].tolist(), last[by_first].tolist(), sources[by_first].tolist(), strict=True))
    waiting.reverse()
    admitted: list[tuple[int, int]] = []
    pattern = np.empty(_PERIOD, dtype=np.int64)
    for place in range(1, _PERIOD + 1):
        while waiting and waiting[-1][0] <= place:
            _, deadline, source = waiting.pop()
            heapq.heappush(admitted, (deadline, source))
        pattern[place - 1] = heapq.heappop(admitted)[1]
    return pattern


def _ranks(pattern: Indices) -> Indices:
    """How often each place's source was drawn earlier in the period, [_PERIOD]."""
    ranks = np.empty_like(pattern)
    for source in np.unique(pattern):
        places = np.flatnonzero(pattern == source)
        ranks[places] = np.arange(len(places))
    return ranks
