"""Where documents begin, in datasets whose documents have one sequence or several, or no ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neox_core.data.documents import document_starts, restarting_positions
from tests.neox_core.data.slow_order import write


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
