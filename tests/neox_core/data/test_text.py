"""Reading raw text: every record or an error, never a silent loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from neox_core.config import DataConfig
from neox_core.data.text import documents, source_files
from neox_core.errors import DataError

TEXTS = ["one", "zwei\u2028drei", "", "líne\nbreak", "∀x. x = x", "end"]
LINES = [json.dumps({"text": text, "meta": {"n": number}}).encode() for number, text in enumerate(TEXTS)]


def compressed(*frames: bytes) -> bytes:
    return b"".join(zstandard.ZstdCompressor().compress(frame) for frame in frames)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_plain_and_compressed_give_the_same(tmp_path: Path) -> None:
    whole = b"\n".join(LINES)
    plain = list(documents(write(tmp_path / "a.jsonl", whole)))
    assert [document.text for document in plain] == TEXTS
    assert [document.bytes for document in plain] == [len(text.encode()) for text in TEXTS]
    assert [document.line for document in plain] == [1, 2, 3, 4, 5, 6]
    assert list(documents(write(tmp_path / "a.jsonl.zst", compressed(whole)))) == plain


@pytest.mark.parametrize("cut", [0, 1, 17, 60])
def test_several_frames(tmp_path: Path, cut: int) -> None:
    whole = b"\n".join(LINES) + b"\n"
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    content = compressed(whole[:cut]) + skippable + compressed(whole[cut:], b"")
    assert [document.text for document in documents(write(tmp_path / "a.jsonl.zst", content))] == TEXTS


def test_file_larger_than_the_buffers(tmp_path: Path) -> None:
    texts = [f"{number} " * (1 + 17 * number) for number in range(500)]
    whole = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    assert len(whole) > 1 << 22
    content = compressed(whole[:1_000_000], whole[1_000_000:])
    assert [document.text for document in documents(write(tmp_path / "a.jsonl.zst", content))] == texts


def test_truncation_is_an_error_at_every_byte(tmp_path: Path) -> None:
    whole = compressed(b"\n".join(LINES[:3]) + b"\n", b"\n".join(LINES[3:]))
    boundary = len(compressed(b"\n".join(LINES[:3]) + b"\n"))
    for size in range(1, len(whole)):
        path = write(tmp_path / "cut.jsonl.zst", whole[:size])
        if size == boundary:  # a file that ends with a frame is whole
            assert len(list(documents(path))) == 3
            continue
        with pytest.raises(DataError, match=r"cut\.jsonl\.zst is truncated"):
            list(documents(path))


@pytest.mark.parametrize("tail", [b"garbage", b"\x00\x00\x00\x00\x00"])
def test_trailing_garbage_is_an_error(tmp_path: Path, tail: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl\.zst is damaged"):
        list(documents(write(tmp_path / "a.jsonl.zst", compressed(LINES[0]) + tail)))


def test_plain_text_under_a_zst_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl\.zst is damaged"):
        list(documents(write(tmp_path / "a.jsonl.zst", LINES[0])))


def test_damaged_content_is_an_error(tmp_path: Path) -> None:
    content = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(b"\n".join(LINES)))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(DataError, match=r"a\.jsonl\.zst"):
        list(documents(write(tmp_path / "a.jsonl.zst", bytes(content))))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{", "it is not JSON"),
        (b"not json", "it is not JSON"),
        (b'{"text": "a"} {"text": "b"}', "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b'["text"]', "it is a list, not an object"),
        (b'"text"', "it is a str, not an object"),
        (b'{"Text": "a"}', "it has no \"text\", only 'Text'"),
        (b"{}", 'it has no "text", only nothing'),
        (b'{"text": null}', 'its "text" is of type NoneType'),
        (b'{"text": 7}', 'its "text" is of type int'),
        (b'{"text": "\xff"}', "it is not UTF-8"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'\xef\xbb\xbf{"text": "a"}', "it is not JSON"),
        ('{"text": "a"}'.encode("utf-16"), "it is not UTF-8"),
    ],
)
def test_bad_record_names_file_line_and_reason(tmp_path: Path, bad: bytes, reason: str) -> None:
    path = write(tmp_path / "b.jsonl", LINES[0] + b"\n\n" + LINES[1] + b"\r\n" + bad + b"\n" + LINES[2])
    reader = documents(path)
    assert [next(reader).line, next(reader).line] == [1, 3]
    with pytest.raises(DataError) as caught:
        next(reader)
    assert f"{path}, line 4: bad record" in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def data_config(folder: Path, *evaluated: str) -> DataConfig:
    sources = {name: {"weight": 1} for name in ("a", "b")}
    return DataConfig.model_validate({"input": folder, "sources": sources, "eval_sources": evaluated})


def test_files_are_sorted(tmp_path: Path) -> None:
    for name in ("2.jsonl", "10.jsonl.zst", "1.jsonl", ".hidden"):
        write(tmp_path / "a" / "train" / name, b"x")
    names = [path.name for path in source_files(data_config(tmp_path), "a", "train")]
    assert names == ["1.jsonl", "10.jsonl.zst", "2.jsonl"]


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    config = data_config(tmp_path, "a")
    with pytest.raises(DataError, match=r"source 'a' has no folder .*/a/train"):
        source_files(config, "a", "train")
    (tmp_path / "a" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"source 'a' is empty: .*/a/train"):
        source_files(config, "a", "train")
    write(tmp_path / "a" / "train" / "0.jsonl", b"")
    with pytest.raises(DataError, match=r"0\.jsonl is empty \(0 bytes\)"):
        source_files(config, "a", "train")
    write(tmp_path / "a" / "train" / "0.jsonl", b"x")
    write(tmp_path / "a" / "train" / "1.parquet", b"x")
    with pytest.raises(DataError, match=r"1\.parquet is not a"):
        source_files(config, "a", "train")


def test_only_sources_for_evaluation_need_validation(tmp_path: Path) -> None:
    config = data_config(tmp_path, "a")
    assert source_files(config, "b", "validation") == []
    with pytest.raises(DataError, match=r"a/validation.*data\.eval_sources"):
        source_files(config, "a", "validation")
    with pytest.raises(DataError, match="b/train"):
        source_files(config, "b", "train")
