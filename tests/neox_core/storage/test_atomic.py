from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from neox_core.storage.atomic import atomic_file, atomic_files, remove_remains, write_atomically


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file.json"
    write_atomically(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space"):
            write_atomically(path, "new content")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


def test_threads_may_write_the_same_file(tmp_path: Path) -> None:
    """Stages that run side by side share the memory of digests."""
    path = tmp_path / "file"
    texts = [letter * 100_000 for letter in "abcdefgh"]

    def write_and_read(text: str) -> set[str]:
        found = set()
        for _ in range(20):
            write_atomically(path, text)
            found.add(path.read_text())
        return found

    with ThreadPoolExecutor(len(texts)) as pool:
        assert set().union(*pool.map(write_and_read, texts)) <= set(texts)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_files_that_belong_together_appear_in_order_with_the_last_one_last(tmp_path: Path) -> None:
    paths = [tmp_path / "data", tmp_path / "index"]
    for path in paths:
        path.write_text("old")
    with atomic_files(paths) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
        assert [path.read_text() for path in paths] == ["old", "old"]
    assert [path.read_text() for path in paths] == ["new", "new"]
    assert sorted(tmp_path.iterdir()) == paths


def test_a_reader_of_the_last_file_never_meets_new_others(tmp_path: Path) -> None:
    """A rename that fails after the first leaves no index, rather than an old one."""
    paths = [tmp_path / "data", tmp_path / "index"]
    for path in paths:
        path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_files(paths, durable=False) as temporaries:
        temporaries[0].write_text("new")  # the index is never written
    assert paths[0].read_text() == "new"
    assert sorted(tmp_path.iterdir()) == paths[:1]


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_file(tmp_path / "deep" / "file") as temporary:
            temporary.write_text("half")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write()
    assert list((tmp_path / "deep").iterdir()) == []


def test_remains_are_of_this_file_alone(tmp_path: Path) -> None:
    """Names may hold what a pattern would take for wildcards, and begin like another file's."""
    for name in ("a[1].bin", "a[1].bin.json", "a1.bin"):
        (tmp_path / f".{name}.0123456789ab.tmp").write_text("half")
    (tmp_path / "a[1].bin").write_text("whole")
    remove_remains(tmp_path / "a[1].bin")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a[1].bin", ".a[1].bin.json.0123456789ab.tmp", ".a1.bin.0123456789ab.tmp"}
    with atomic_file(tmp_path / "a1.bin") as temporary:  # what a kill leaves here has a name that is found
        temporary.write_text("half")
        remove_remains(tmp_path / "a1.bin")
        assert not temporary.exists()
        temporary.write_text("whole")
