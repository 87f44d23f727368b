"""Formats are registered, and what is registered is found by name; tests/tasks/tokenization reads one in workers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from backports import zstd

from neox_core.data.tokenization.readers import SourceFormat, read_records, register_source_format, source_formats
from neox_core.data.tokenization.readers.formats import format_of
from neox_core.errors import ConfigError, DataError
from tests.neox_core.data.tokenization.readers.stories import STORIES, whole_file


def test_a_registered_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.story"
    path.write_text("Once\nupon a time")
    with pytest.raises(DataError, match=r"a\.story is of no format that can be read"):
        list(read_records(path, formats=[kind for kind in source_formats() if kind != STORIES]))
    register_source_format(STORIES)
    register_source_format(STORIES)  # again: nothing new
    assert [record.text for record in read_records(path, "title")] == ["title: Once\nupon a time"]  # type: ignore[union-attr]
    assert source_formats().count(STORIES) == 1


def test_a_suffix_has_one_reader() -> None:
    with pytest.raises(ConfigError, match=r"files that end in \.parquet have a reader"):
        register_source_format(SourceFormat((".tale", ".parquet"), whole_file))
    assert format_of("a.tale", source_formats()) is None


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".ndjson"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst", ".zstd"])
def test_json_lines_by_any_name(tmp_path: Path, kind: str, packed: str) -> None:
    line = json.dumps({"text": "words"}).encode()
    content = {"": bytes, ".gz": gzip.compress}.get(packed, zstd.compress)(line)
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(content)
    assert [record.text for record in read_records(path)] == ["words"]  # type: ignore[union-attr]
