"""Raw text: files of JSON lines, plain or zstd-compressed, as Proof-Pile-2 lays them out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard

from neox_core.config import DataConfig
from neox_core.errors import DataError

SPLITS = ("train", "validation", "test")
SUFFIXES = (".jsonl", ".jsonl.zst")
_READ_SIZE = 1 << 16
_MAX_WINDOW = 1 << 31  # zstd --long=31, which its library refuses by default


class Document(NamedTuple):
    """One record's text."""

    text: str
    bytes: int
    """Length of the text in UTF-8."""
    line: int
    """Line of the (decompressed) file, from 1."""


def source_files(config: DataConfig, source: str, split: str) -> list[Path]:
    """The files of `<input>/<source>/<split>/`, sorted by name.

    Returns an empty list only for a split other than train of a source that is not used for evaluation.

    Raises:
        DataError: the folder is missing, has no files, or has one that is empty or of another kind.
    """
    folder = config.input / source / split
    if split != "train" and source not in config.validation_sources and not folder.exists():
        return []
    if not folder.is_dir():
        raise DataError(f"source {source!r} has no folder {folder}: correct data.input or data.sources{_hint(split)}")
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if not files:
        raise DataError(f"source {source!r} is empty: {folder} holds no {' or '.join(SUFFIXES)} file")
    for path in files:
        if not path.name.endswith(SUFFIXES) or not path.is_file():
            raise DataError(f"{path} is not a {' or '.join(SUFFIXES)} file: convert it or move it away")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes): fetch it again or remove it")
    return files


def documents(path: Path) -> Iterator[Document]:
    """Stream the records of one file, `{"text": ..., ...}` a line; lines of white space alone hold no record.

    Raises:
        DataError: a record is not a JSON object with a string "text" (named by line), or the file is truncated or
            damaged; documents before that point have been yielded by then.
    """
    chunks = _decompressed(path) if path.name.endswith(".zst") else _raw(path)
    for number, line in enumerate(_lines(chunks), start=1):
        if line.strip():
            yield _document(line, number, path)


def _document(line: bytes, number: int, path: Path) -> Document:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _bad_record(path, number, f"it is not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise _bad_record(path, number, f"it is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise _bad_record(path, number, f"it is a {type(record).__name__}, not an object")
    if "text" not in record:
        raise _bad_record(path, number, f'it has no "text", only {", ".join(map(repr, record)) or "nothing"}'[:200])
    text = record["text"]
    if not isinstance(text, str):
        raise _bad_record(path, number, f'its "text" is of type {type(text).__name__}, not a string')
    try:
        return Document(text, len(text.encode("utf-8")), number)
    except UnicodeEncodeError as error:
        reason = f'its "text" holds a lone surrogate at character {error.start}'
        raise _bad_record(path, number, reason) from None


def _bad_record(path: Path, number: int, reason: str) -> DataError:
    return DataError(f"{path}, line {number}: bad record, {reason}: correct or remove it")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Cut at line feeds only: U+2028 and the like are text."""
    pending: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pending.append(first)
        for piece in others:
            yield b"".join(pending)
            pending = [piece]
    if last := b"".join(pending):
        yield last


def _raw(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_READ_SIZE):
            yield chunk


def _decompressed(path: Path) -> Iterator[bytes]:
    """Decompress frame by frame: python-zstandard's stream readers end silently where a frame is cut off."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    frame = None
    for chunk in _raw(path):
        rest = chunk
        while rest:
            frame = frame or decompressor.decompressobj()
            try:
                output = frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise DataError(f"{path} is damaged ({error}): fetch it again") from None
            if output:
                yield output
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise DataError(f"{path} is truncated (its last zstd frame does not end): fetch it again")


def _hint(split: str) -> str:
    return "" if split == "train" else ", or name the sources that have it in data.eval_sources"
