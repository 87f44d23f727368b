"""Merging: a concatenation, whatever the number of workers; with documents left out on request."""

from __future__ import annotations

import os
import random
import resource
from pathlib import Path

import numpy as np
import pytest

from neox_core.data.indexed import IndexedDataset, IndexedWriter
from neox_core.data.tokenization import merge as merge_module
from neox_core.data.tokenization.merge import Part, merge
from neox_core.errors import DataError


def write(prefix: Path, documents: list[list[int]], dtype: str = "u2") -> Path:
    with IndexedWriter(prefix, np.dtype(f"<{dtype}")) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def same(first: Path, second: Path) -> bool:
    return all(first.with_suffix(end).read_bytes() == second.with_suffix(end).read_bytes() for end in (".bin", ".idx"))


@pytest.mark.parametrize("dtype", ["u2", "i4"])
@pytest.mark.parametrize("workers", [1, 5])
def test_merge_equals_writing_at_once(
    tmp_path: Path, dtype: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module, "_COPY_SIZE", 7)
    monkeypatch.setattr(merge_module, "_INDEX_ROWS", 3)
    rng = random.Random(5)
    parts = [
        [[rng.randrange(60_000) for _ in range(rng.randrange(5))] for _ in range(count)] for count in (4, 0, 11, 1)
    ]
    keep = [np.array([rng.random() < 0.6 for _ in part], dtype=np.bool_) for part in parts]
    prefixes = [write(tmp_path / f"part{number}", part, dtype) for number, part in enumerate(parts)]
    merge(prefixes, tmp_path / "all", workers)
    assert same(tmp_path / "all", write(tmp_path / "whole", [d for part in parts for d in part], dtype))
    chosen = [Part(prefix, mask) for prefix, mask in zip(prefixes, keep, strict=True)]
    merge([*chosen, Part(prefixes[0])], tmp_path / "some", workers)
    kept = [d for part, mask in zip(parts, keep, strict=True) for d, stays in zip(part, mask, strict=True) if stays]
    assert same(tmp_path / "some", write(tmp_path / "kept", [*kept, *parts[0]], dtype))


def test_more_parts_than_a_process_may_have_files(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / f"part{number}", [[number], [7]]) for number in range(40)]
    parts = [Part(prefix, np.array([True, number % 2 == 0])) for number, prefix in enumerate(prefixes)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(2000) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[20], hard))
    try:
        merge(parts, tmp_path / "all", workers=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    kept = [[[number], [7]][: 2 - number % 2] for number in range(40)]
    assert same(tmp_path / "all", write(tmp_path / "whole", [document for part in kept for document in part]))


def test_all_left_out(tmp_path: Path) -> None:
    part = Part(write(tmp_path / "1", [[1], [2]]), np.zeros(2, dtype=np.bool_))
    merge([part], tmp_path / "none")
    assert len(IndexedDataset(tmp_path / "none")) == 0
    assert same(tmp_path / "none", write(tmp_path / "empty", []))


def test_refuses_another_dtype_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot merge"):
        merge([write(tmp_path / "1", [[1]]), write(tmp_path / "2", [[1]], "i4")], tmp_path / "merged")
    with pytest.raises(DataError, match="no parts"):
        merge([], tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge([write(tmp_path / "1", [[1]])], tmp_path / "m")
    before = (tmp_path / "m.bin").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(merge_module, "_copy_index", fail)
    with pytest.raises(OSError, match="disk full"):
        merge([write(tmp_path / "2", [[2]])], tmp_path / "m")
    assert (tmp_path / "m.bin").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
