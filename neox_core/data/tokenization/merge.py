"""Several token datasets into one: a concatenation whose every offset is known before a byte is copied."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neox_core.data.indexed import (
    HEADER,
    IndexedDataset,
    Tokens,
    bin_path,
    dataset_paths,
    index_header,
)
from neox_core.errors import DataError
from neox_core.storage.atomic import atomic_files

_COPY_SIZE = 1 << 20
_INDEX_ROWS = 1 << 20

Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Part:
    """A dataset to append."""

    prefix: Path
    keep: Mask | None = None
    """Which of its documents, [documents]; None: all."""


@dataclass(frozen=True)
class _Placed:
    """A part, what is taken of it and where that goes. Its files are open only while they are copied: a split may
    have more parts than a process may have files."""

    prefix: Path
    keep: Mask | None
    dtype: np.dtype[Any]
    documents: int
    bytes: int
    first_document: int
    first_byte: int


def merge(parts: Sequence[Part | Path], prefix: Path, workers: int = 4) -> None:
    """Write the parts' documents, in order, as one dataset; the parts are copied in parallel.

    Nothing lies under the final names before all is written. Documents of no token are kept as such.

    Raises:
        DataError: there is no part, one cannot be read, or they hold ids of different types.
    """
    placed = _place([part if isinstance(part, Part) else Part(part) for part in parts], prefix)
    last = placed[-1]
    total, size = last.first_document + last.documents, last.first_byte + last.bytes
    with (
        atomic_files(dataset_paths(prefix)) as (temporary_bin, temporary_idx),
        temporary_bin.open("wb") as ids,
        temporary_idx.open("wb") as index,
    ):
        ids.truncate(size)
        index.write(index_header(last.dtype, total))
        index.truncate(HEADER.size + 20 * total + 8)
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(_copy_ids, part, ids.fileno()) for part in placed]
            jobs += [pool.submit(_copy_index, part, index.fileno(), total) for part in placed]
            jobs.append(pool.submit(_number_documents, index.fileno(), total))
            for job in jobs:
                job.result()


def _place(parts: Sequence[Part], prefix: Path) -> list[_Placed]:
    placed: list[_Placed] = []
    document = byte = 0
    for part in parts:
        dataset = IndexedDataset(part.prefix)
        sizes = dataset.sizes if part.keep is None else dataset.sizes[part.keep]
        taken = int(sizes.sum(dtype=np.int64)) * dataset.dtype.itemsize
        placed.append(_Placed(part.prefix, part.keep, dataset.dtype, len(sizes), taken, document, byte))
        document, byte = document + len(sizes), byte + taken
    if not placed:
        raise DataError(f"{prefix} would be merged of no parts: give at least one")
    first = placed[0]
    if other := next((part for part in placed if part.dtype != first.dtype), None):
        raise DataError(f"{first.prefix} holds {first.dtype.name}, {other.prefix} {other.dtype.name}: cannot merge")
    return placed


def _copy_ids(part: _Placed, target: int) -> None:
    dataset, offset = IndexedDataset(part.prefix), part.first_byte
    with bin_path(part.prefix).open("rb") as source:
        for first, last in _runs(part.keep, len(dataset)):
            start = int(dataset.offsets[first])
            end = int(dataset.offsets[last - 1]) + int(dataset.sizes[last - 1]) * dataset.dtype.itemsize
            while start < end:
                block = os.pread(source.fileno(), min(_COPY_SIZE, end - start), start)
                if not block:
                    raise DataError(f"{bin_path(part.prefix)} became shorter while it was merged: run again")
                _write_at(target, block, offset)
                start, offset = start + len(block), offset + len(block)


def _runs(keep: Mask | None, documents: int) -> Iterator[tuple[int, int]]:
    """First and past-the-last of each stretch of documents that are kept."""
    if not documents:
        return
    if keep is None:
        yield 0, documents
        return
    borders = np.flatnonzero(np.diff(keep.astype(np.int8), prepend=0, append=0))
    yield from zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True)


def _copy_index(part: _Placed, target: int, total: int) -> None:
    """Sizes and offsets of the part's documents, into the places of the two lists that are theirs."""
    sizes_at = HEADER.size + 4 * part.first_document
    offsets_at = HEADER.size + 4 * total + 8 * part.first_document
    dataset, end = IndexedDataset(part.prefix), part.first_byte
    for row in range(0, len(dataset), _INDEX_ROWS):
        sizes: Tokens = dataset.sizes[row : row + _INDEX_ROWS]
        if part.keep is not None:
            sizes = sizes[part.keep[row : row + _INDEX_ROWS]]
        lengths = sizes.astype("<i8") * dataset.dtype.itemsize
        offsets = end + np.cumsum(lengths) - lengths
        _write_at(target, sizes.tobytes(), sizes_at)
        _write_at(target, offsets.astype("<i8").tobytes(), offsets_at)
        sizes_at, offsets_at, end = sizes_at + 4 * len(sizes), offsets_at + 8 * len(sizes), end + int(lengths.sum())


def _number_documents(target: int, total: int) -> None:
    for row in range(0, total + 1, _INDEX_ROWS):
        numbers = np.arange(row, min(row + _INDEX_ROWS, total + 1), dtype="<i8")
        _write_at(target, numbers.tobytes(), HEADER.size + 12 * total + 8 * row)


def _write_at(target: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written
