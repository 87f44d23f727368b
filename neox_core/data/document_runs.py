"""Runs of neighbouring documents, and where their documents lie, read from the .idx as they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import accumulate
from weakref import finalize

import numpy as np

from neox_core.data.indexed import HEADER, IndexedDataset, Tokens, idx_path
from neox_core.errors import DataError


class DocumentRuns:
    """Documents cut into lanes x blocks runs, whose numbers of documents differ by one at most. Places are in bytes.

    The index is read, not mapped: mapping a page can make two megabytes resident, and waits with Python's lock held.
    """

    def __init__(self, dataset: IndexedDataset, lanes: int, run: int) -> None:
        """Cut a dataset's documents into lanes of runs of up to `run`.

        Raises:
            DataError: the index has tokens that belong to no document.
        """
        self.lanes, self._path, self._sequences = lanes, idx_path(dataset.prefix), len(dataset)
        self._end = len(dataset.tokens) * dataset.dtype.itemsize
        self._documents = len(dataset.document_index) - 1
        self.blocks = max(1, -(-self._documents // (lanes * run)))
        self._runs = lanes * self.blocks
        self.longest = -(-self._documents // self._runs)
        """Documents of the longest run."""
        self._offsets_at = HEADER.size + 4 * self._sequences
        self._documents_at = self._offsets_at + 8 * self._sequences
        self._single = bytearray(self._runs)
        """Of each run, whether each of its documents was found to be the one sequence of its number."""
        self._file = os.open(self._path, os.O_RDONLY)
        finalize(self, os.close, self._file)
        if int(dataset.document_index[0]) != 0:
            raise self.damaged()

    def begin(self, run: int) -> int:
        """Where a run begins; the number of runs stands for the end."""
        sequence = int(self._read(self._documents_at, [(self.first(run), 1)])[0])
        return int(self._read(self._offsets_at, [(sequence, 1)])[0]) if sequence < self._sequences else self._end

    def first(self, run: int) -> int:
        """First document of a run."""
        return run * self._documents // self._runs

    def bounds(self, runs: Sequence[int], firsts: Sequence[int]) -> Tokens:
        """Where the documents of some runs begin, and where the last of each ends: int64 [runs, longest + 1].

        A shorter run ends with a document without tokens, which is not its own.

        Args:
            runs: in order.
            firsts: their first documents.

        Raises:
            DataError: the documents do not follow one another.
        """
        width = self.longest + 1
        ranges = [(first, width) for first in firsts]
        # A document is mostly one sequence. Where all of a run's were found to be, its offsets are read alone.
        if all(map(self._single.__getitem__, runs)):
            bounds = self._read(self._offsets_at, ranges).reshape(len(runs), width)
            if firsts[-1] + width > self._sequences:  # what follows there in the file are no offsets
                bounds = bounds.copy()
                bounds[-1, -1] = self._end
        else:
            sequences = self._read(self._documents_at, ranges).reshape(len(runs), width)
            for row, run in enumerate(runs):
                self._single[run] = np.array_equal(sequences[row], np.arange(firsts[row], firsts[row] + width))
            bounds = self._offsets(sequences)
        if self._documents % self._runs:  # the run at the end of the file is one of the longest
            short = [row for row, run in enumerate(runs) if self.first(run + 1) - firsts[row] < self.longest]
            bounds = bounds.copy()
            bounds[short, -1] = bounds[short, -2]
        return bounds

    def _offsets(self, sequences: Tokens) -> Tokens:
        """Where sequences begin, of the same shape; the number of sequences stands for the end."""
        lows, highs = sequences[:, 0].tolist(), sequences[:, -1].tolist()
        if not all(0 <= low <= high <= self._sequences for low, high in zip(lows, highs, strict=True)):
            raise self.damaged()
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
            raise self.damaged() from None

    def _read(self, place: int, ranges: Iterable[tuple[int, int]]) -> Tokens:
        """Numbers from a place of the index on, int64: of each range that many from the first on."""
        pieces = [os.pread(self._file, 8 * number, place + 8 * first) for first, number in ranges]
        return np.frombuffer(b"".join(pieces), dtype="<i8")

    def damaged(self) -> DataError:
        """The error to raise where the index contradicts itself."""
        return DataError(f"{self._path} is damaged (its documents do not follow one another): make it again")
