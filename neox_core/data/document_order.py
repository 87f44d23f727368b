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

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np

from neox_core.data.document_runs import DocumentRuns
from neox_core.data.indexed import IndexedDataset, Tokens
from neox_core.data.permutation import hashes, seed_of

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
    """A dataset's tokens in the order of any epoch: each document's in order, documents in another each time."""

    def __init__(self, dataset: IndexedDataset, key: str, lanes: int, run: int) -> None:
        """Order `dataset`; `key` fixes the order of each epoch. `lanes` and `run`: see OrderVersion.

        Raises:
            DataError: the index has tokens that belong to no document.
        """
        runs = DocumentRuns(dataset, lanes, run)
        self._itemsize = dataset.dtype.itemsize
        self._epoch = lru_cache(maxsize=_EPOCHS_KEPT)(lambda epoch: _Epoch(runs, f"{key}/{epoch}"))

    def spans(self, epoch: int, start: int, stop: int) -> Spans:
        """The pieces of documents that are the tokens [start, stop) of an epoch.

        Raises:
            DataError: the index's documents do not follow one another.
        """
        itemsize, order = self._itemsize, self._epoch(epoch)
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


class _Epoch:
    """The blocks of one epoch. Places are in bytes, from the epoch's begin."""

    def __init__(self, cut: DocumentRuns, key: str) -> None:
        self._cut, self._key = cut, key
        shifts = (hashes(cut.lanes, seed_of(f"{key}/shifts")) % np.uint64(cut.blocks)).tolist()
        edges = [cut.begin(lane * cut.blocks) for lane in range(cut.lanes + 1)]
        self._lanes = list(
            zip(range(0, cut.lanes * cut.blocks, cut.blocks), shifts, np.diff(edges).tolist(), strict=True)
        )
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
            raise self._cut.damaged()
        first, last = ends.searchsorted([start + 1, end]).tolist()
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

        The share of the bytes says where to look next, unless documents are so uneven that it does not help.
        """
        begins = self._begins  # another thread may put a longer list there meanwhile
        after = bisect_right(begins, (place, self._cut.blocks))
        (below, low), (above, high) = begins[after - 1], begins[after]
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
                if look and number > begins[after - 1][1] and len(begins) < _BEGINS_KEPT:
                    self._begins = [*begins[:after], (block.begin, number), *begins[after:]]
                return number, block
        raise self._cut.damaged()

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
