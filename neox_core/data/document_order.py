"""The order of a source's documents in each epoch, worked out where it is read: no index is built and none is kept.

The documents in file order are cut into lanes of equal number, and each lane into the same number of runs of
neighbours. A block of an epoch is one run of each lane, and each lane goes through its runs from one of its own choice
on and around. Within the block, the documents are in random order. An epoch is its blocks, one after the other.

Blocks, runs and lanes hold whole documents, so that a block begins at a sum of lanes' differences between places that
the .idx holds: it is found by a search that reads a block or two there, and a document within it by the sizes of the
block's documents alone, whatever the number of documents. Neighbours in the file are in one block in every epoch, but
most of the documents there are others'; which run meets which is another in each epoch.
"""

from __future__ import annotations

import os
from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, count
from typing import NamedTuple
from weakref import finalize

import numpy as np

from neox_core.data.indexed import HEADER, IndexedDataset, Tokens, idx_path
from neox_core.data.permutation import hashes, seed_of
from neox_core.errors import DataError

LANES = 4
"""Places of the file that the documents of a block come from."""

RUN = 64
"""Neighbours of the file that stay in one block, at most; LANES x RUN documents' sizes are read for a sequence.

More of either takes longer: with these, a sequence is read within 50 microseconds (benchmarks/sampler.py). Both are
part of the order: another number needs another DATA_ORDER.
"""

_INTERPOLATIONS = 8
"""Looks that a search guesses from shares of bytes, before it bisects."""

_EPOCHS_KEPT, _BEGINS_KEPT = 16, 4096


class Spans(NamedTuple):
    """Pieces of documents, in the order in which they are read; none is empty."""

    documents: Tokens
    """Numbers of the documents in the file, int64 [n]."""
    places: Tokens
    """Place in the file of each piece's first token, int64 [n]."""
    lengths: Tokens
    """Tokens of each piece, int64 [n]."""


