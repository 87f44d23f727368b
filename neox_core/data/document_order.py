"""The order of a source's documents in each epoch, worked out where it is read: no index is built and none is kept.

The documents in file order are cut into lanes of equal number, and each lane into the same number of runs of
neighbours. A block of an epoch is one run of each lane, and each lane goes through its runs from one of its own choice
on and around. Within the block, the documents are in random order. An epoch is its blocks, one after the other.

Blocks, runs and lanes hold whole documents, so that a block begins at a sum of lanes' differences between places that
the .idx holds. A block is thus found by a search that reads a few places per lane, and a document within it by the
sizes of the block's documents alone, whatever the number of documents. Neighbours in the file are in one block in
every epoch, but few of the documents beside them there are theirs; which run meets which is another in each epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np

from neox_core.data.indexed import IndexedDataset, Tokens, idx_path
from neox_core.data.permutation import hashes, seed_of
from neox_core.errors import DataError

LANES = 8
"""Places of the file that the documents of a block come from."""

RUN = 64
"""Neighbours of the file that stay in one block, at most; LANES x RUN documents' sizes are read for a sequence.

More of either takes longer: these read a sequence in three quarters of 50 microseconds (benchmarks/sampler.py). Both
are part of the order: another number needs another DATA_ORDER.
"""

_INTERPOLATIONS = 8


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
        self._cut = _Cut(dataset, lanes, run)
        self._key = key
        self._epoch = lru_cache(maxsize=64)(self._open_epoch)

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

    def _open_epoch(self, epoch: int) -> _Epoch:
        return _Epoch(self._cut, f"{self._key}/{epoch}")


class _Cut:
    """Documents cut into lanes x blocks runs, whose numbers of documents differ by one at most. Places are in bytes."""

    def __init__(self, dataset: IndexedDataset, lanes: int, run: int) -> None:
        self.dataset, self.lanes = dataset, lanes
        self.itemsize = dataset.dtype.itemsize
        self._end = len(dataset.tokens) * self.itemsize
        self._documents = len(dataset.document_index) - 1
        self.blocks = max(1, -(-self._documents // (lanes * run)))
        self._runs = lanes * self.blocks
        longest = -(-self._documents // self._runs)
        self.width = longest + 1
        """Bounds of the longest run's documents."""
        self._columns = np.arange(self.width)
        self._sequences = len(dataset)
        self._document, self._offset = dataset.document_index.item, dataset.offsets.item

    def begin(self, runs: Iterable[int]) -> int:
        """The sum of the places where some runs begin; the number of runs stands for the end."""
        place = 0
        for run in runs:
            sequence = self._document(run * self._documents // self._runs)
            place += self._offset(sequence) if sequence < self._sequences else self._end
        return place

    def bounds(self, runs: Tokens) -> tuple[Tokens, Tokens]:
        """Documents of some runs, and where each begins: int64 [runs x width].

        Each run is followed by the document after it, which a shorter run repeats.
        """
        firsts, stops = runs * self._documents // self._runs, (runs + 1) * self._documents // self._runs
        documents = np.minimum(firsts[:, None] + self._columns, stops[:, None]).ravel()
        sequences = self.dataset.document_index[documents]
        if sequences[-1] < self._sequences:
            return documents, self.dataset.offsets[sequences]
        begins = self.dataset.offsets[np.minimum(sequences, self._sequences - 1)]
        begins[sequences == self._sequences] = self._end
        return documents, begins


class _Epoch:
    """The blocks of one epoch. Places are in bytes, from the epoch's begin."""

    def __init__(self, cut: _Cut, key: str) -> None:
        self._cut, self._key = cut, key
        shifts = hashes(cut.lanes, seed_of(f"{key}/shifts")) % np.uint64(cut.blocks)
        self._shifts = shifts.astype(np.int64)
        self._firsts = np.arange(cut.lanes) * cut.blocks
        edges = [cut.begin([lane * cut.blocks]) for lane in range(cut.lanes + 1)]
        self._lanes = list(zip(self._firsts.tolist(), self._shifts.tolist(), np.diff(edges).tolist(), strict=True))
        """Of each lane its first run, the number of the run that the epoch begins with, and its bytes."""
        self._origin, self._size = cut.begin((self._firsts + self._shifts).tolist()), edges[-1]

    def spans(self, start: int, stop: int) -> tuple[Spans, int]:
        """The pieces of documents from `start` on, up to `stop` or the end of the block; and where they end."""
        block, begin = self._block_at(start)
        cut = self._cut
        documents, begins = cut.bounds(self._firsts + (self._shifts + block) % cut.blocks)
        sizes = begins[1:] - begins[:-1]
        sizes[cut.width - 1 :: cut.width] = 0  # from one run to the next
        order = hashes(len(sizes), seed_of(f"{self._key}/{block}")).argsort()
        ends = sizes[order].cumsum()
        ends += begin
        end = min(stop, int(ends[-1]))
        if sizes.min() < 0 or not begin <= start < end:
            raise _damaged(cut.dataset)
        first, last = int(ends.searchsorted(start, "right")), int(ends.searchsorted(end))
        taken = order[first : last + 1]
        lengths = sizes[taken]
        if not lengths.all():
            taken, lengths = taken[lengths > 0], lengths[lengths > 0]
        places = begins[taken]
        skipped = start - int(ends[first]) + int(lengths[0])
        places[0] += skipped
        lengths[0] -= skipped
        lengths[-1] -= int(ends[last]) - end
        return Spans(documents[taken], places, lengths), end

    def _block_at(self, place: int) -> tuple[int, int]:
        """The block that a place lies in, and where that begins.

        The share of the bytes tells where to look next, unless documents are so uneven that it does not help.
        """
        low, high, below, above = 0, self._cut.blocks, 0, self._size
        for attempt in count():
            if high - low == 1:
                break
            share = (place - below) * (high - low) // (above - below) if attempt < _INTERPOLATIONS else (high - low) // 2
            middle = low + min(max(share, 1), high - low - 1)
            begin = self._begin(middle)
            if begin <= place:
                low, below = middle, begin
            else:
                high, above = middle, begin
        return low, below

    def _begin(self, block: int) -> int:
        """Where a block begins; the number of blocks stands for the end."""
        blocks, begin = self._cut.blocks, -self._origin
        runs = []
        for first, shift, size in self._lanes:
            run = shift + block
            if run >= blocks:
                run -= blocks
                begin += size
            runs.append(first + run)
        return begin + self._cut.begin(runs)


def joined(pieces: Sequence[Spans]) -> Spans:
    """Spans one after the other."""
    return pieces[0] if len(pieces) == 1 else Spans(*map(np.concatenate, zip(*pieces, strict=True)))


def _damaged(dataset: IndexedDataset) -> DataError:
    return DataError(f"{idx_path(dataset.prefix)} is damaged (its documents do not follow one another): make it again")
