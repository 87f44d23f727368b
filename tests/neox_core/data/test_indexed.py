"""Token files: the bytes on disk against the description of the format, and round trips."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from neox_core.data import indexed
from neox_core.data.indexed import IndexedDataset, IndexedWriter
from neox_core.errors import DataError

DOCUMENTS = [[5, 6, 7], [], [65_000], list(range(100))]


def read_independently(prefix: Path) -> tuple[int, list[list[int]], list[int], list[int]]:
    """(dtype code, documents, byte offsets, document index), by struct alone."""
    raw = prefix.with_name(prefix.name + ".idx").read_bytes()
    data = prefix.with_name(prefix.name + ".bin").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack_from("<Q", raw, 9)
    assert version == 1
    code = raw[17]
    count, documents = struct.unpack_from("<QQ", raw, 18)
    sizes = struct.unpack_from(f"<{count}i", raw, 34)
    offsets = struct.unpack_from(f"<{count}q", raw, 34 + 4 * count)
    index = struct.unpack_from(f"<{documents}q", raw, 34 + 12 * count)
    assert len(raw) == 34 + 12 * count + 8 * documents
    letter = {8: "H", 4: "i"}[code]
    ids = [list(struct.unpack_from(f"<{size}{letter}", data, at)) for size, at in zip(sizes, offsets, strict=True)]
    return code, ids, list(offsets), list(index)


def write(prefix: Path, documents: list[list[int]], dtype: str = "u2") -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


@pytest.mark.parametrize("rows", [1, 3, 1 << 20])
@pytest.mark.parametrize(("dtype", "code", "width"), [("u2", 8, 2), ("i4", 4, 4)])
def test_written_as_the_format_says(
    tmp_path: Path, dtype: str, code: int, width: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_INDEX_ROWS", rows)
    prefix = write(tmp_path / "deep" / "data.v1", DOCUMENTS, dtype)
    assert read_independently(prefix) == (code, DOCUMENTS, [0, 3 * width, 3 * width, 4 * width], [0, 1, 2, 3, 4])
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["data.v1.bin", "data.v1.idx"]


def test_round_trip(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "d", DOCUMENTS))
    assert len(dataset) == 4
    assert [dataset[i].tolist() for i in range(4)] == DOCUMENTS
    assert dataset.tokens.tolist() == [i for document in DOCUMENTS for i in document]
    assert dataset.sizes.tolist() == [3, 0, 1, 100]
    assert dataset.document_index.tolist() == [0, 1, 2, 3, 4]
    assert dataset.dtype == np.uint16


def test_reads_what_others_write(tmp_path: Path) -> None:
    """Two sequences of one document, as Megatron writes split sentences."""
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 2, 2) + struct.pack("<2i2q2q", 2, 1, 0, 8, 0, 2)
    (tmp_path / "m.idx").write_bytes(index)
    (tmp_path / "m.bin").write_bytes(struct.pack("<3i", 70_000, 8, 9))
    dataset = IndexedDataset(tmp_path / "m")
    assert [dataset[0].tolist(), dataset[1].tolist()] == [[70_000, 8], [9]]
    assert dataset.document_index.tolist() == [0, 2]


def test_empty_dataset(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "e", []))
    assert (len(dataset), len(dataset.tokens)) == (0, 0)


def test_failure_leaves_the_old_files_and_no_others(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    with pytest.raises(DataError, match="cannot hold"):
        write(tmp_path / "d", [[1], [-1]])
    assert IndexedDataset(tmp_path / "d")[0].tolist() == DOCUMENTS[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]


@pytest.mark.parametrize("ids", [[65_536], [-1]])
def test_id_that_does_not_fit(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(DataError, match="uint16 cannot hold"):
        write(tmp_path / "d", [ids])


@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (0, b"X", "does not begin with"),
        (9, b"\x02", "version 2"),
        (17, b"\x09", "dtype code 9"),
        (18, b"\x05", "bytes where its index says"),
        (34, b"\x04", None),  # a size in the middle is not looked at when opening
        (34 + 12, b"\x65", "bytes where its index says"),  # size of the last sequence
        (34 + 16, b"\x01", "first offset"),
        (34 + 48 + 32, b"\x03", "document index"),
    ],
)
def test_damaged_index(tmp_path: Path, position: int, value: bytes, reason: str | None) -> None:
    write(tmp_path / "d", DOCUMENTS)
    raw = bytearray((tmp_path / "d.idx").read_bytes())
    raw[position : position + 1] = value
    (tmp_path / "d.idx").write_bytes(raw)
    if reason is None:
        IndexedDataset(tmp_path / "d")
        return
    with pytest.raises(DataError, match=reason):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize("name", ["d.bin", "d.idx"])
def test_missing_or_truncated_file(tmp_path: Path, name: str) -> None:
    write(tmp_path / "d", DOCUMENTS)
    content = (tmp_path / name).read_bytes()
    for size in (len(content) - 1, 20):
        (tmp_path / name).write_bytes(content[:size])
        with pytest.raises(DataError, match=name):
            IndexedDataset(tmp_path / "d")
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} does not exist"):
        IndexedDataset(tmp_path / "d")


def test_kill_between_the_two_renames_leaves_no_false_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "d", DOCUMENTS)
    rename = Path.replace

    def rename_ids_only(path: Path, target: Path) -> Path:
        if target.name.endswith(".idx"):
            raise OSError("killed")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", rename_ids_only)
    with pytest.raises(OSError, match="killed"):
        write(prefix, DOCUMENTS[::-1])  # of the same size, so that the old index would fit
    with pytest.raises(DataError, match=r"d\.idx does not exist"):
        IndexedDataset(prefix)
