"""Where documents begin, in datasets whose documents have one sequence or several, or no ids."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from neox_core.data.documents import document_starts, restarting_positions
from neox_core.data.indexed import IndexedDataset


def write(prefix: Path, sizes: list[int], documents: list[int]) -> IndexedDataset:
    """Files made by hand, in u16: sequences of these sizes; documents begin at these sequences."""
    offsets = np.cumsum([0, *sizes[:-1]]) * 2
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(sizes), len(documents) + 1)
    index += np.array(sizes, "<i4").tobytes() + offsets.astype("<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(index + np.array([*documents, len(sizes)], "<i8").tobytes())
    prefix.with_suffix(".bin").write_bytes(np.arange(sum(sizes), dtype="<u2").tobytes())
    return IndexedDataset(prefix)


@pytest.mark.parametrize("documents", [[0, 1, 2, 3, 4], [0, 2, 3]])
def test_starts_in_every_range(documents: list[int], tmp_path: Path) -> None:
    sizes = [5, 1, 0, 7, 3]
    dataset = write(tmp_path / "d", sizes, documents)
    begins = [sum(sizes[:document]) for document in documents]
    for start in range(16):
        for stop in range(start, 17):
            expected = [begin for begin in begins if start <= begin < stop]
            assert document_starts(dataset, start, stop).tolist() == expected


def test_positions() -> None:
    assert restarting_positions(np.array([2, 3, 6]), 8).tolist() == [0, 1, 0, 0, 1, 2, 0, 1]
    assert restarting_positions(np.array([0]), 3).tolist() == [0, 1, 2]
    assert restarting_positions(np.array([], dtype=np.int64), 3).tolist() == [0, 1, 2]
