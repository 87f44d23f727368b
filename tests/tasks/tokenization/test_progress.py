"""Progress of the making of parts: rates and the time left are of what this run makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from neox_core.data.tokenization.part_files import PartPaths
from neox_core.data.tokenization.part_settings import Done, PartRecord
from neox_core.data.tokenization.readers import InputFile
from neox_core.storage.atomic import write_atomically
from tasks.tokenization import progress as tokenize_progress
from tasks.tokenization.progress import PartsProgress

FILES = [InputFile("a", "train", str(n), f"/in/{n}", 1_000_000) for n in range(4)]
RECORD = PartRecord(1, 4_000_000, 1_000_000, 0, 0, "", "an engine", 1, {}, {})


class Updates:
    """Progress at a clock that is set by hand."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.now = folder, 100.0
        self.seen: list[tuple[float, str]] = []
        monkeypatch.setattr(tokenize_progress.time, "monotonic", lambda: self.now)
        self.parts = PartsProgress(FILES, folder, lambda share, text: self.seen.append((share, text)))

    def make(self, file: InputFile) -> None:
        write_atomically(PartPaths.of(file, self.folder).record, "{}")


@pytest.fixture
def updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Updates:
    for file in FILES[:2]:  # of an earlier run
        write_atomically(PartPaths.of(file, tmp_path).record, "{}")
    return Updates(tmp_path, monkeypatch)


def test_found_parts_are_done_but_count_in_no_rate(updates: Updates) -> None:
    def made() -> Iterator[tuple[InputFile, PartRecord]]:
        yield FILES[0], RECORD  # found
        updates.now += 10
        updates.make(FILES[2])
        yield FILES[2], RECORD
        updates.make(FILES[1])  # found damaged, so made anew
        yield FILES[1], RECORD

    assert list(updates.parts.follow(made())) == [(FILES[n], RECORD) for n in (0, 2, 1)]
    assert updates.seen == [
        (0.0, "0 of 4 files"),
        (0.25, "1 of 4 files"),
        (0.5, "2 of 4 files, 0.4 MB/s, 0.10M tokens/s, 0:20 left"),
        (0.75, "3 of 4 files, 0.8 MB/s, 0.20M tokens/s, 0:05 left"),
    ]


def test_it_moves_within_a_file_and_never_back(updates: Updates) -> None:
    def made() -> Iterator[tuple[InputFile, PartRecord]]:
        updates.now += 5
        updates.parts.update(Done(500_000, 2_000_000, 400_000))
        updates.now += 5
        updates.make(FILES[2])
        yield FILES[2], RECORD
        updates.parts.update(Done(900_000, 3_500_000, 900_000))  # as it was before that part was finished
        updates.parts.update(Done(1_500_000, 6_000_000, 1_500_000))

    list(updates.parts.follow(made()))
    assert updates.seen[1:] == [
        (0.125, "0 of 4 files, 0.4 MB/s, 0.08M tokens/s, 0:35 left"),
        (0.25, "1 of 4 files, 0.4 MB/s, 0.10M tokens/s, 0:30 left"),
        (0.25, "1 of 4 files, 0.4 MB/s, 0.10M tokens/s, 0:30 left"),
        (0.375, "1 of 4 files, 0.6 MB/s, 0.15M tokens/s, 0:17 left"),
    ]