class DocumentOrder:
    """A dataset's tokens in the order of any epoch: each document's in order, the documents in another one each time."""

    def __init__(self, dataset: IndexedDataset, key: str, lanes: int = LANES, run: int = RUN) -> None:
        """Order `dataset`; `key` fixes the order of each epoch.

        Raises:
            DataError: the index has tokens that belong to no document.
        """
        if int(dataset.document_index[0]) != 0:
            raise _damaged(dataset)
        cut = self._cut = _Cut(dataset, lanes, run)
        self._epoch = lru_cache(maxsize=_EPOCHS_KEPT)(lambda epoch: _Epoch(cut, f"{key}/{epoch}"))

    def spans(self, epoch: int, start: int, stop: int) -> Spans:
        """The pieces of documents that are the tokens [start, stop) of an epoch.

        Raises:
            DataError: the index's documents do not follow one another.
        """
        itemsize, order = self._cut.itemsize, self._epoch(epoch)
        place, end = start * itemsize, stop * itemsize
        found = []
        while place < end:
            pieces, place = order.spans(place, end)
            found.append(pieces)
        documents, places, lengths = joined(found)
        return Spans(documents, places // itemsize, lengths // itemsize)


class _Block(NamedTuple):
    """One run of each lane. Places are in bytes."""

    begin: int
    """Where the block begins in its epoch."""
    end: int
    firsts: list[int]
    """First document of each run."""
    bounds: Tokens
    """Where each document begins in the file, and where the last one ends: int64 [lanes, longest run + 1].

    A shorter run ends with a document without tokens, which is not its own.
    """


class _Cut:
    """Documents cut into lanes x blocks runs, whose numbers of documents differ by one at most. Places are in bytes.

    The index is read, not mapped: mapping a page can make two megabytes resident, and waits with Python's lock held.
    """

    def __init__(self, dataset: IndexedDataset, lanes: int, run: int) -> None:
        self.dataset, self.lanes = dataset, lanes
        self.itemsize, self._sequences = dataset.dtype.itemsize, len(dataset)
        self._end = len(dataset.tokens) * self.itemsize
        self._documents = len(dataset.document_index) - 1
        self.blocks = max(1, -(-self._documents // (lanes * run)))
        self._runs = lanes * self.blocks
        self.longest = -(-self._documents // self._runs)
        """Documents of the longest run."""
        self._offsets_at = HEADER.size + 4 * self._sequences
        self._documents_at = self._offsets_at + 8 * self._sequences
        self._file = os.open(idx_path(dataset.prefix), os.O_RDONLY)
        finalize(self, os.close, self._file)

    def begin(self, run: int) -> int:
        """Where a run begins; the number of runs stands for the end."""
        sequence = int(self._read(self._documents_at, [(self.first(run), 1)])[0])
        return int(self._read(self._offsets_at, [(sequence, 1)])[0]) if sequence < self._sequences else self._end

    def first(self, run: int) -> int:
        """First document of a run."""
        return run * self._documents // self._runs

    def bounds(self, runs: Sequence[int], firsts: Sequence[int]) -> Tokens:
        """As in `_Block`, of some runs in order and their first documents."""
        width = self.longest + 1
        # The run at the end of the file may be a shorter one.
        counts = [min(width, self._documents + 1 - first) for first in firsts]
        sequences = self._read(self._documents_at, list(zip(firsts, counts, strict=True)))
        if counts[-1] < width:
            sequences = np.append(sequences, self._sequences)
        sequences = sequences.reshape(len(runs), width)
        if self._documents % self._runs:
            short = [row for row, run in enumerate(runs) if self.first(run + 1) - firsts[row] < self.longest]
            sequences = sequences.copy()
            sequences[short, -1] = sequences[short, -2]
        return self._offsets(sequences)

    def _offsets(self, sequences: Tokens) -> Tokens:
        """Where sequences begin, of the same shape; the number of sequences stands for the end."""
        lows, highs = sequences[:, 0].tolist(), sequences[:, -1].tolist()
        if not all(0 <= low <= high <= self._sequences for low, high in zip(lows, highs, strict=True)):
            raise _damaged(self.dataset)
        counts = [min(high + 1, self._sequences) - low for low, high in zip(lows, highs, strict=True)]
        offsets = self._read(self._offsets_at, list(zip(lows, counts, strict=True)))
        shifts = np.array([low - before for low, before in zip(lows, accumulate(counts, initial=0), strict=False)])
        places = sequences - shifts[:, None]
        if highs[-1] == self._sequences:
            offsets = np.append(offsets, self._end)
            places[sequences == self._sequences] = -1
        try:
            return offsets[places]
        except IndexError:
            raise _damaged(self.dataset) from None

    def _read(self, place: int, ranges: Iterable[tuple[int, int]]) -> Tokens:
        """Numbers from a place of the index on, int64: of each range that many from the first on."""
        pieces = [os.pread(self._file, 8 * number, place + 8 * first) for first, number in ranges]
        return np.frombuffer(b"".join(pieces), dtype="<i8")


class _Epoch:
    """The blocks of one epoch. Places are in bytes, from the epoch's begin."""

    def __init__(self, cut: _Cut, key: str) -> None:
        self._cut, self._key = cut, key
        shifts = (hashes(cut.lanes, seed_of(f"{key}/shifts")) % np.uint64(cut.blocks)).tolist()
        edges = [cut.begin(lane * cut.blocks) for lane in range(cut.lanes + 1)]
        self._lanes = list(zip(range(0, cut.lanes * cut.blocks, cut.blocks), shifts, np.diff(edges).tolist(), strict=True))
        """Of each lane its first run, the number of the run that the epoch begins with, and its bytes."""
        self._origin = sum(cut.begin(first + shift) for first, shift, _ in self._lanes)
        # Where some blocks begin. What was found shortens later searches, but changes no result.
        self._begins = [(0, 0), (edges[-1], cut.blocks)]

    def spans(self, start: int, stop: int) -> tuple[Spans, int]:
        """The pieces of documents from `start` on, up to `stop` or the end of the block; and where they end."""
        number, block = self._block_at(start)
        sizes = (block.bounds[:, 1:] - block.bounds[:, :-1]).ravel()
        order = hashes(len(sizes), seed_of(f"{self._key}/{number}")).argsort()
        ends = sizes[order].cumsum()
        ends += block.begin
        end = min(stop, block.end)
        if sizes.min() < 0:
            raise _damaged(self._cut.dataset)
        first, last = int(ends.searchsorted(start, "right")), int(ends.searchsorted(end))
        taken = order[first : last + 1]
        lengths = sizes[taken]
        if not lengths.all():
            taken, lengths = taken[lengths > 0], lengths[lengths > 0]
        lanes, columns = np.divmod(taken, self._cut.longest)
        places = block.bounds[lanes, columns]
        skipped = start - int(ends[first]) + int(lengths[0])
        places[0] += skipped
        lengths[0] -= skipped
        lengths[-1] -= int(ends[last]) - end
        return Spans(np.array(block.firsts)[lanes] + columns, places, lengths), end

    def _block_at(self, place: int) -> tuple[int, _Block]:
        """The block that a place lies in, and its number.

        The share of the bytes tells where to look next, unless documents are so uneven that it does not help.
        """
        after = bisect_right(self._begins, (place, self._cut.blocks))
        (below, low), (above, high) = self._begins[after - 1], self._begins[after]
        for look in count():
            if not (low < high and below <= place < above):
                break
            share = (place - below) * (high - low) // (above - below) if look < _INTERPOLATIONS else (high - low) // 2
            number = low + share
            block = self._read(number)
            if place < block.begin:
                high, above = number, block.begin
            elif place >= block.end:
                low, below = number + 1, block.end
            else:
                if look and len(self._begins) < _BEGINS_KEPT:
                    insort(self._begins, (block.begin, number))
                return number, block
        raise _damaged(self._cut.dataset)

    def _read(self, number: int) -> _Block:
        """A block."""
        begin, blocks, runs = -self._origin, self._cut.blocks, []
        for first, shift, size in self._lanes:
            run = shift + number
            if run >= blocks:
                run -= blocks
                begin += size
            runs.append(first + run)
        firsts = list(map(self._cut.first, runs))
        bounds = self._cut.bounds(runs, firsts)
        inside = sum(bounds[:, 0].tolist())
        begin += inside
        return _Block(begin, begin + sum(bounds[:, -1].tolist()) - inside, firsts, bounds)


def joined(pieces: Sequence[Spans]) -> Spans:
    """Spans one after the other."""
    return pieces[0] if len(pieces) == 1 else Spans(*map(np.concatenate, zip(*pieces, strict=True)))


def _damaged(dataset: IndexedDataset) -> DataError:
    return DataError(f"{idx_path(dataset.prefix)} is damaged (its documents do not follow one another): make it again")
