"""Reading raw text: every record is a document or a named rejection; a damaged file never passes for a whole one."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from neox_core.data.tokenization.readers import DamagedFileError, Document, Rejection, documents, read_records
from neox_core.data.tokenization.readers.lines import MAX_LINE
from neox_core.data.tokenization.readers.record import MAX_UNBROKEN
from neox_core.errors import DataError

TEXTS = ["one", "zwei\u2028drei\u0085vier", "", "líne\nbreak", "∀x. x = x", "nul\x00", "end"]
LINES = [json.dumps({"text": text, "meta": {"n": n}}, ensure_ascii=False).encode() for n, text in enumerate(TEXTS)]
WHOLE = b"\n".join(LINES)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 8\n"
SKIPPABLE = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"


def zst(*frames: bytes) -> bytes:
    return b"".join(zstandard.ZstdCompressor(write_checksum=True).compress(frame) for frame in frames)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def texts(path: Path, key: str = "text") -> list[str]:
    return [document.text for document in documents(path, key)]


def test_every_kind_of_file_gives_the_same(tmp_path: Path) -> None:
    plain = list(documents(write(tmp_path / "a.jsonl", WHOLE)))
    assert [document.text for document in plain] == TEXTS
    assert [document.bytes for document in plain] == [len(text.encode()) for text in TEXTS]
    assert [document.line for document in plain] == list(range(1, len(TEXTS) + 1))
    assert list(documents(write(tmp_path / "a.jsonl.zst", zst(WHOLE)))) == plain
    assert list(documents(write(tmp_path / "a.jsonl.gz", gzip.compress(WHOLE)))) == plain


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "jsonl.gz", "parquet"])
def test_told_how_much_has_been_read(tmp_path: Path, kind: str) -> None:
    words = [f"text {n * n} " * 1000 for n in range(300)]
    content = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in words)
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        parquet.write_table(pyarrow.table({"text": words}), path)
    else:
        write(path, {"jsonl": bytes, "jsonl.zst": zst, "jsonl.gz": gzip.compress}[kind](content))
    read: list[int] = []
    assert len(list(read_records(path, on_read=read.append))) == len(words)
    assert read == sorted(read)
    assert 0 < read[0] < read[len(read) // 2] <= read[-1] == path.stat().st_size


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = pyarrow.table({"id": range(len(TEXTS) + 1), "body": [*TEXTS, None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    records = list(read_records(tmp_path / "a.parquet", "body"))
    assert [record.text for record in records[:-1]] == TEXTS  # type: ignore[union-attr]
    assert records[-1] == Rejection(len(TEXTS) + 1, 'its "body" is of type NoneType, not a string')
    with pytest.raises(DataError, match=r"no column 'text', only id, body: correct data\.text_key"):
        list(read_records(tmp_path / "a.parquet"))
    content = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(DamagedFileError, match=r"b\.parquet is damaged"):
        list(read_records(write(tmp_path / "b.parquet", content[:-40]), "body"))


@pytest.mark.parametrize("cut", [0, 1, 17, 60])
def test_several_frames_and_skippable_ones(tmp_path: Path, cut: int) -> None:
    content = zst(WHOLE[:cut]) + SKIPPABLE + zst(WHOLE[cut:], b"")
    assert texts(write(tmp_path / "a.jsonl.zst", content)) == TEXTS
    content = gzip.compress(WHOLE[:cut]) + gzip.compress(WHOLE[cut:])
    assert texts(write(tmp_path / "a.jsonl.gz", content)) == TEXTS


def test_window_above_128_mb(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=False, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # unknown size: window as asked
    content = compressor.compress(WHOLE) + compressor.flush()
    with pytest.raises(zstandard.ZstdError, match=r"[Tt]oo much memory|window"):
        zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj().decompress(content)
    assert texts(write(tmp_path / "a.jsonl.zst", content)) == TEXTS


def test_file_larger_than_the_buffers(tmp_path: Path) -> None:
    many = [f"{number} " * (1 + 17 * number) for number in range(500)]
    whole = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in many)
    assert len(whole) > 1 << 22
    assert texts(write(tmp_path / "a.jsonl.zst", zst(whole[:1_000_000], whole[1_000_000:]))) == many


@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_truncation_is_found_at_every_byte(tmp_path: Path, suffix: str) -> None:
    compress: Callable[[bytes], bytes] = zst if suffix == "zst" else gzip.compress
    boundary = len(compress(WHOLE[:40]))
    whole = compress(WHOLE[:40]) + compress(WHOLE[40:])
    for size in range(1, len(whole)):
        if size == boundary:  # a file that ends with a frame is whole
            continue
        with pytest.raises(DamagedFileError, match=r"cut\.jsonl\.\w+ is damaged \((it is truncated|Not a gzipped)"):
            list(read_records(write(tmp_path / f"cut.jsonl.{suffix}", whole[:size])))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl.zst", zst(WHOLE) + b"garbage", "Unknown frame"),
        ("a.jsonl.zst", zst(WHOLE) + b"\x00" * 5, "Unknown frame"),
        ("a.jsonl.zst", WHOLE, "it is plain text, not zstd, whatever its name says: rename it"),
        ("a.jsonl.zst", POINTER, "it is a git-lfs pointer, not the file itself: run `git lfs pull`"),
        ("a.jsonl.gz", POINTER, "it is a git-lfs pointer"),
        ("a.jsonl", POINTER, "it is a git-lfs pointer"),
        ("a.parquet", POINTER, "it is a git-lfs pointer"),
        ("a.jsonl.gz", b"<!DOCTYPE html>", "it is a web page"),
        ("a.jsonl.gz", b"\x00\x01not text", "Not a gzipped file"),
        ("a.jsonl.zst", gzip.compress(WHOLE), "it is gzip, not zstd, whatever its name says: rename it"),
        ("a.jsonl.gz", zst(WHOLE), "it is zstd, not gzip, whatever its name says: rename it"),
        ("a.jsonl.zst", zst(WHOLE)[:-6] + b"\xff" + zst(WHOLE)[-5:], ""),
        ("a.jsonl.zst", zst(WHOLE) + SKIPPABLE[:-1], "truncated"),
        ("a.jsonl.zst", b"", "it is empty (0 bytes), which no packed file is"),
        ("a.jsonl.gz", gzip.compress(WHOLE) + b"garbage", "Not a gzipped file"),
        ("a.jsonl.gz", WHOLE, "it is plain text, not gzip, whatever its name says: rename it"),
        ("a.jsonl.gz", gzip.compress(WHOLE)[:-8] + bytes(8), "CRC"),
        ("a.jsonl.gz", b"", "it is empty (0 bytes), which no packed file is"),
        ("a.jsonl", WHOLE.decode().encode("utf-16"), "UTF-16 or UTF-32: convert it to UTF-8"),
        ("a.jsonl", WHOLE.decode().encode("utf-32"), "UTF-32"),
        ("a.jsonl.zst", zst(WHOLE.decode().encode("utf-16")), "UTF-16"),
        ("a.jsonl", WHOLE.decode().encode("utf-16-le"), "NUL bytes"),
        ("a.jsonl", gzip.compress(WHOLE), "it is gzip inside"),
        ("a.jsonl", zst(WHOLE), "it is zstd inside"),
        ("a.jsonl.gz", gzip.compress(zst(WHOLE)), "it is zstd inside"),
        ("a.jsonl", b"PAR1 no", "it is parquet inside"),
        ("a.parquet", b"PAR1 no", ""),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = write(tmp_path / name, content)
    with pytest.raises(DamagedFileError) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path} is damaged (")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # as it comes back from a worker
    assert (type(again), str(again), again.reason) == (DamagedFileError, str(caught.value), caught.value.reason)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\n\n \t\n"])
@pytest.mark.parametrize("last", [b"", b"\n"])
def test_harmless_oddities(tmp_path: Path, mark: bytes, ending: bytes, last: bytes) -> None:
    assert texts(write(tmp_path / "a.jsonl", mark + ending.join(LINES) + last)) == TEXTS


@pytest.mark.parametrize(
    "odd",
    [
        b'{"text": "fine", "x": NaN, "y": -Infinity}',
        b'{"text": "fine", "x": ' + b"9" * 30 + b"}",
        b'{"text": "fine", "x": ' + b"9" * 5000 + b"}",
        b'{"text": "fine", "x": 1e999}',
        b'{"x": ' + b"[" * 500 + b"]" * 500 + b', "text": "fine"}',
    ],
)
def test_odd_values_beside_the_text_lose_no_document(tmp_path: Path, odd: bytes) -> None:
    assert texts(write(tmp_path / "a.jsonl", odd)) == ["fine"]


BAD = [
    (b"{", "it is not JSON"),
    (b"not json", "it is not JSON"),
    (b'{"text": "a"} {"text": "b"}', "it is not JSON"),
    (b'{"text": "a\x00"}', "it is not JSON"),
    (b'{"text": "a"', "it is not JSON"),
    (b"[" * 100_000, "nested too deep"),
    (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    (b'["text"]', "it is a list, not an object"),
    (b'[{"text": "a"}]', "it is a list, not an object"),
    (b'"text"', "it is a str, not an object"),
    (b"null", "it is a NoneType, not an object"),
    (b"NaN", "it is a float, not an object"),
    (b'{"Text": "a"}', "it has no \"text\", only 'Text'"),
    (b'{"TEXT": "a", "id": 1}', "it has no \"text\", only 'TEXT', 'id'"),
    (b"{}", 'it has no "text", only nothing'),
    (b'{"text": null}', 'its "text" is of type NoneType'),
    (b'{"text": 7}', 'its "text" is of type int'),
    (b'{"text": NaN}', 'its "text" is of type float'),
    (b'{"text": ["a"]}', 'its "text" is of type list'),
    (b'{"text": "\xff"}', "it is not UTF-8 (invalid start byte at byte 10)"),
    (b'{"text": "\xed\xa0\x80"}', "it is not UTF-8"),
    (b'{"text": "\\ud800"}', "lone surrogate at character 0"),
    (b'\xef\xbb\xbf{"text": "a"}', "it is not JSON"),
    (b"\x00" * 50, "it is not JSON"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_bad_record_is_named_and_costs_no_other(tmp_path: Path, bad: bytes, reason: str) -> None:
    path = write(tmp_path / "b.jsonl", LINES[0] + b"\n\n" + LINES[1] + b"\r\n" + bad + b"\n" + LINES[3])
    first, second, rejected, last = read_records(path)
    assert [first, second, last] == [
        Document(TEXTS[n], len(TEXTS[n].encode()), line) for n, line in ((0, 1), (1, 3), (3, 5))
    ]
    assert isinstance(rejected, Rejection)
    assert rejected.line == 4
    assert reason in rejected.reason
    assert len(rejected.reason) <= 250
    with pytest.raises(DataError, match=r"b\.jsonl, line 4: bad record, it"):
        list(documents(path))


def test_pretty_printed_records_are_rejected_line_by_line(tmp_path: Path) -> None:
    content = json.dumps([{"text": "a"}, {"text": "b"}], indent=1).encode()
    records = list(read_records(write(tmp_path / "a.jsonl", content)))
    assert len(records) == content.count(b"\n") + 1
    assert all(isinstance(record, Rejection) for record in records)
    assert "one record per line" in records[0].reason  # type: ignore[union-attr]


def test_other_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"content": "x", "text": "y"}')
    assert texts(path, "content") == ["x"]


def test_line_without_end_is_rejected_and_the_next_one_read(tmp_path: Path) -> None:
    long = b'{"text": "' + b"a " * (MAX_LINE // 2) + b'"}'
    path = write(tmp_path / "a.jsonl.zst", zst(LINES[0] + b"\n" + long + b"\n" + LINES[3]))
    first, rejected, last = read_records(path)
    assert isinstance(first, Document)
    assert rejected == Rejection(2, f"its line is longer than {MAX_LINE} bytes")
    assert isinstance(last, Document)
    assert last.line == 3


def test_run_of_letters_without_end_is_rejected(tmp_path: Path) -> None:
    records = [{"text": "a" * MAX_UNBROKEN}, {"text": "b " + "a" * (MAX_UNBROKEN + 1) + "\nc"}]
    path = write(tmp_path / "a.jsonl", b"\n".join(json.dumps(record).encode() for record in records))
    kept, rejected = read_records(path)
    assert isinstance(kept, Document)
    assert rejected == Rejection(2, f'its "text" has more than {MAX_UNBROKEN} characters in a row without a blank')


def test_long_text_of_many_words_is_checked_in_linear_time(tmp_path: Path) -> None:
    """The quadratic way took minutes for the first and hours for the second."""
    for text in ("word " * 1_400_000, "word\n" * 1_400_000 + "a" * MAX_UNBROKEN):
        (document,) = read_records(write(tmp_path / "a.jsonl", json.dumps({"text": text}).encode()))
        assert isinstance(document, Document)


def test_parquet_rows_are_bounded_and_of_texts(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = pyarrow.table({"text": ["short", "a " * (MAX_LINE // 2 + 1), None], "number": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second, third = read_records(tmp_path / "a.parquet")
    assert isinstance(first, Document)
    assert second == Rejection(2, f"its text is longer than {MAX_LINE} bytes")
    assert isinstance(third, Rejection)
    with pytest.raises(DataError, match=r"a\.parquet has a column 'number' that holds int64, not text"):
        list(read_records(tmp_path / "a.parquet", "number"))


def test_no_damage_to_parquet_loses_rows_or_shows_a_traceback(tmp_path: Path) -> None:
    """Each bit of the metadata in turn."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = pyarrow.table({"text": [f"text {number}" for number in range(200)]})
    parquet.write_table(table, tmp_path / "a.parquet", store_schema=False)
    content = (tmp_path / "a.parquet").read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    whole = damaged = 0
    for place in range(footer, len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            try:
                records = list(read_records(write(tmp_path / "b.parquet", bytes(changed))))
            except DataError:
                damaged += 1
            else:
                assert len(records) == 200, (place, bit)
                whole += 1
    assert min(damaged, whole) > 100


def test_changed_text_of_parquet_with_checksums(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = pyarrow.table({"text": ["some letters", "others"]})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True, "write_statistics": False}
    parquet.write_table(table, tmp_path / "a.parquet", **options)
    assert len(list(read_records(tmp_path / "a.parquet"))) == 2
    content = (tmp_path / "a.parquet").read_bytes().replace(b"letters", b"litters")
    with pytest.raises(DamagedFileError, match=r"b\.parquet is damaged"):
        list(read_records(write(tmp_path / "b.parquet", content)))


MEMORY = """
import re, sys
from pathlib import Path
from neox_core.data.tokenization.readers import read_records
def peak():  # that of getrusage is at least the parent's
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
records = [getattr(record, "reason", "") for record in read_records(Path(sys.argv[1]))]
print(records, (peak() - before) // 1024)
"""


def test_memory_for_parquet_is_not_that_of_many_long_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    texts = ["some words " * 450_000 + str(number) for number in range(64)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=8)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "a.parquet")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    reasons, _, mebibytes = answer.strip().rpartition(" ")
    assert reasons == str([""] * 64)
    assert int(mebibytes) < 250  # 64 rows at a time took 770


def test_decompression_bomb_takes_little_memory(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    letters = b"a" * (1 << 24)
    content = b"".join(compressor.compress(letters) for _ in range(64)) + compressor.flush()  # 1 GiB
    assert len(content) < 1 << 20
    path = write(tmp_path / "bomb.jsonl.zst", content)
    answer = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True).stdout
    reasons, _, mebibytes = answer.strip().rpartition(" ")
    assert reasons == f"['its line is longer than {MAX_LINE} bytes']"
    assert int(mebibytes) < 100


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \r\n\n"),
        ("a.jsonl.zst", zst(b"")),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_a_file_without_records_is_whole(tmp_path: Path, name: str, content: bytes) -> None:
    """As tools write a shard that nothing fell into."""
    assert list(read_records(write(tmp_path / name, content))) == []


def test_a_parquet_file_without_rows_is_whole(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == []
