"""Equal texts, against their plain definition."""

from __future__ import annotations

import os
import random
import resource
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from neox_core.data.tokenization.filters import duplicates
from neox_core.data.tokenization.filters.duplicates import DOCUMENT, DocumentTable, find_duplicates, text_hash
from neox_core.data.tokenization.part_files import PartPaths, load_table
from tests.paths import SHARED

EVALUATION = SHARED / "data" / "eval"


def table(texts: list[str]) -> DocumentTable:
    return np.array([(*text_hash(text), len(text), 1) for text in texts], dtype=DOCUMENT)


@pytest.mark.parametrize("bucket", [1 << 21, 7])
def test_duplicates_are_those_that_came_before(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_BUCKET", bucket)
    rng = random.Random(6)
    parts = [[f"text {rng.randrange(40)}" for _ in range(count)] for count in (30, 0, 1, 25)]
    seen: set[str] = set()
    expected = []
    for part in parts:
        expected.append([text in seen or bool(seen.add(text)) for text in part])  # type: ignore[func-returns-value]
    found = find_duplicates([partial(table, part) for part in parts])
    assert [mask.tolist() for mask in found] == expected
    assert sum(map(sum, expected)) > 10


def test_more_tables_than_a_process_may_have_files(tmp_path: Path) -> None:
    paths = PartPaths(tmp_path / "part")
    np.save(paths.documents, table([f"text {number}" for number in range(3000)]))  # large enough to be mapped
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(2000) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[20], hard))
    try:
        found = find_duplicates([partial(load_table, paths)] * 40)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [int(mask.sum()) for mask in found] == [0] + [3000] * 39


def test_hash_sees_every_byte() -> None:
    texts = ["", " ", "a", "A", "a ", "é", "e\u0301", "\x00"]
    assert len({text_hash(text) for text in texts}) == len(texts)


@pytest.mark.parametrize("bucket", [1 << 21, 7])
def test_with_references_only_their_equals_are_found(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_BUCKET", bucket)
    references, others = [["a", "a", "b"], ["c"]], [["b", "x", "x"], [], ["c", "a", "y"]]
    found = find_duplicates([partial(table, texts) for texts in references + others], len(references))
    assert [mask.tolist() for mask in found] == [[False] * 3, [False], [True, False, False], [], [True, True, False]]
