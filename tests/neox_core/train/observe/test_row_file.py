"""Rows of a training on a disk that fills up and is freed again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neox_core.train.observe.row_file import RowFile, restore
from tests.full_disk import Disk, put_on_disk


def rows(text: str) -> list[int]:
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_rows_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    path, disk = tmp_path / "metrics.jsonl", Disk(20)
    put_on_disk(monkeypatch, lambda opened: opened == path, lambda: disk)
    file = RowFile(path)
    for step in (1, 2, 3):  # of 12 bytes each
        file.add({"step": step})
    assert rows(file.text()) == [1, 2, 3]
    assert caplog.text.count("the training continues") == 1
    assert f"{path} needs " in caplog.text
    assert path.read_text().count("\n") == 1
    disk.free = 1000
    file.add({"step": 4})
    file.close()
    assert rows(path.read_text()) == [1, 2, 3, 4]
    assert "has room again" in caplog.text


def test_rows_without_room_at_the_end_are_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    put_on_disk(monkeypatch, lambda opened: opened == path, lambda: Disk(12))
    file = RowFile(path)
    file.add({"step": 1})
    file.add({"step": 2})
    file.close()
    assert 'rows that found no room: {"step": 2}' in caplog.text


def test_another_failure_is_one(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "metrics.jsonl")
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.add({"step": 1})


def test_half_a_last_line_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    file = RowFile(path)
    file.add({"step": 2})
    file.close()
    assert rows(path.read_text()) == [1, 2]
    assert "incomplete" in caplog.text


def test_a_copy_comes_back_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written of it would be taken for all that there is, and be copied to the store."""
    path, stored = tmp_path / "metrics.jsonl", '{"step": 1, "time": 1.0}\n{"step": 2, "time": 2.0}\n'
    with monkeypatch.context() as full:
        put_on_disk(full, lambda opened: opened.parent == tmp_path, lambda: Disk(30))
        with pytest.raises(OSError, match="No space left"):
            restore(path, stored)
    assert not path.exists()
    restore(path, stored)
    assert path.read_text() == stored
    restore(tmp_path / "none", None)
    assert not (tmp_path / "none").exists()


def test_the_copy_of_a_job_with_another_folder_is_taken_if_it_is_newer(tmp_path: Path) -> None:
    path, earlier = tmp_path / "metrics.jsonl", '{"step": 1, "time": 1.0}\n'
    path.write_text(earlier + '{"step": 2, "time": 2.0}\n{"ste')
    restore(path, earlier)
    assert path.read_text().startswith(earlier + '{"step": 2')
    stored = earlier + '{"step": 2, "time": 3.0}\n{"step": 3, "time": 4.0}\n'
    restore(path, stored)
    assert path.read_text() == stored
    path.write_text("\0\0\n")
    restore(path, stored)
    assert path.read_text() == stored


def test_whose_clock_is_ahead_does_not_matter(tmp_path: Path) -> None:
    """Rows of a node with another clock were taken for older ones, and lost."""
    path, earlier = tmp_path / "metrics.jsonl", '{"step": 1, "time": 50.0}\n'
    path.write_text(earlier + '{"step": 2, "time": 20.0}\n')
    restore(path, earlier)
    assert rows(path.read_text()) == [1, 2]
    stored = earlier + '{"step": 2, "time": 10.0}\n{"step": 3, "time": 15.0}\n'
    restore(path, stored)
    assert path.read_text() == stored
